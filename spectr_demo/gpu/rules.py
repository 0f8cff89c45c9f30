"""How each row of a batch scores and weighs the experts of a bank, as the GPU reads it.

Axes: R rows, P projections of a bank, E experts of the bank, K selected.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectr_demo.routing.routers import Measure

MEASURES: dict[Measure, int] = {"length": 0, "first": 1, "output": 2}
CONSTANT = -1
FlatRules = Sequence[Any]  # `Rules.flat`


class Rule(NamedTuple):
    """How one row does it, in plain values. The defaults are those of a row with constant weights.

    measure: what of z its score is; None for a row that does not score. top_k: of a row that
    scores, at least 1. filter: only so many experts are scored, those with the longest first entry;
    None is all. temperature: of the softmax of its scores; 0 is 1/K each. is_merged: composition
    `parameters`.
    """

    measure: Measure | None = None
    top_k: int = 0
    filter: int | None = None
    temperature: float = 0.0
    is_merged: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Rules:
    """The same of all rows, on one device, made once for a bank and a plan.

    measure: (R,) int32, a value of `MEASURES`, or `CONSTANT`. top_k, filter: (R,) int32, at most E.
    temperature: (R,) float32. is_merged: (R,) int32. mean, std: (R, P, E) float32, by which scores
    are standardised, 0 and 1 in rows that are not; None where none is. constant: (R, P, E) float32,
    weights of the rows that do not score; None where all of them are 0. most: the largest top_k,
    K_max; 0 where no row scores.
    """

    measure: Tensor
    top_k: Tensor
    filter: Tensor
    temperature: Tensor
    is_merged: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    constant: Tensor | None = None
    most: int

    @classmethod
    def of(
        cls,
        rows: Sequence[Rule],
        num_experts: int,
        *,
        device: torch.device | str,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        constant: Tensor | None = None,
    ) -> "Rules":
        """num_experts: E, of the bank; a row's top_k and filter are no more. mean, std, constant:
        on the device."""

        def column(values: Sequence[float], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        top_k = [min(row.top_k, num_experts) if row.measure else 0 for row in rows]
        return cls(
            measure=column([MEASURES[row.measure] if row.measure else CONSTANT for row in rows]),
            top_k=column(top_k),
            filter=column([min(row.filter or num_experts, num_experts) for row in rows]),
            temperature=column([row.temperature for row in rows], torch.float32),
            is_merged=column([row.is_merged for row in rows]),
            mean=mean,
            std=std,
            constant=constant,
            most=max(top_k),
        )

    @property
    def num_rows(self) -> int:
        return len(self.measure)

    @cached_property
    def flat(self) -> tuple[Any, ...]:
        """The fields in their order, as operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @classmethod
    def from_flat(cls, flat: FlatRules) -> "Rules":
        return cls(**dict(zip((field.name for field in fields(cls)), flat, strict=True)))
