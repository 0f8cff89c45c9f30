"""The decoder of a base, also of the classes where transformers names another part."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    PretrainedConfig,
)

from spectr_demo.base.decoder import decoder_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 258,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Llama4TextConfig(**SIZES, head_dim=16, num_key_value_heads=2, num_local_experts=2),
        ModernBertDecoderConfig(**SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_the_decoder_gives_hidden_states(config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = decoder_of(model)
    modules = list(decoder.modules())
    assert any(module is model.get_input_embeddings() for module in modules)
    assert not any(module is model.get_output_embeddings() for module in modules)
    assert sum(isinstance(module, nn.Embedding) for module in modules) == 1
    with torch.no_grad():
        assert decoder(torch.arange(5)[None]).last_hidden_state.shape == (1, 5, 64)
