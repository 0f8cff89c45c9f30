"""Do adapters fit a base? One answer for all who ask, from the base's configuration alone."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PretrainedConfig
from transformers.core_model_loading import rename_source_key

from spectr_demo.experts.adapters import Adapter, LoraShape
from spectr_demo.experts.skeleton import (
    NUM_ROWS,
    NUM_TOKENS,
    Skeleton,
    linear_shape,
    skeleton_of,
)

# How transformers' classes of one language model name it: alone, with a head, beside other towers.
_WITHIN = re.compile(
    r"((model|language_model|text_model|transformer|decoder|backbone|thinker|llm)\.)*"
)


class Fitted(NamedTuple):
    """adapters: by the base's own names. problems: what keeps them from it, one line each."""

    adapters: list[Adapter]
    problems: list[str]


def fit_adapters(adapters: Sequence[Adapter], config: PretrainedConfig) -> Fitted:
    """These adapters for the base that has this configuration, and what does not fit.

    A layer that the base names otherwise is renamed. One that never runs when text is read is left
    out, which changes nothing. An adapter's notes say both.
    """
    skeleton = skeleton_of(config)
    fitted: list[Adapter] = []
    problems: list[str] = []
    fitting: set[int] = set()  # experts of a library on disk share the shapes of their layers
    for adapter in adapters:
        if id(adapter.shapes) in fitting:
            fitted.append(adapter)
            continue
        found = _fit(adapter, skeleton)
        fitted += found.adapters
        problems += found.problems
        if found.adapters[0] is adapter and not found.problems:
            fitting.add(id(adapter.shapes))
    for name, count in Counter(adapter.name for adapter in adapters).items():
        if count > 1:
            sources = ", ".join(a.source for a in adapters if a.name == name)
            problems.append(
                f"expert {name!r}: {count} adapters have this name ({sources}); give each its own, "
                "as NAME=SOURCE"
            )
    return Fitted(fitted, problems)


def _fit(adapter: Adapter, skeleton: Skeleton) -> Fitted:
    places = _places(adapter.shapes, skeleton)
    misfits: dict[str, list[str]] = defaultdict(list)
    idle = []
    for path, shape in adapter.shapes.items():
        place = places.get(path)
        if place is not None:
            misfit = _misfit(place, shape, skeleton, adapter)
            if misfit is None and skeleton.is_idle(place):
                idle.append(path)
        elif path in skeleton.modules:  # another name of a layer whose own has the factors too
            continue
        else:
            misfit = _missing(path, skeleton, adapter)
        if misfit:
            misfits[misfit.remedy].append(misfit.what)
    total = len(adapter.shapes)
    if not misfits and len(idle) == total:
        remedy = "it was trained on other parts than the language model"
        misfits[remedy] = [f"{path} does not run when text is read" for path in idle]
    problems = [
        f"expert {adapter.name!r}: {found[0]} ({len(found)} of its {total} layers); {remedy}"
        for remedy, found in misfits.items()
    ]
    notes = []
    if renamed := [(path, place) for path, place in places.items() if path != place]:
        old, new = renamed[0]
        notes.append(f"{len(renamed)} of its {total} layers have other names here ({old}: {new})")
    if idle:
        notes.append(
            f"{len(idle)} of its {total} layers do not run when text is read ({idle[0]}, ...); "
            "they are left out, which changes nothing"
        )
    kept = {path: place for path, place in places.items() if path not in idle}
    lines = [f"expert {adapter.name!r}: {note}" for note in notes]
    return Fitted([adapter.placed(kept, lines)], problems)


class _Misfit(NamedTuple):
    """What is wrong at one layer, and what to do. Layers with one remedy are one line."""

    what: str
    remedy: str


def _misfit(place: str, shape: LoraShape, skeleton: Skeleton, adapter: Adapter) -> _Misfit | None:
    """Why factors of this shape cannot be attached to the base's module at this path, if so."""
    layer = skeleton.modules[place]
    base_shape = linear_shape(layer)
    kind = None
    if layer is skeleton.model.get_output_embeddings():
        kind = "the output embedding"
    elif base_shape is None:
        kind = type(layer).__name__
    elif not skeleton.is_in_decoder(place) and not skeleton.is_idle(place):
        kind = "outside of the decoder"
    if kind or base_shape is None:
        return _Misfit(
            f"it targets {place} ({kind})", "only linear layers inside the decoder can be routed"
        )
    if (shape.D_in, shape.D_out) != base_shape:
        return _Misfit(
            f"{place} has {shape.D_in} inputs and {shape.D_out} outputs, the base has "
            f"{base_shape[0]} and {base_shape[1]}",
            _other_base(adapter),
        )
    for tensor in skeleton.inputs_of(place):
        if tensor.dim() != 3 or tensor.shape[:2] != (NUM_ROWS, NUM_TOKENS):
            return _Misfit(
                f"{place} gets input of shape {tuple(tensor.shape)} where {NUM_ROWS} rows of "
                f"{NUM_TOKENS} tokens are read, needed ({NUM_ROWS}, {NUM_TOKENS}, {shape.D_in})",
                "layers that flatten the batch, add an axis to it, or read other tokens cannot be "
                "routed: leave them out of the adapter's target modules",
            )
    return None


def _missing(path: str, skeleton: Skeleton, adapter: Adapter) -> _Misfit:
    """Why the base has no module at this path: what it has in the nearest place."""

    def depth_of(names: Sequence[str]) -> int:
        return max(i for i in range(len(names)) if ".".join(names[:i]) in skeleton.modules)

    names = max((c.split(".") for c in _candidates(path, skeleton)), key=depth_of)
    depth = depth_of(names)
    nearest, name = ".".join(names[:depth]), names[depth]
    is_stacked = any(p.dim() > 2 for p in skeleton.modules[nearest].parameters(recurse=False))
    if is_stacked:
        return _Misfit(
            f"{path} is not in the base",
            "it keeps the experts of a mixture in one stacked tensor, not in linear layers: leave "
            "them out of the adapter's target modules",
        )
    having = f"whose {nearest}" if nearest else "which"
    return _Misfit(f"{path} is not in the base, {having} has no {name!r}", _other_base(adapter))


def _other_base(adapter: Adapter) -> str:
    return f"it was trained on another base model ({adapter.base_model}), or on another class of it"


def _places(paths: Iterable[str], skeleton: Skeleton) -> dict[str, str]:
    """The base's path for each of an adapter's that has one there, under this name or another.

    Where two have one place, the one that has its own name there keeps it.
    """
    found = {}
    for path in paths:
        names = (name for name in _candidates(path, skeleton) if name in skeleton.modules)
        if name := next(names, None):
            found[path] = skeleton.first_path(name)
    counts = Counter(found.values())
    return {p: place for p, place in found.items() if place == p or counts[place] == 1}


def _candidates(path: str, skeleton: Skeleton) -> Iterator[str]:
    """What an adapter's layer may be called in the base, its own name first.

    A layer is renamed as transformers renames those of older checkpoints, and from one class of the
    same language model to another: `model.language_model.layers.0` is `model.layers.0`.
    """
    yield path
    transforms = skeleton.renamings
    renamed = rename_source_key(f"{path}.weight", transforms, [])[0].removesuffix(".weight")
    yield renamed
    for name in (renamed, path):
        parts = name.split(".")
        for i in range(len(parts)):
            if _WITHIN.fullmatch("".join(f"{part}." for part in parts[:i])):
                yield ".".join(filter(None, [skeleton.decoder, *parts[i:]]))
