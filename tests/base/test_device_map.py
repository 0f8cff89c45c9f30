"""A base that is spread over devices: here over the CPU and the disk, there being nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import spectr_demo
from spectr_demo.base import loading
from spectr_demo.base.loading import load_base
from spectr_demo.base.memory import execution_device
from spectr_demo.engine.model import SpectrModel

PROMPT = "Write the cron expression: At 02:30, only on Monday"
COLUMNS = ["base", "single:red", "spectr-paper", "spectr-context"]


def split(num_layers: int) -> dict[str, str]:
    """The second half of the layers on disk."""
    ends = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return ends | {
        f"model.layers.{layer}": "disk" if 2 * layer >= num_layers else "cpu"
        for layer in range(num_layers)
    }


def save_dense(model: SpectrModel, folder: Path) -> None:
    """The model with its NF4 values, as a base that nobody has quantized."""
    model.detach()
    config = model.model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense.load_state_dict(model.model.state_dict())
    dense.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def test_a_base_spread_over_cpu_and_disk_answers_and_routes_as_in_one_place(
    base_folder: str, expert_folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "choose_compute_dtype", lambda device: torch.float32)
    whole = spectr_demo.load(base_folder, expert_folders)
    expected = whole.compare(PROMPT, COLUMNS, max_new_tokens=12)
    save_dense(whole, tmp_path)
    del whole
    spread = spectr_demo.load(str(tmp_path), expert_folders, device_map=split(2))
    assert spread.base.quantization == "unquantized, spread over cpu, disk"
    assert spread.base.bits == 32
    on_disk = spread.model.get_submodule("model.layers.1.mlp.down_proj")
    assert next(on_disk.parameters()).device.type == "meta"
    assert {bank.A.device.type for bank in spread.library.banks} == {"cpu"}
    result = spread.compare(PROMPT, COLUMNS, max_new_tokens=12)
    assert [c.text for c in result.columns] == [c.text for c in expected.columns]
    assert len({c.text for c in result.columns}) > 1
    assert result.trace is not None
    assert expected.trace is not None
    for column in COLUMNS[2:]:
        shares = (trace.share(column, "answer") for trace in (result.trace, expected.trace))
        np.testing.assert_allclose(*shares, atol=1e-5)


def test_a_layer_on_disk_computes_where_its_hook_says(base_folder: str) -> None:
    base = load_base(base_folder, device_map=split(2))
    layer = base.model.get_submodule("model.layers.1.mlp.up_proj")
    assert next(layer.parameters()).device.type == "meta"
    assert execution_device(layer) == base.device == torch.device("cpu")
    assert execution_device(torch.nn.Linear(1, 1, device="meta")).type == "meta"


def test_auto_is_the_cpu_where_there_is_nothing_else(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain = load_base(base_folder)
    monkeypatch.setenv("SPECTR_DEVICE_MAP", "auto")
    auto = load_base(base_folder)
    assert (auto.quantization, auto.bits) == (plain.quantization, 4)


def test_a_misspelt_device_map(base_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTR_DEVICE_MAP", "atuo")
    with pytest.raises(ValueError, match=r"unknown device map 'atuo'.*Did you mean 'auto'\?"):
        load_base(base_folder)


def test_the_variable_reaches_transformers(
    base_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def from_pretrained(*args: Any, **settings: Any) -> None:
        given.update(settings)
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for variable, device_map in (("auto", "auto"), ("", {"": "cuda"})):
        monkeypatch.setenv("SPECTR_DEVICE_MAP", variable)
        with pytest.raises(ValueError, match="as far as this test goes"):
            load_base(base_folder)
        assert given["device_map"] == device_map
        assert given["dtype"] == torch.float16
        quantization = given["quantization_config"]
        assert quantization.llm_int8_enable_fp32_cpu_offload is (variable == "auto")


def test_a_4bit_checkpoint_is_not_offloaded(base_folder: str, tmp_path: Path) -> None:
    quantized = str(tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(
        base_folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        device_map={"": "cpu"},
    )
    model.save_pretrained(quantized)
    with pytest.raises(ValueError, match=r"nf4.*in 4 bits already.*unquantized"):
        load_base(quantized, device_map=split(2))
