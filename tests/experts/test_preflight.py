"""What is said before a base is fetched is what loading it then takes, or refuses."""

from pathlib import Path

import pytest
import torch
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.gpu import random_adapters
from benchmarks.random_models import SHAPES
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import load
from spectr_demo.experts import preflight as module
from spectr_demo.experts.preflight import preflight
from tests.conftest import SaveExpert


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without a kernel for 4-bit products."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "choose_compute_dtype", lambda device: torch.float32)
    monkeypatch.setattr(
        "spectr_demo.base.loading.choose_compute_dtype", lambda device: torch.float32
    )


def test_the_estimate_is_what_is_allocated(base_folder: str, expert_folders: list[str]) -> None:
    found = preflight(base_folder, expert_folders, num_columns=3, num_tokens=5)
    model = load(base_folder, expert_folders)
    parameters = list(model.model.parameters())
    assert found.num_parameters == sum(p.numel() for p in parameters)
    assert found.weights == sum(p.nbytes for p in parameters)
    banks = model.library.banks
    assert found.experts == sum(bank.A.nbytes + sum(B.nbytes for B in bank.B) for bank in banks)
    cache = DynamicCache()
    model.model(torch.zeros(3, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert found.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.memory == found.weights + found.experts + found.cache + found.activations
    assert found.problems == ()
    assert str(found).endswith("All experts fit this base.")


def test_four_bit_weights_are_counted_as_such(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = preflight(base_folder, []).weights
    monkeypatch.setattr(module, "choose_compute_dtype", lambda device: torch.bfloat16)
    assert preflight(base_folder, []).weights < wide / 2


def test_layers_that_are_not_quantized_are_counted_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon's linear layers are of a class of its own, which stays in 16 bits."""
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    FalconForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(module, "choose_compute_dtype", lambda device: torch.bfloat16)
    base = load_base(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert (base.bits, base.quantization) == (16, "unquantized")
    assert base.model(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16
    found = preflight(str(tmp_path), [])
    assert found.weights == sum(p.nbytes for p in base.model.parameters())


def test_problems_are_those_that_loading_raises(
    base_folder: str, expert_folders: list[str], save_expert: SaveExpert, tmp_path: Path
) -> None:
    alien = save_expert("alien", target_modules=["lm_head"])
    sources = [*expert_folders, f"red={expert_folders[1]}", alien, str(tmp_path), "x=./nowhere"]
    found = preflight(base_folder, sources)
    assert len(found.problems) == 4
    with pytest.raises(ValueError, match="red") as caught:
        load(base_folder, sources)
    assert str(caught.value).splitlines() == list(found.problems)
    assert str(found).splitlines()[1:] == list(found.problems)


def test_too_little_memory_is_said(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "TOO LITTLE" not in str(preflight(base_folder, []))
    monkeypatch.setattr("spectr_demo.base.memory.available_memory", lambda: 1000)
    assert "TOO LITTLE" in str(preflight(base_folder, []))


@pytest.mark.embedded
def test_the_embedded_default() -> None:
    found = preflight(None, [])
    assert found.num_parameters == 134_515_008


def test_a_3b_base_with_ten_experts_and_four_columns_fits_a_t4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in float16, as on that GPU: experts of rank 16 on all linear layers, 1,024 tokens."""
    monkeypatch.setattr(module, "choose_compute_dtype", lambda device: torch.float16)
    monkeypatch.setattr(module, "_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(module, "free_memory", lambda device: int(15e9))
    config = SHAPES["Llama-3.2-3B"]
    config.save_pretrained(tmp_path)
    (folder,) = random_adapters(config, 1, 16, tmp_path)
    experts = [f"e{e}={folder}" for e in range(10)]
    found = preflight(str(tmp_path), experts, num_columns=4, num_tokens=1024)
    assert found.problems == ()
    assert "TOO LITTLE" not in str(found)
    parts = found.weights, found.experts, found.cache, found.activations
    assert [round(part / 1e9, 1) for part in parts] == [2.3, 0.5, 0.5, 1.1]
