"""Layers that read one input are found from the model itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    HrmTextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from spectr_demo.experts import shared_inputs as module
from spectr_demo.experts.shared_inputs import Group, shared_inputs
from spectr_demo.experts.skeleton import skeleton_of


def linear_layers(model: PreTrainedModel) -> list[str]:
    return [path for path, layer in model.get_decoder().named_modules() if type(layer) is nn.Linear]


def test_attention_and_feed_forward_layers_share(llama: LlamaForCausalLM) -> None:
    paths = [f"model.{path}" for path in linear_layers(llama)]
    groups = shared_inputs(llama, list(reversed(paths)))
    names = [[path.rpartition(".")[2] for path in group.paths] for group in groups]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == layer * llama.config.num_hidden_layers, "in the order in which they run"
    assert sorted(path for group in groups for path in group.paths) == sorted(paths)
    assert {group.num_runs for group in groups} == {1}


def test_only_the_layers_asked_for(llama: LlamaForCausalLM) -> None:
    q, v = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj"))
    assert shared_inputs(llama, [q, v]) == [Group((q, v), 1)]


def on_meta(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    paths = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return model, [path for path in paths if "lm_head" not in path]


def test_attention_and_feed_forward_side_by_side_share_their_input() -> None:
    groups = shared_inputs(*on_meta(FalconConfig(num_hidden_layers=1)))
    names = [[path.rpartition(".")[2] for path in group.paths] for group in groups]
    assert names == [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]


def test_a_model_that_cannot_be_looked_at_has_a_group_for_each_layer(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [f"model.{path}" for path in linear_layers(llama)]
    unknown = replace(skeleton_of(llama.config), inputs=None)
    monkeypatch.setattr(module, "skeleton_of", lambda config: unknown)
    assert shared_inputs(llama, paths) == [Group((path,), 1) for path in paths]


def test_a_layer_that_runs_twice_shares_with_those_that_run_as_often() -> None:
    """HRM's upper layers run in 2 cycles, the lower ones in 3 for each of them."""
    config = HrmTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, H_cycles=2, L_cycles=3,
    )  # fmt: skip
    groups = shared_inputs(*on_meta(config))
    attention = ["q_proj", "k_proj", "v_proj", "gate_proj"]
    found = {tuple(path.rpartition(".")[2] for path in group.paths) for group in groups}
    assert tuple(attention) in found
    num_runs = {path: group.num_runs for group in groups for path in group.paths}
    assert {num for path, num in num_runs.items() if "L_module" in path} == {6}
    assert {num for path, num in num_runs.items() if "H_module" in path} == {2}
