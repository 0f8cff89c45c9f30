"""A linear layer with experts attached: the untouched base layer, plus what a run's plan adds."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spectr_demo.base.decoder import decoder_of
from spectr_demo.cpu.kv_cache import grow_in_place_
from spectr_demo.cpu.linear import forward_of
from spectr_demo.engine.plan import BaseLayer, Place, Places, Plan
from spectr_demo.experts.library import ExpertLibrary


class _Running:
    """A plan, and how often each layer has run in the pass that goes on."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.places = plan.places
        self.num_runs: Counter[nn.Module] = Counter()


# A context variable, not a global: each thread sees the plan of its own run, or none.
_running: ContextVar[_Running | None] = ContextVar("routing_plan", default=None)


@contextmanager
def routed(plan: Plan | None) -> Iterator[None]:
    """Inside, forward passes of this thread route by `plan`; None is the bare base model."""
    token = _running.set(None if plan is None else _Running(plan))
    try:
        yield
    finally:
        _running.reset(token)


class RoutedLinear(nn.Module):
    """`y = W x + delta(x)`; exactly `W x` where no plan is active, all its rows are base, or its
    library does not touch the layer."""

    run_base: BaseLayer

    def __init__(self, base_layer: nn.Module, path: str, places: Sequence[Place] = ()) -> None:
        """places: one for each time that the layer runs in a pass, under plans that have none of
        their own."""
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.places = places  # plain tensors, shared with the library: nothing to train or to save
        self.__dict__["run_base"] = forward_of(base_layer)

    def forward(self, x: Tensor) -> Tensor:
        running = _running.get()
        if running is None or running.plan.is_base_only:
            return self.run_base(x)
        places = self.places if running.places is None else running.places.get(self.path)
        if not places:
            return self.run_base(x)
        if x.dim() != 3:
            raise ValueError(
                f"{self.path} gets input of shape {tuple(x.shape)}, needed (rows, tokens, "
                f"{x.shape[-1]}); layers that flatten the batch cannot be routed: leave them out "
                "of the adapters' target modules"
            )
        bank, number, bases = places[0] if len(places) == 1 else self._place_now(running, places)
        if x.shape[1] == 1 and running.plan.is_static(x.device):
            return running.plan.read_token(bank, number, bases, x)
        return running.plan.add(self.run_base(x), bank, number, x)

    def __getattr__(self, name: str) -> Any:
        """Some models ask their linear layers for more than a product, such as `weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def _place_now(self, running: "_Running", places: Sequence[Place]) -> Place:
        """Of the run that this is in its pass."""
        run = running.num_runs[self]
        running.num_runs[self] += 1
        if run == len(places):
            raise ValueError(
                f"{self.path} runs more than {run} times in a pass, and {run} were known; such a "
                "layer cannot be routed: leave it out of the adapters' target modules"
            )
        return places[run]


def attach_(model: nn.Module, library: ExpertLibrary) -> None:
    """Put a library's experts on a model that has none. No weight is changed or copied.

    Raises ValueError, and wraps nothing, where experts are attached already.
    """
    attached = [path for path, module in model.named_modules() if isinstance(module, RoutedLinear)]
    if attached:
        raise ValueError(
            f"the base has experts attached already, at {len(attached)} layers ({attached[0]}, "
            "...); a base without any was needed: call `detach()` of the model that has them, or "
            "load the base again"
        )
    use_(model, wrap_(model, library))


def wrap_(model: nn.Module, library: ExpertLibrary) -> Places:
    """Wrap every layer that some expert touches, once, and tell the places of these experts.

    Runs of other libraries may go on meanwhile: a layer that theirs does not touch stays the base
    alone for them. So it does for all plans that have no places of their own, until `use_`.
    """
    paths = dict.fromkeys(path for bank in library.banks for path in bank.paths)
    layers = {path: model.get_submodule(path) for path in paths}
    wrapped = {
        path: layer if isinstance(layer, RoutedLinear) else RoutedLinear(layer, path)
        for path, layer in layers.items()
    }
    _replace_(
        model,
        {layer: wrapped[path] for path, layer in layers.items() if layer is not wrapped[path]},
    )
    places: dict[str, list[Place]] = defaultdict(list)
    for bank in library.banks:
        bases = tuple(wrapped[path].run_base for path in bank.paths)
        for number, path in enumerate(bank.paths):
            places[path].append(Place(bank, number, bases))
    return dict(places)


def use_(model: nn.Module, places: Places) -> None:
    """Have plans that have no places of their own use these."""
    for layer in _routed_layers(model):
        layer.places = places.get(layer.path, ())


def detach_(model: nn.Module) -> None:
    """Put the base layers back: the model is then the one that was loaded."""
    _replace_(model, {layer: layer.base_layer for layer in _routed_layers(model)})


def _routed_layers(model: nn.Module) -> list[RoutedLinear]:
    return [module for module in model.modules() if isinstance(module, RoutedLinear)]


def _replace_(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the places of some, under every name by which they are reached."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[module])


def follow(model: PreTrainedModel) -> list[Any]:
    """Three hooks. One begins a pass of the run's plan, and has its cache grow in place on a CPU.
    One ends the pass. One hands the output embedding a contiguous input, for speed."""

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        running = _running.get()
        if running is None:
            return args, kwargs
        running.num_runs.clear()
        input_ids = _input_ids(args, kwargs)
        running.plan.begin_pass(input_ids)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and input_ids.is_cpu and not torch.is_grad_enabled():
            grow_in_place_(cache)
        if running.plan.needs_all_tokens and "logits_to_keep" in kwargs:
            # By it Gemma 4 leaves a prompt's tokens but the last out of its upper layers.
            kwargs = {**kwargs, "logits_to_keep": 0}
        return args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running = _running.get()
        if running is not None:
            running.plan.end_pass(output.last_hidden_state)

    def before_head(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # Of a prompt only the last token comes here, as a slice. Because of its strides torch would
        # on a CPU copy the whole embedding, once for each row.
        if not args[0].is_cpu:
            return args
        return (args[0].clone(memory_format=torch.contiguous_format),)

    decoder, head = decoder_of(model), model.get_output_embeddings()
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
