"""A base without its weights tells what its layers read, and is made once."""

import copy
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    XLMConfig,
)

from spectr_demo.engine.model import load
from spectr_demo.experts import skeleton
from spectr_demo.experts.skeleton import NUM_ROWS, NUM_TOKENS, skeleton_of


def test_what_layers_read(llama: LlamaForCausalLM) -> None:
    base = skeleton_of(llama.config)
    q, k, o = (base.inputs_of(f"model.layers.1.self_attn.{p}_proj") for p in "qko")
    assert [t.shape for t in (*q, *o)] == [(NUM_ROWS, NUM_TOKENS, 64)] * 2
    assert q[0] is k[0]
    assert q[0] is not o[0]
    assert base.decoder == "model"
    assert not base.is_idle("model.layers.1.self_attn.q_proj")
    assert not base.is_in_decoder("lm_head")


@pytest.mark.parametrize(
    ("config", "path", "shape"),
    [
        (GPT2Config(n_layer=1), "transformer.h.0.attn.c_attn", (2, 3, 768)),
        (OPTConfig(num_hidden_layers=1), "model.decoder.layers.0.fc1", (6, 768)),
        (
            DeepseekV3Config(num_hidden_layers=1),
            "model.layers.0.self_attn.kv_b_proj",
            (2, 1, 3, 512),
        ),
        (MixtralConfig(num_hidden_layers=1), "model.layers.0.self_attn.o_proj", (2, 3, 4096)),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_of_other_architectures(
    config: PreTrainedConfig, path: str, shape: tuple[int, ...]
) -> None:
    (found,) = skeleton_of(config).inputs_of(path)
    assert found.shape == shape


def test_a_tower_beside_the_language_model_is_idle() -> None:
    config = Gemma3Config()
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    base = skeleton_of(config)
    assert base.is_idle("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not base.is_idle("model.language_model.layers.0.self_attn.q_proj")
    assert base.decoder == "model.language_model"


def test_where_a_base_cannot_be_run_nothing_is_known_and_a_warning_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = skeleton_of(XLMConfig(n_layers=1, is_decoder=True))
    assert base.inputs is None
    assert not base.is_idle("transformer.attentions.0.q_lin")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("XLMWithLMHeadModel cannot be run without its weights (")
    assert "Error: " in record.getMessage(), "the reason is named"


def test_a_configuration_is_left_as_it_is(llama: LlamaForCausalLM) -> None:
    config = copy.deepcopy(llama.config)
    config.dtype = torch.bfloat16
    before = config.to_dict()
    skeleton_of(config)
    assert config.to_dict() == before


def test_loading_makes_one_for_the_base_and_its_experts(
    base_folder: str, expert_folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton._skeleton_of.cache_clear()
    made = []
    from_config = AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_config",
        lambda *args, **settings: made.append(args) or from_config(*args, **settings),
    )
    load(base_folder, expert_folders)
    assert len(made) == 1
