"""A linear layer with experts attached: the untouched base layer, plus what a run's plan adds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectr_demo.cpu.kv_cache import grow_in_place_
from spectr_demo.cpu.linear import forward_of
from spectr_demo.engine.plan import Plan
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank

# A context variable, not a global: each thread sees the plan of its own run, or none.
_plan: ContextVar[Plan | None] = ContextVar("routing_plan", default=None)


@contextmanager
def routed(plan: Plan | None) -> Iterator[None]:
    """Inside, forward passes of this thread route by `plan`; None is the bare base model."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


class RoutedLinear(nn.Module):
    """`y = W x + delta(x)`; exactly `W x` where no plan is active or all its rows are base."""

    run_base: Callable[[Tensor], Tensor]

    def __init__(self, base_layer: nn.Module, bank: ExpertBank, place: int) -> None:
        """place: of this layer among those that share the bank."""
        super().__init__()
        self.base_layer = base_layer
        self.bank = bank  # plain tensors, shared with the library: nothing to train or to save
        self.place = place
        self.__dict__["run_base"] = forward_of(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.run_base(x)
        plan = _plan.get()
        if plan is None or plan.is_base_only:
            return y
        if x.dim() != 3:
            raise ValueError(
                f"{self.bank.paths[self.place]} gets input of shape {tuple(x.shape)}, needed "
                f"(rows, tokens, {x.shape[-1]}); layers that flatten the batch cannot be routed: "
                "leave them out of the adapters' target modules"
            )
        return plan.add(y, self.bank, self.place, x)


def attach_(model: nn.Module, library: ExpertLibrary) -> None:
    """Wrap every layer that some expert touches. No weight of the model is changed or copied.

    Raises ValueError, and wraps nothing, where experts are attached already.
    """
    attached = [path for path, module in model.named_modules() if isinstance(module, RoutedLinear)]
    if attached:
        raise ValueError(
            f"the base has experts attached already, at {len(attached)} layers ({attached[0]}, "
            "...); a base without any was needed: call `detach()` of the model that has them, or "
            "load the base again"
        )
    for bank in library.banks:
        for place, path in enumerate(bank.paths):
            parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            setattr(parent, name, RoutedLinear(model.get_submodule(path), bank, place))


def detach_(model: nn.Module) -> None:
    """Put the base layers back: the model is then the one that was loaded."""
    for path, module in list(model.named_modules()):
        if isinstance(module, RoutedLinear):
            parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            setattr(parent, name, module.base_layer)


def follow(model: PreTrainedModel) -> list[Any]:
    """Three hooks. One begins a pass of the run's plan, and has its cache grow in place on a CPU.
    One ends the pass. One hands the output embedding a contiguous input, for speed."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = _plan.get()
        if plan is None:
            return
        input_ids = _input_ids(args, kwargs)
        plan.begin_pass(input_ids)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and input_ids.is_cpu and not torch.is_grad_enabled():
            grow_in_place_(cache)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        plan = _plan.get()
        if plan is not None:
            plan.end_pass(output.last_hidden_state)

    def before_head(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # Of a prompt only the last token comes here, as a slice. Because of its strides torch would
        # copy the whole embedding, once for each row.
        return (args[0].clone(memory_format=torch.contiguous_format),)

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    return [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after),
        head.register_forward_pre_hook(before_head),
    ]


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a decoder is about to read: (R, T) token ids, -1 where it was given embeddings."""
    input_ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is not None:
        return input_ids
    embeddings: Tensor = kwargs["inputs_embeds"]
    return torch.full(embeddings.shape[:2], -1, device=embeddings.device)
