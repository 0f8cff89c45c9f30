"""Each field of PEFT's `LoraConfig`: an adapter that has it gives PEFT's logits, or is refused."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, MontecloraConfig, PeftModel, VeloraConfig
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from spectr_demo.experts.adapters import CONFIG_FILE, Adapter, AdapterError, read_adapter
from spectr_demo.experts.fields import CHANGES_NOTHING, HONOURED, REFUSED
from tests.conftest import SaveExpert, tiny_llama

NewLlama = Callable[[], LlamaForCausalLM]
IDS = torch.tensor([[5, 17, 42, 101, 7]])


@pytest.fixture
def new_llama(tokenizer: PreTrainedTokenizerFast) -> NewLlama:
    """The same base each time."""
    return partial(tiny_llama, len(tokenizer))


def spoil(folder: str, **changes: object) -> str:
    path = Path(folder) / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@torch.no_grad()
def merged_logits(model: LlamaForCausalLM, adapter: Adapter) -> Tensor:
    """Of the base with what was read of the adapter added to its weights."""
    for path, factors in adapter.read().items():
        delta = factors.scaling * factors.lora_B.float() @ factors.lora_A.float()
        model.get_submodule(path).weight += delta
    return model(IDS).logits


@torch.no_grad()
def peft_logits(model: LlamaForCausalLM, folder: str) -> Tensor:
    return PeftModel.from_pretrained(model, folder).eval()(IDS).logits


def assert_as_in_peft(folder: str, model: NewLlama) -> None:
    theirs = peft_logits(model(), folder)
    assert (theirs - model()(IDS).logits).abs().max() > 0.1, "the adapter does something"
    assert_close(merged_logits(model(), read_adapter(folder)), theirs, atol=1e-4, rtol=0)


def test_every_field_has_its_place() -> None:
    tables = (CHANGES_NOTHING, HONOURED, REFUSED)
    known = [field for table in tables for field in table]
    assert len(known) == len(set(known)), "in one table only"
    assert set(known) == {field.name for field in dataclasses.fields(LoraConfig)}


ACCEPTED: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.5},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 32},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "all but some": {"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "biases of layers without": {"bias": "all"},
    "untied": {"ensure_weight_tying": True},
    "VeLoRA": {"velora_config": VeloraConfig(num_groups=8)},
    "MonteCLoRA": {"monteclora_config": MontecloraConfig(num_samples=2, buffer_size=2)},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no initialisation": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "MiCA": {"init_lora_weights": "mica"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_accepted_gives_the_logits_of_peft(
    config: Mapping[str, Any], save_expert: SaveExpert, new_llama: NewLlama
) -> None:
    assert_as_in_peft(save_expert("expert", seed=3, **config), new_llama)


WRITTEN: dict[str, Any] = {  # into the configuration of a sound adapter
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "init_lora_weights": "pissa_niter_16",
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "megatron_config": {"hidden_size": 64},
    "modules_to_save": ["lm_head"],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [3, 4],
    "use_bdlora": {"nblocks": 2},
    "use_dora": True,
    "use_qalora": True,
}


def test_what_is_refused_is_tested() -> None:
    assert WRITTEN.keys() == REFUSED.keys()


@pytest.mark.parametrize("field", WRITTEN)
def test_what_is_refused_is_named(field: str, save_expert: SaveExpert, tmp_path: Path) -> None:
    folder = spoil(save_expert("expert", folder=tmp_path), **{field: WRITTEN[field]})
    with pytest.raises(AdapterError, match=r"^expert 'expert': it uses .*not supported") as caught:
        read_adapter(folder)
    (problem,) = caught.value.problems
    assert f"{field}={WRITTEN[field]!r}" in problem
    assert REFUSED[field][0] in problem


@pytest.mark.parametrize(
    "init",
    ["pissa", "PiSSA", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"],
)
def test_an_initialisation_that_needs_other_base_weights_is_refused(
    init: str, save_expert: SaveExpert, tmp_path: Path
) -> None:
    folder = spoil(save_expert("expert", folder=tmp_path), init_lora_weights=init)
    with pytest.raises(AdapterError, match="changes the base's own weights"):
        read_adapter(folder)


@pytest.mark.parametrize("unset", [None, False, "", [], {}])
def test_a_field_that_is_not_known_is_refused_where_it_is_set(
    unset: object, save_expert: SaveExpert, tmp_path: Path
) -> None:
    folder = save_expert("expert", folder=tmp_path)
    spoil(folder, use_newest_lora=unset)
    assert len(read_adapter(folder).shapes) == 14
    for is_set in (True, 0, 1.5, "x", [0], {"a": None}):
        spoil(folder, use_newest_lora=is_set)
        with pytest.raises(AdapterError, match=r"not known here .use_newest_lora="):
            read_adapter(folder)


def test_layers_that_peft_would_leave_out_are_said(save_expert: SaveExpert, tmp_path: Path) -> None:
    folder = spoil(save_expert("expert", folder=tmp_path), layers_to_transform=[1])
    with pytest.raises(AdapterError, match=r"layers.0.* is not among .* .as 7 layers do.; PEFT"):
        read_adapter(folder)
    spoil(folder, layers_to_transform=None, target_modules="all-linear")
    assert len(read_adapter(folder).shapes) == 14
    spoil(folder, target_modules=r".*\.layers\.\d+\.(self_attn|mlp)\..*_proj")
    assert len(read_adapter(folder).shapes) == 14


@pytest.mark.parametrize(
    "values",
    [
        {"r": "4"},
        {"lora_alpha": None},
        {"alpha_pattern": {"q_proj": "8"}},
        {"target_modules": None},
    ],
)
def test_a_value_of_another_kind_is_said(
    values: Mapping[str, Any], save_expert: SaveExpert, tmp_path: Path
) -> None:
    folder = spoil(save_expert("expert", folder=tmp_path), **values)
    with pytest.raises(AdapterError, match=r"PEFT refuses its adapter_config\.json"):
        read_adapter(folder)
