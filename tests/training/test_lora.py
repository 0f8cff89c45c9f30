"""On which layers a LoRA sits, and a LoRA that is off on some tokens."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from spectr_demo.training.lora import adapter_on, inner_linears, with_lora
from spectr_demo.training.recipe import Recipe
from tests.conftest import PROJECTIONS, tiny_llama

IS_ON = torch.tensor([[True, False, True, True], [False, False, True, False]])


def lora_llama() -> nn.Module:
    config = LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    return get_peft_model(tiny_llama(100), config)


def test_a_layer_gives_the_bases_output_where_it_is_off() -> None:
    model = lora_llama()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * len(PROJECTIONS)
    for layer in layers:
        x = torch.randn(2, 4, layer.in_features)
        with_lora, base = layer(x), layer.get_base_layer()(x)
        with adapter_on(model, IS_ON):
            out = layer(x)
        assert torch.equal(out[~IS_ON], base[~IS_ON])
        assert torch.equal(out[IS_ON], with_lora[IS_ON])
        assert (with_lora - base).abs().amax(-1).min() > 0
        assert torch.equal(layer(x), with_lora)  # afterwards


@pytest.mark.parametrize("is_on", [True, False])
def test_a_model_is_the_adapters_or_the_base(is_on: bool) -> None:
    model = lora_llama()
    ids = torch.randint(100, (2, 4))
    with model.disable_adapter():
        base = model(ids).logits
    expected = model(ids).logits if is_on else base
    with adapter_on(model, torch.full((2, 4), is_on)):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, base)


def test_tokens_that_are_off_teach_nothing() -> None:
    model = lora_llama()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))

    def gradients(is_on: Tensor) -> list[Tensor]:
        model.zero_grad()
        with adapter_on(model, is_on):
            layer(torch.ones(2, 4, layer.in_features)).sum().backward()
        return [p.grad for p in layer.parameters() if p.grad is not None]

    assert all(g.abs().max() == 0 for g in gradients(torch.zeros(2, 4, dtype=torch.bool)))
    assert all(g.abs().max() > 0 for g in gradients(IS_ON))


def test_layers_that_read_tokens_as_one_list_are_switched_too() -> None:
    model = lora_llama()
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    x = torch.randn(8, layer.in_features)
    with adapter_on(model, IS_ON):
        out = layer(x)
    assert torch.equal(out[~IS_ON.flatten()], layer.get_base_layer()(x)[~IS_ON.flatten()])


def test_it_is_on_again_after_an_error() -> None:
    model = lora_llama()
    ids = torch.randint(100, (2, 4))
    before = model(ids).logits
    with pytest.raises(KeyError), adapter_on(model, torch.zeros(2, 4, dtype=torch.bool)):
        raise KeyError
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LlamaConfig, set(PROJECTIONS)),
        (GPTNeoXConfig, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        # Its experts are no linear layers: a LoRA on them could not be routed.
        (Qwen3MoeConfig, {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_every_linear_layer_of_any_base_is_trained(
    config: type[PreTrainedConfig], targets: set[str]
) -> None:
    base = AutoModelForCausalLM.from_config(
        config(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    paths = set(inner_linears(base))
    assert {path.rpartition(".")[2] for path in paths} == targets
    model = with_lora(base, Recipe(seed=0))
    adapted = {n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert adapted == paths
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    ids = torch.randint(100, (1, 4))
    with model.disable_adapter():
        expected = model(ids).logits
    with adapter_on(model, torch.zeros(1, 4, dtype=torch.bool)):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected)
