"""Experts as they are in banks: one by one, and those that a library on disk has stacked before."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.spectr import Aligned


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a library on disk knows of ordinary text, for the engine to read.

    base: of whom, see `engine.ordinary.identity`. prompts: the ordinary ones. read: the tensors of
        a bank, by its place among the library's; None where its layers never run. Raises ValueError
        for a file that was changed.
    """

    base: str
    prompts: tuple[str, ...]
    read: Callable[[int], Mapping[str, Tensor] | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A library on disk that is open: `experts/packed.py` reads it.

    banks: of all its experts, mapped from their files. measured: None where nothing was.
    """

    folder: Path
    num_experts: int
    banks: tuple[ExpertBank, ...]
    measured: Measured | None


class PackedPlace(NamedTuple):
    """Where an expert's aligned factors are: its number in a library on disk."""

    library: Packed
    expert: int


# By layer: its bank, its place in it, and the places of the experts by their numbers.
Where = Mapping[str, tuple[ExpertBank, int, Mapping[int, int]]]


def where_in(banks: Iterable[ExpertBank]) -> Where:
    """Where each layer's factors are."""
    found: dict[str, tuple[ExpertBank, int, Mapping[int, int]]] = {}
    places: dict[Tensor, dict[int, int]] = {}  # by the very tensor: many banks may share it
    for bank in banks:
        ids = bank.expert_ids
        if bank.run == 0:  # the others have the same factors
            if ids not in places:
                places[ids] = {e: place for place, e in enumerate(ids.tolist())}
            found |= {path: (bank, p, places[ids]) for p, path in enumerate(bank.paths)}
    return found


class Stacked(Mapping[str, Aligned]):
    """An expert's factors by layer, as they are in the banks."""

    def __init__(self, expert: int, ranks: Mapping[str, int], where: Where) -> None:
        """ranks: by layer."""
        self._expert, self._ranks, self._where = expert, ranks, where

    def __getitem__(self, path: str) -> Aligned:
        rank = self._ranks[path]
        bank, place, experts = self._where[path]
        return bank.factors(experts[self._expert], place, rank)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)
