"""What a cell is compared with: the same base as transformers has it, and PEFT on it."""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

Run = tuple[str, int]  # a layer's path, and which of its runs in a pass
Decisions = Mapping[Run, NDArray[Any]]  # (T,) the expert of each token


def same_base(loaded: PreTrainedModel) -> PreTrainedModel:
    """The base as transformers makes it, with the weights of one that was loaded here. To load it
    in 4 bits rounds them, and makes ordinary linear layers of GPT-2's."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(loaded.config))
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in loaded.state_dict().items()
    }
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            weights[f"{path}.weight"] = weights[f"{path}.weight"].T
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


class Reference:
    """PEFT's model with all experts loaded."""

    def __init__(self, base: PreTrainedModel, folders: Sequence[str], names: Sequence[str]) -> None:
        self.names = list(names)
        peft = PeftModel.from_pretrained(base, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            peft.load_adapter(folder, adapter_name=name)
        self.model = peft.eval()
        self.layers = {
            path: layer
            for path, layer in peft.base_model.model.named_modules()
            if isinstance(layer, LoraLayer)
        }

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the model is the base with this expert, or the base alone."""
        if name is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name)
            yield

    @torch.no_grad()
    def logits(self, ids: Sequence[int], name: str | None) -> Tensor:
        """(T, V) of a text, all of it read at once."""
        with self.using(name):
            return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    @torch.no_grad()
    def answer(self, ids: Sequence[int], name: str | None, num_tokens: int) -> list[int]:
        """What follows, token by token, the likeliest one each time."""
        prompt = torch.tensor([list(ids)])
        settings = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=1, pad_token_id=1
        )
        with self.using(name):
            text = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=settings,
            )
        return list(text[0, len(ids) :].tolist())

    def spectr(self, ids: Sequence[int], told: Decisions) -> tuple[Tensor, Decisions]:
        """SpectR by its definition, with K = 1: each token takes in each layer the expert with the
        longest projection on the subspace that it reads.

        told: the experts to take where two are equally good. Returns the logits (T, V), and the
        experts that were taken.
        """
        taken: dict[Run, NDArray[Any]] = {}
        hooks = []
        for path, layer in self.layers.items():
            factors = [_update(layer, name) for name in self.names]
            hook = partial(_route, path=path, factors=factors, told=told, taken=taken)
            hooks.append(layer.register_forward_hook(hook))
        logits = self.logits(ids, None)
        for hook in hooks:
            hook.remove()
        return logits, taken


def _update(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Of an expert at a layer: the directions in which it reads (r, D_in), and all it adds
    (D_out, D_in)."""
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    update = layer.scaling[name] * (B @ A)
    _, size, directions = torch.linalg.svd(update.double(), full_matrices=False)
    return directions[size > 1e-6 * size[0]].float(), update


def _route(
    layer: nn.Module,
    args: tuple[Tensor],
    output: Tensor,
    *,
    path: str,
    factors: Sequence[tuple[Tensor, Tensor]],
    told: Decisions,
    taken: dict[Run, NDArray[Any]],
) -> Tensor:
    (x,) = args
    run = next(run for run in itertools.count() if (path, run) not in taken)
    scores = torch.stack([(x[0] @ directions.T).norm(dim=-1) for directions, _ in factors], -1)
    experts = scores.argmax(-1)
    if (path, run) in told:
        proposed = torch.from_numpy(told[path, run].astype(np.int64)).clamp(min=0)[:, None]
        is_as_good = scores.gather(-1, proposed) > 0.9999 * scores.amax(-1, keepdim=True)
        experts = torch.where(is_as_good, proposed, experts[:, None])[:, 0]
    taken[path, run] = experts.numpy()
    added = torch.stack([x[0] @ update.T for _, update in factors], -2)  # (T, E, D_out)
    return output + added.take_along_dim(experts[:, None, None], -2)[:, 0]
