"""A base's logits from hidden states that were read before: `logits_of`."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from spectr_demo.base.decoder import decoder_of
from spectr_demo.base.memory import execution_device


class _Read(BaseModelOutputWithPast):
    """What a decoder gives, but for the hidden states nothing."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(T, V) from the decoder's last hidden states (T, D), whatever the model makes of them: layers
    before its output embedding, scales, caps.

    The model's own `forward` runs, in a copy of it that shares all weights, and whose decoder gives
    these states. So the model stays as it is for runs in other threads.
    """
    read = _Read(last_hidden_state=hidden[None])
    decoder = decoder_of(model)
    path = next(path for path, module in model.named_modules() if module is decoder)
    shell: Any = _shell(model)
    parent = shell
    *parents, last = path.split(".")
    for name in parents:
        child = _shell(parent._modules[name])
        parent._modules[name] = child
        parent = child
    given = _shell(decoder)
    given._forward_pre_hooks, given._forward_hooks = {}, {}
    given.forward = lambda *args, **kwargs: read
    parent._modules[last] = given
    device = execution_device(model.get_input_embeddings())
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=device)
    logits: Tensor = shell(input_ids=ids, use_cache=False).logits
    return logits[0]


def _shell(module: nn.Module) -> nn.Module:
    """A copy with the same submodules. It has none of accelerate's hooks, which run the original;
    those of its submodules stay."""
    shell = copy.copy(module)
    shell.__dict__["_modules"] = dict(module._modules)
    shell.__dict__.pop("forward", None)
    return shell
