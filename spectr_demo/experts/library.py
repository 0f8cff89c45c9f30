"""Experts: adapters that are aligned, stacked, and ready to route between.

An *adapter* is the file; an *expert* is what is routed to. A library is made only if every adapter
is sound. All that is wrong with all of them is one error.
"""

import logging
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from spectr_demo.base.files import keeping, kept
from spectr_demo.base.memory import available_memory, execution_device
from spectr_demo.config import cache_dir, unknown_name
from spectr_demo.cpu.pages import keep_freed_memory, zeros_in_large_pages, zeros_on_disk
from spectr_demo.experts.adapters import (
    Adapter,
    AdapterError,
    adapters_in,
    named_source,
    read_adapter,
)
from spectr_demo.experts.fit import Fitted, fit_adapters
from spectr_demo.experts.messages import first
from spectr_demo.experts.packed import packed_adapters
from spectr_demo.experts.shared_inputs import shared_inputs
from spectr_demo.experts.stacked import Packed, Stacked, where_in
from spectr_demo.routing.bank import ExpertBank, Zeros
from spectr_demo.routing.spectr import Aligned, align

logger = logging.getLogger(__name__)

_ALIGNMENT_VERSION = 4  # part of the cache key: raise it when `align` changes its result
# The largest singular value of an update that is taken. Float16 holds no larger number, and trained
# updates have some 1e4 times smaller ones.
MOST_SINGULAR_VALUE = torch.finfo(torch.float16).max
# A library's share of the free memory on a CPU: up to which it is kept in float32, and up to which
# it is kept in memory at all.
FLOAT32_SHARE, MEMORY_SHARE = 0.25, 0.5
# All of a path that stands before its last name, to which a number belongs (`projections.0`).
_BEFORE_LAST = re.compile(r".*\.(?=[^.]*[^.\d][^.]*(?:\.\d+)*$)")


def align_adapter(adapter: Adapter) -> dict[str, Aligned]:
    """Spectral alignment of every layer, by its path.

    An adapter with the very same files that was aligned before is read from the cache. One that
    lasts is kept there. A cache that cannot be written costs time at each start, not the run. A
    warning says so. Raises AdapterError for updates that are too large to compute with.
    """
    cached = cache_dir() / "aligned" / f"{adapter.sha256}-v{_ALIGNMENT_VERSION}.safetensors"
    if file := kept(cached):
        with safe_open(file, "pt") as found:
            return {
                path: Aligned(found.get_tensor(f"{path}.A"), found.get_tensor(f"{path}.B").mT)
                for path in adapter.shapes
            }
    aligned = align_in_groups(adapter)
    if not adapter.is_lasting:
        return aligned
    tensors = {}
    for path, factors in aligned.items():  # B transposed, as it is in memory here and in the banks
        tensors[f"{path}.A"] = factors.A.contiguous()
        tensors[f"{path}.B"] = factors.B.mT.contiguous()
    try:
        with keeping(cached) as unfinished:
            save_file(tensors, unfinished)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"expert {adapter.name!r}: its alignment could not be cached in {cached.parent} "
            f"({error}); it is computed at each start. Set SPECTR_CACHE to a writable folder",
            stacklevel=2,
        )
    return aligned


