"""4-bit linear layers on a CPU with AMX, fast for prompts too.

bitsandbytes' product with packed 4-bit weights decodes them again for every few tokens, and knows
nothing of the matrix unit that such a CPU has. From some tokens on it is faster to decode them
once, to bfloat16, and to have torch multiply.
"""

from collections.abc import Mapping
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from spectr_demo.cpu import products

_FEWEST_TOKENS = 32


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
