"""Packed 4-bit weights, decoded for prompts: against bitsandbytes' values and its own kernel."""

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16, quantize_4bit
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close

from spectr_demo.cpu import products, threads
from spectr_demo.cpu.linear import PromptLinear4bit, forward_of, make_prompt_linear_

needs_kernel = pytest.mark.skipif(
    not has_avx512bf16(), reason="bitsandbytes multiplies by packed weights with AVX512-BF16 only"
)
LARGE = (192, 320)


def packed_layer(
    D_out: int, D_in: int, *, bias: bool = False, kind: str = "nf4"
) -> tuple[PromptLinear4bit, Tensor]:
    """A layer as bitsandbytes packs it for a CPU; and the values that its kernel multiplies by."""
    torch.manual_seed(0)
    values = torch.randn(D_out, D_in)
    layer = PromptLinear4bit(D_in, D_out, bias=bias, compute_dtype=torch.bfloat16, quant_type=kind)
    layer.load_state_dict({"weight": values, **({"bias": torch.randn(D_out)} if bias else {})})
    layer = layer.to("cpu").eval().requires_grad_(False)
    numbers, state = quantize_4bit(values, blocksize=64, quant_type=kind)
    halves = torch.stack([numbers >> 4, numbers & 15], dim=-1).view(-1, 64).long()
    rounded = state.code.bfloat16().float()[halves] * state.absmax.bfloat16().float()[:, None]
    weight: Any = layer.weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(numbers, state)
    return layer, rounded.bfloat16().view(D_out, D_in)


@pytest.fixture
def nothing_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "expand_in_threads", pytest.fail)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("sizes", [(32, 64), (64, 128), LARGE], ids=str)
def test_values_are_those_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int], kind: str, num_threads: int
) -> None:
    if threads.START:
        monkeypatch.setattr(threads, "num_threads", lambda: num_threads)
    layer, expected = packed_layer(*sizes, kind=kind)
    weight: Any = layer.weight
    values = torch.full(sizes, torch.nan, dtype=torch.bfloat16)
    state = weight.quant_state
    products.expand_in_threads(values, weight.data, state.absmax, state.code)
    assert torch.equal(values, expected)
    assert values.unique().numel() > 16


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (4, 9), (40,), (2, 3, 8)], ids=str)
def test_a_prompt_is_a_product_with_them(shape: tuple[int, ...], bias: bool) -> None:
    layer, values = packed_layer(*LARGE, bias=bias)
    x = torch.randn(*shape, LARGE[1]).bfloat16()
    expected = linear(x, values, layer.bias.bfloat16() if bias else None)
    assert torch.equal(layer(x), expected)
    assert torch.equal(forward_of(layer)(x), expected)


@needs_kernel
@torch.no_grad()
def test_a_prompt_reads_as_its_tokens_do() -> None:
    layer, _ = packed_layer(*LARGE)
    x = torch.randn(1, 32, LARGE[1]).bfloat16()
    tokens = torch.cat([layer(x[:, t : t + 1]) for t in range(32)], dim=1)
    assert_close(layer(x), tokens, atol=0.2, rtol=2**-7)  # of outputs around 18
    alone = forward_of(layer)
    assert torch.equal(torch.cat([alone(x[:, t : t + 1]) for t in range(32)], dim=1), tokens)


@needs_kernel
@pytest.mark.usefixtures("nothing_is_decoded")
@pytest.mark.parametrize("shape", [(1, 31), (4, 1)], ids=str)
@torch.no_grad()
def test_few_tokens_are_the_kernels(shape: tuple[int, ...]) -> None:
    layer, values = packed_layer(*LARGE)
    x = torch.randn(*shape, LARGE[1]).bfloat16()
    for product in (layer, forward_of(layer)):
        assert_close(product(x), linear(x, values), atol=0.2, rtol=2**-7)


@pytest.mark.usefixtures("nothing_is_decoded")
def test_other_layers_are_bitsandbytes_own() -> None:
    """Before the first evaluation weights are not packed; nor are they in training."""
    layer = PromptLinear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(32, 64)})
    layer = layer.to("cpu").train()
    x = torch.randn(1, 40, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("has_amx", [False, True, None], ids=["without", "with", "unknown"])
def test_it_is_for_cpus_with_amx(monkeypatch: pytest.MonkeyPatch, has_amx: bool | None) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx}, raising=False)
    if has_amx is None:  # torch 2.8
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    layers = [bnb.nn.Linear4bit(64, 32), torch.nn.Linear(64, 32), bnb.nn.LinearFP4(64, 32)]
    model: Any = torch.nn.Sequential(*layers)
    weights = [layer.weight for layer in layers]
    make_prompt_linear_(model)
    assert isinstance(model[0], PromptLinear4bit) == bool(has_amx)
    assert [type(layer) for layer in model[1:]] == [torch.nn.Linear, bnb.nn.LinearFP4]
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
