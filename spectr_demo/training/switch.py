"""A LoRA that is off on some tokens while the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def adapter_on(model: torch.nn.Module, is_on: Tensor) -> Iterator[None]:
    """Within this, a PEFT model's LoRA adds nothing to a layer's output on tokens that are off.

    is_on: (R, T) bool, one for each token that the model is given.
    """
    # peft takes seconds to import.
    from peft.tuners.lora import LoraLayer

    def switched(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        weight = is_on.to(output.device, output.dtype)
        return output * weight.reshape(*output.shape[:-1], 1)

    handles = [
        lora_a.register_forward_hook(switched)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for lora_a in layer.lora_A.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
