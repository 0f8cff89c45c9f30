"""Layers that read one input are found from the model itself."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaForCausalLM,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from spectr_demo.experts.shared_inputs import shared_inputs


def linear_layers(model: PreTrainedModel) -> list[str]:
    return [path for path, layer in model.get_decoder().named_modules() if type(layer) is nn.Linear]


def test_attention_and_feed_forward_layers_share(llama: LlamaForCausalLM) -> None:
    paths = [f"model.{path}" for path in linear_layers(llama)]
    groups = shared_inputs(llama, list(reversed(paths)))
    names = [[path.rpartition(".")[2] for path in group] for group in groups]
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == layer * llama.config.num_hidden_layers, "in the order in which they run"
    assert sorted(path for group in groups for path in group) == sorted(paths)


def test_only_the_layers_asked_for(llama: LlamaForCausalLM) -> None:
    q, v = (f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj"))
    assert shared_inputs(llama, [q, v]) == [(q, v)]


def on_meta(config: PreTrainedConfig) -> tuple[PreTrainedModel, list[str]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    paths = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return model, [path for path in paths if "lm_head" not in path]


def test_attention_and_feed_forward_side_by_side_share_their_input() -> None:
    groups = shared_inputs(*on_meta(FalconConfig(num_hidden_layers=1)))
    names = [[path.rpartition(".")[2] for path in group] for group in groups]
    assert names == [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]]


def test_a_model_that_cannot_be_looked_at_has_a_group_for_each_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, paths = on_meta(OPTConfig(num_hidden_layers=1))  # takes no mask with four axes
    assert shared_inputs(model, paths) == [(path,) for path in paths]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("OPTForCausalLM cannot be read without its weights (")
    assert record.exc_info is None
    assert "Error: " in record.getMessage(), "the reason is named"


def test_a_model_that_can_be_looked_at_is_not_warned_about(
    llama: LlamaForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    shared_inputs(llama, ["model.layers.1.self_attn.q_proj"])
    assert caplog.records == []
