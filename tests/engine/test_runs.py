"""Layers that run more than once in a pass, and modules that have more than one name."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from spectr_demo.engine.layers import RoutedLinear, routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.recorder import Recorder
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.routers import parse_router
from tests.conftest import EXPERT_NAMES, IN_CONTEXT, loaded_base

TEXT = "Run the backup at 02:30."
TARGETS = ["q_proj", "v_proj", "up_proj", "gate_proj", "down_proj"]


class SharedConfig(LlamaConfig):
    model_type = "shared_llama"


class SharedForCausalLM(LlamaForCausalLM):
    """A Llama whose two layers have one feed-forward network."""

    config_class = SharedConfig

    def __init__(self, config: SharedConfig) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = self.model.layers[0].mlp


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    AutoModelForCausalLM.register(SharedConfig, SharedForCausalLM)
    yield
    del MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[SharedConfig]


@pytest.fixture
def base(tokenizer: PreTrainedTokenizerFast) -> SharedForCausalLM:
    torch.manual_seed(0)
    config = SharedConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return SharedForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def folders(base: SharedForCausalLM, tmp_path: Path) -> list[str]:
    for seed, name in enumerate(EXPERT_NAMES):
        peft = get_peft_model(deepcopy(base), LoraConfig(r=4, target_modules=TARGETS))
        generator = torch.Generator().manual_seed(seed)
        for key, weight in peft.named_parameters():
            if "lora_" in key:
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
        peft.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in EXPERT_NAMES]


@pytest.fixture
def model(
    base: SharedForCausalLM, tokenizer: PreTrainedTokenizerFast, folders: list[str]
) -> SpectrModel:
    return SpectrModel(loaded_base(base, tokenizer), load_experts(folders, base))


def logits(model: SpectrModel, router: str, recorder: Recorder | None = None) -> Tensor:
    ids = model.encode(TEXT)
    plan = model.plan([parse_router(router, model.library.names)], [ids], recorder)
    with torch.no_grad(), routed(plan):
        return model.model(torch.tensor([ids])).logits


def test_a_shared_module_is_wrapped_once(model: SpectrModel, base: SharedForCausalLM) -> None:
    wrapped = [module for module in base.modules() if isinstance(module, RoutedLinear)]
    assert len(wrapped) == 4 + 3, "two layers' attention, one feed-forward network"
    assert not any(isinstance(layer.base_layer, RoutedLinear) for layer in wrapped)
    up_proj = base.model.layers[1].mlp.up_proj
    assert isinstance(up_proj, RoutedLinear) and up_proj.path == "model.layers.0.mlp.up_proj"
    model.detach()
    assert not any(isinstance(module, RoutedLinear) for module in base.modules())


def test_it_has_a_bank_for_each_run_with_the_same_factors(model: SpectrModel) -> None:
    banks = {(bank.paths, bank.run): bank for bank in model.library.banks}
    paths = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    first, second = banks[paths, 0], banks[paths, 1]
    assert first.A is second.A and first.B is second.B
    assert model.library.projections == (
        *("q_proj", "v_proj", "gate_proj", "up_proj", "gate_proj (run 2)", "up_proj (run 2)"),
        *("down_proj", "down_proj (run 2)"),
    )


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_single_equals_peft(
    name: str, model: SpectrModel, base: SharedForCausalLM, folders: list[str]
) -> None:
    ours = logits(model, f"single:{name}")
    model.detach()
    peft = PeftModel.from_pretrained(base, folders[EXPERT_NAMES.index(name)]).eval()
    with torch.no_grad():
        assert_close(ours, peft(torch.tensor([model.encode(TEXT)])).logits, atol=1e-4, rtol=1e-4)


def test_a_trace_has_a_cell_for_each_run(model: SpectrModel) -> None:
    """The shares are those of all decisions, each run's among them."""
    columns = ["base", "spectr", "uniform", IN_CONTEXT]
    trace = model.compare(TEXT, columns, max_new_tokens=5).trace
    assert trace is not None
    column = trace.column("spectr")
    read = column.experts[:-1, ..., 0] >= 0
    assert read.sum(axis=(1, 2)).tolist() == [4 + 2 * 3] * (column.num_tokens - 1)
    chosen: dict[ExpertBank, Tensor] = {}

    class Kept(Recorder):
        def add_choice(self, bank: ExpertBank, row: int, choice: tuple[Tensor, ...]) -> None:
            assert bank not in chosen
            chosen[bank] = bank.expert_ids[choice[0][..., 0]]

    plan = model.plan([parse_router("spectr", model.library.names)], [column.token_ids], Kept())
    with torch.no_grad(), routed(plan):
        model.model(torch.from_numpy(column.token_ids[None, :-1].astype(np.int64)))
    for bank, experts in chosen.items():
        for p, (layer, projection) in enumerate(zip(*model.library.places(bank), strict=True)):
            found = column.experts[:-1, layer, projection, 0]
            np.testing.assert_array_equal(found, experts[:, p])
    decisions = torch.cat([experts.flatten() for experts in chosen.values()])
    expected = decisions.bincount(minlength=3) / len(decisions)
    np.testing.assert_allclose(trace.share("spectr"), expected, atol=1e-6)
    runs = [chosen[bank] for bank in chosen if "down_proj" in bank.paths[0]]
    assert not torch.equal(runs[0], runs[1]), "the runs would hide a mix-up if they agreed"


def test_a_run_that_was_not_known_is_an_error(model: SpectrModel, base: SharedForCausalLM) -> None:
    layer = base.model.layers[0].mlp.down_proj
    plan = model.plan([parse_router("spectr", model.library.names)], [[1, 2]])
    with routed(plan), torch.no_grad():
        for _ in range(2):
            layer(torch.ones(1, 2, 128))
        with pytest.raises(ValueError, match="down_proj runs more than 2 times in a pass"):
            layer(torch.ones(1, 2, 128))