def align_in_groups(adapter: Adapter) -> dict[str, Aligned]:
    """Spectral alignment of every layer, by its path; layers of one shape are one batch.

    Raises AdapterError for updates that are too large to compute with.
    """
    keep_freed_memory()
    groups = defaultdict(list)
    for path, shape in adapter.shapes.items():
        groups[shape].append(path)
    aligned, factors = {}, adapter.read()
    too_large: list[str] = []
    for paths in groups.values():
        layers = [factors[path] for path in paths]
        try:
            stacked = align(
                torch.stack([layer.lora_A for layer in layers]),
                torch.stack([layer.lora_B for layer in layers]),
                torch.tensor([layer.scaling for layer in layers]),
            )
        except torch.linalg.LinAlgError:
            too_large += paths
            continue
        is_sound = stacked.A.isfinite().all(-1).all(-1)
        is_sound &= stacked.singular_values.amax(-1) <= MOST_SINGULAR_VALUE  # NaN is not
        for path, A, B, sound in zip(paths, stacked.A, stacked.B, is_sound.tolist(), strict=True):
            aligned[path] = Aligned(A, B)
            if not sound:
                too_large.append(path)
    if too_large:
        found = [f"its update of {path} is too large to compute with" for path in too_large]
        raise AdapterError(
            [
                f"expert {adapter.name!r}: {first(found, 'layers')}; singular values up to "
                f"{MOST_SINGULAR_VALUE:,.0f} were needed: train it again, or lower its lora_alpha"
            ]
        )
    return aligned


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLibrary:
    """The experts that are loaded, aligned and stacked by layer, ready to attach to their base."""

    adapters: tuple[Adapter, ...]
    aligned: tuple[Mapping[str, Aligned], ...] = field(repr=False)
    banks: tuple[ExpertBank, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    @cached_property
    def num_layers(self) -> int:
        return 1 + max((layer for bank in self.banks for layer in bank.layers), default=-1)

    @cached_property
    def projections(self) -> tuple[str, ...]:
        """Names for people, such as `q_proj`."""
        return _short_names(list(self._projections))

    @cached_property
    def _projections(self) -> dict[str, int]:
        """The place of each, by what banks call it."""
        names = dict.fromkeys(name for bank in self.banks for name in bank.projections)
        return {name: place for place, name in enumerate(names)}

    def places(self, bank: ExpertBank) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Layers and projections (P,) of a bank, as places in arrays with these two axes."""
        projections = [self._projections[name] for name in bank.projections]
        return np.array(bank.layers), np.array(projections)

    def index(self, name: str) -> int:
        if name not in self.names:
            raise unknown_name("expert", name, self.names)
        return self.names.index(name)

    @classmethod
    def from_adapters(cls, adapters: Sequence[Adapter], model: PreTrainedModel) -> "ExpertLibrary":
        """Check all adapters against the base, then align and stack them, one after another.

        On a GPU factors are in the model's own dtype. On a CPU they are float32, in which small
        products are fastest. A library that would take too much of the memory so is kept in 16
        bits. If that is too much too, it is mapped from a file in the cache. All experts of a
        library on disk stay mapped from its files.
        Raises AdapterError with everything that does not fit.
        """
        adapters, problems = fit_adapters(adapters, model.config)
        if problems:
            raise AdapterError(problems)
        rooms = rooms_for(adapters, model)
        banks = _packed_banks(adapters, rooms) or _filled_banks(adapters, rooms, model.dtype)
        where = where_in(banks)
        ranks = {
            id(adapter.shapes): {path: shape.rank for path, shape in adapter.shapes.items()}
            for adapter in {id(adapter.shapes): adapter for adapter in adapters}.values()
        }
        return cls(
            adapters=tuple(adapters),
            aligned=tuple(Stacked(e, ranks[id(a.shapes)], where) for e, a in enumerate(adapters)),
            banks=tuple(banks),
        )


class Room(NamedTuple):
    """What a bank has to hold. shapes: (D_out, D_in) of each layer; num_runs: see `Group`."""

    paths: tuple[str, ...]
    experts: tuple[int, ...]
    rank: int
    shapes: tuple[tuple[int, int], ...]
    device: torch.device
    num_runs: int


def rooms_for(adapters: Sequence[Adapter], model: PreTrainedModel) -> list[Room]:
    """The banks that these experts need on a model, in the order in which its layers run."""
    modules = dict(model.named_modules())
    layouts = {id(adapter.shapes): adapter.shapes for adapter in adapters}
    of_layout: dict[int, list[int]] = defaultdict(list)
    for e, adapter in enumerate(adapters):
        of_layout[id(adapter.shapes)].append(e)
    touched = {path for shapes in layouts.values() for path in shapes}
    experts: dict[tuple[int, ...], tuple[int, ...]] = {}  # by their layouts
    rooms = []
    for group in shared_inputs(model, [path for path in modules if path in touched]):
        together: dict[Any, list[str]] = defaultdict(list)
        for path in group.paths:
            having = tuple(layout for layout, shapes in layouts.items() if path in shapes)
            together[having, execution_device(modules[path])].append(path)
        for (having, device), paths in together.items():
            if having not in experts:
                experts[having] = tuple(sorted(e for each in having for e in of_layout[each]))
            rooms.append(
                Room(
                    paths=tuple(paths),
                    experts=experts[having],
                    rank=max(layouts[layout][path].rank for layout in having for path in paths),
                    shapes=tuple(layouts[having[0]][path][:2] for path in paths),
                    device=device,
                    num_runs=group.num_runs,
                )
            )
    return rooms


def _packed_banks(adapters: Sequence[Adapter], rooms: Sequence[Room]) -> list[ExpertBank] | None:
    """The banks of a library on disk as they are mapped, where these are its experts, all of them
    and in its order, on a CPU; else None."""
    places = [adapter.packed for adapter in adapters]
    library = places[0].library if places and places[0] else None
    if library is None or places != [(library, e) for e in range(library.num_experts)]:
        return None
    if any(room.device.type != "cpu" for room in rooms):
        return None
    needed = [(room.paths, list(room.experts), r) for room in rooms for r in range(room.num_runs)]
    found = [(bank.paths, bank.expert_ids.tolist(), bank.run) for bank in library.banks]
    return list(library.banks) if found == needed else None


def _filled_banks(
    adapters: Sequence[Adapter], rooms: Sequence[Room], dtype: torch.dtype
) -> list[ExpertBank]:
    """Banks in memory that hold these experts. dtype: in which the base computes."""
    of_cpu, zeros = storage(adapters, dtype)
    banks = [
        ExpertBank.empty(
            room.paths,
            room.experts,
            room.rank,
            room.shapes,
            device=room.device,
            dtype=of_cpu if room.device.type == "cpu" else dtype,
            zeros=zeros if room.device.type == "cpu" else torch.zeros,
        )
        for room in rooms
    ]
    fill_(banks, adapters)
    return [
        replace(bank, run=run) if run else bank
        for bank, room in zip(banks, rooms, strict=True)
        for run in range(room.num_runs)
    ]


def fill_(banks: Sequence[ExpertBank], adapters: Sequence[Adapter]) -> None:
    """Write experts into empty banks: aligned one after another, or copied where a library on disk
    has them aligned. Raises AdapterError for updates that are too large to compute with."""
    places = [{e: i for i, e in enumerate(bank.expert_ids.tolist())} for bank in banks]
    packed: dict[Packed, dict[int, int]] = defaultdict(dict)  # numbers here by those there
    too_large: list[str] = []
    for e, adapter in enumerate(tqdm(adapters, "aligning", disable=len(adapters) < 50)):
        if adapter.packed:
            packed[adapter.packed.library][e] = adapter.packed.expert
            continue
        try:
            aligned = align_adapter(adapter)
        except AdapterError as error:
            too_large += error.problems
            continue
        for bank, place in zip(banks, places, strict=True):
            if e in place:
                bank.put_(place[e], [aligned[path] for path in bank.paths])
    if too_large:
        raise AdapterError(too_large)
    for library, numbers in packed.items():
        for bank, place in zip(banks, places, strict=True):
            _copy_packed_(bank, place, library, numbers)


def _copy_packed_(
    bank: ExpertBank, place: Mapping[int, int], library: Packed, numbers: Mapping[int, int]
) -> None:
    """Copy a library's experts into a bank. place: by an expert's number here, its place in the
    bank. numbers: by its number here, that in the library."""
    for other in library.banks:
        if other.run or not set(bank.paths) & set(other.paths):
            continue
        place_there = {e: i for i, e in enumerate(other.expert_ids.tolist())}
        both = [e for e in numbers if e in place and numbers[e] in place_there]
        here = torch.tensor([place[e] for e in both], dtype=torch.long)
        there = torch.tensor([place_there[numbers[e]] for e in both], dtype=torch.long)
        bank.copy_(here, other, there)


def _short_names(projections: Sequence[str]) -> tuple[str, ...]:
    """Names for people of what banks call `model.layers.*.mlp.c_proj`: `c_proj` where only one has
    that name, else the path inside the layer (`mlp.c_proj`), else the whole."""
    paths = [name.partition(" ")[0] for name in projections]
    inside = {path: path.rpartition(".*.")[2] for path in paths}
    last = {path: _BEFORE_LAST.sub("", name) for path, name in inside.items()}
    ways = [(names, Counter(names.values())) for names in (last, inside)]
    return tuple(
        next((names[path] for names, num in ways if num[names[path]] == 1), path)
        + name.removeprefix(path)  # such as " (run 2)"
        for path, name in zip(paths, projections, strict=True)
    )


def storage(adapters: Sequence[Adapter], dtype: torch.dtype) -> tuple[torch.dtype, Zeros]:
    """How factors are kept on a CPU: their dtype, and what makes their tensors.

    dtype: in which the base computes.
    """
    layers = [shape for adapter in adapters for shape in adapter.shapes.values()]
    num_values = sum(shape.rank * (shape.D_in + shape.D_out) for shape in layers)
    free = available_memory()
    is_16_bit = dtype == torch.bfloat16
    if not is_16_bit and num_values * torch.float32.itemsize <= FLOAT32_SHARE * free:
        return torch.float32, zeros_in_large_pages
    if num_values * torch.bfloat16.itemsize <= MEMORY_SHARE * free:
        return torch.bfloat16, zeros_in_large_pages

    def zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return zeros_on_disk(shape, dtype, cache_dir() / "banks")

    return torch.bfloat16, zeros


# One source or several: folders of one adapter or of several, libraries on disk, or Hub ids;
# `NAME=SOURCE` to rename.
Sources = str | Path | Sequence[str | Path]


def read_adapters(sources: Sources, config: PretrainedConfig) -> Fitted:
    """Adapters for the base that has this configuration, and all that is wrong with them."""
    listed = [sources] if isinstance(sources, str | Path) else sources
    adapters: list[Adapter] = []
    problems: list[str] = []

    def misfits_of(adapter: Adapter) -> list[str]:
        return fit_adapters([adapter], config).problems

    for source in (each for one in listed for each in adapters_in(one)):
        name, path = named_source(source)
        try:
            packed = packed_adapters(path, name, misfits_of)
            adapters += [read_adapter(path, name, misfits_of)] if packed is None else packed
        except AdapterError as error:
            problems += error.problems
    fitted, misfits = fit_adapters(adapters, config)
    for adapter in fitted:
        for note in adapter.notes:
            logger.warning(note)
    return Fitted(fitted, problems + misfits)


def load_experts(sources: Sources, model: PreTrainedModel) -> ExpertLibrary:
    """Read, check, align and stack adapters.

    Raises one AdapterError that lists everything wrong with all of them.
    """
    adapters, problems = read_adapters(sources, model.config)
    if problems:
        raise AdapterError(problems)
    return ExpertLibrary.from_adapters(adapters, model)
