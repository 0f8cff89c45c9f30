"""The base's linear layers on a CPU: the same products, sooner.

A token reads every weight of the base once, and does little else. Three things cost more than that:

- torch's product of a few tokens with a float32 matrix reads it at a third of the speed of memory
  on some CPUs (`TokenLinear`).
- bitsandbytes' product with packed 4-bit weights decodes them again for every few tokens, and does
  not use the matrix unit (AMX) that some CPUs have (`PromptLinear4bit`).
- What bitsandbytes and `nn.Module` do around a product takes as long as a small layer itself
  (`forward_of`).
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from spectr_demo.cpu import products

_MOST_TOKENS = 8  # of a `TokenLinear`'s compiled product
_FEWEST_TOKENS = 32  # from which on a `PromptLinear4bit` decodes its weights


class TokenLinear(nn.Linear):
    """An `nn.Linear` in float32 on a CPU whose product with a few tokens is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        is_few = 0 < x.numel() <= _MOST_TOKENS * self.in_features
        is_plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
        if not (is_few and is_plain) or torch.is_grad_enabled():
            return super().forward(x)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        products.multiply_in_threads(y, x.contiguous(), weight)
        return y if self.bias is None else y.add_(self.bias)


def make_token_linear_(model: PreTrainedModel) -> None:
    """Turn the linear layers of a float32 model on a CPU into such ones, where they are faster.

    Whether they are is measured: on the largest layer, for one token.
    """
    linear_layers = (module for module in model.modules() if type(module) is nn.Linear)
    layers = [layer for layer in linear_layers if layer.weight.is_contiguous()]
    if is_faster(max(layers, key=lambda layer: layer.weight.numel()).weight):
        for layer in layers:
            layer.__class__ = TokenLinear  # the same weights, shared ones as before


@torch.no_grad()
def is_faster(weight: Tensor) -> bool:
    """Whether compiled code multiplies one token by this matrix in less time than torch."""
    token, product = torch.ones(1, weight.shape[1]), torch.empty(1, weight.shape[0])
    ways = (
        lambda: products.multiply_in_threads(product, token, weight),
        lambda: linear(token, weight),
    )
    timers = [Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for f in ways]
    ours, of_torch = (min(timer.timeit(1).median for _ in range(3)) for timer in timers)
    return ours < of_torch


class PromptLinear4bit(bnb.nn.Linear4bit):
    """A `Linear4bit` whose packed weights are decoded for a product with many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        state = cast(bnb.nn.Params4bit, self.weight).quant_state
        is_packed = getattr(state, "packing_format_for_cpu", False) and x.is_cpu
        is_prompt = x.numel() >= self.fewest_values
        if not (is_packed and is_prompt) or x.dtype != torch.bfloat16 or x.requires_grad:
            return super().forward(x)
        weight = x.new_empty(*state.shape)
        products.expand_in_threads(weight, self.weight.data, state.absmax, state.code)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, weight, bias)

    @property
    def fewest_values(self) -> int:
        """Of an input from which on the weights are decoded."""
        return _FEWEST_TOKENS * self.in_features


def make_prompt_linear_(model: PreTrainedModel) -> None:
    """Turn the 4-bit layers of a model on a CPU into such ones, where that CPU has AMX."""
    if cpu_capabilities().get("amx_bf16"):
        for layer in model.modules():
            if type(layer) is bnb.nn.Linear4bit:
                layer.__class__ = PromptLinear4bit  # the same weights


def cpu_capabilities() -> Mapping[str, Any]:
    """Of `torch.cpu.get_capabilities`; none where this torch cannot tell, as 2.8 cannot."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities


def forward_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a base layer computes, without what surrounds it.

    `Module.__call__` is left out, and so are torch's hooks; accelerate's are in `forward`, and run.
    Of 4-bit weights that are packed for a CPU the kernel alone is called: bitsandbytes would find
    out each time which kernel that is.
    """
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    is_packed = getattr(state, "packing_format_for_cpu", False) and not hasattr(layer, "_hf_hook")
    if not is_packed or layer.bias is not None:
        return layer.forward
    kernel = torch.ops.bitsandbytes.gemv_4bit.default
    packed = weight.data, state.shape, state.absmax, state.code, state.blocksize
    if not isinstance(layer, PromptLinear4bit):
        return lambda x: kernel(x, *packed)
    many = layer.fewest_values
    return lambda x: kernel(x, *packed) if x.numel() < many else layer.forward(x)
