"""Logits from hidden states are the model's own, whatever its head does."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3Config,
    GraniteConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    xLSTMConfig,
)

from spectr_demo.base.decoder import decoder_of
from spectr_demo.engine.head import logits_of

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
KEYS = {"num_key_value_heads": 2, "head_dim": 16}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "a scale": lambda: CohereConfig(**SIZES, logit_scale=0.3),
    "a divisor": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
    "a cap": lambda: Gemma2Config(**SIZES, **KEYS, final_logit_softcapping=0.5),
    "another cap": lambda: xLSTMConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_heads=2, output_logit_soft_cap=0.5
    ),
    "a multiplier": lambda: FalconH1Config(
        **SIZES, **KEYS, lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=2, mamba_d_state=8
    ),
    "layers before it": lambda: BertConfig(**SIZES, is_decoder=True),
    "other towers": lambda: Gemma3Config(
        text_config={**SIZES, **KEYS},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = 0.3 * torch.randn(weight.shape)
    ids = torch.arange(2, 9)[None]
    with torch.inference_mode():
        hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits
        assert_close(logits_of(model, hidden[0]), expected[0])


def test_the_model_stays_as_it_is(llama: LlamaForCausalLM) -> None:
    """Its own decoder runs for others, with its hooks."""
    seen: list[str] = []
    hook = llama.model.register_forward_pre_hook(lambda module, args: seen.append("decoder"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        expected = llama(ids).logits
        logits_of(llama, torch.zeros(5, 64))
        assert seen == ["decoder"]
        assert torch.equal(llama(ids).logits, expected)
    hook.remove()
