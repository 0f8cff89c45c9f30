"""Routing of one token: a compiled loop where torch would make a chain of calls.

One token needs little arithmetic. Between the base's products each call of torch costs some
microseconds whatever it computes (docs/log.md). These functions do for one token what
`engine/plan.py` does in torch for any number, to rounding. Both ways are tested against each other.

Axes: R rows, P projections of a bank, E experts, K selected, F kept by a filter, G rows of one
router, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.cpu.choice import Choices, Chosen, Rule, choose, scored
from spectr_demo.cpu.filter import Arrows, keep, project_chosen
from spectr_demo.cpu.numbers import (
    DTYPES,
    Floats,
    Ids,
    Stored,
    add_values_at,
    as_float,
    ask_for,
    compiled,
    floats_at,
    pointer,
    stored,
)
from spectr_demo.cpu.products import ROWS_AHEAD, Team, share

MOST_ROWS = 32  # in whose tokens compiled code mixes experts; a batch takes no more


def can_route(x: Tensor, y: Tensor) -> bool:
    """Whether x (R, T, D_in) and y (R, T, D_out), on a CPU, are one token for each of a few rows:
    for many, torch's threads and matrix products pay."""
    is_token = x.shape[1] == 1 and x.shape[0] <= MOST_ROWS
    is_plain = x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype
    return is_token and is_plain and x.dtype in DTYPES


class Factors(NamedTuple):
    """A bank's memory as these functions read it: A, B of each layer, singular values."""

    A: Stored
    B: tuple[Stored, ...]
    singular_values: Floats

    @classmethod
    def of(cls, A: Tensor, B: Sequence[Tensor], singular_values: Tensor) -> "Factors | None":
        """None for tensors of another dtype, or of a GPU."""
        if A.device.type != "cpu" or A.dtype not in DTYPES:
            return None
        return cls(stored(A), tuple(map(stored, B)), singular_values.numpy())


@compiled
def project(z: Floats, x: int, is_bfloat16: bool, A: Stored, team: Team) -> None:
    """`z = A* x` of all experts: z (R, P, E, r), x (R, 1, D_in), A (P * E * r, D_in)."""
    (N, D), R = A.shape, len(z)
    tokens = floats_at(x, is_bfloat16, R, D)
    share(z.reshape(R, N), tokens, A.ctypes.data, A.itemsize, 0, N, team)


@compiled
def add_(
    y: int,
    is_bfloat16: bool,
    z: Floats,
    weights: Floats,
    is_merged: NDArray[np.bool_],
    kept: Ids | None,
    B: Stored,
    place: int,
) -> None:
    """`y += sum_e w_e B*_e z_e` at one layer, in place; with `sum_e w_e z_e` for each z_e in the
    rows that are merged. y: address of (R, 1, D_out), z (R, P, E, r), weights (R, P, E), B
    (E * r, D_out). kept (R, P, E): places in the bank of those that z has, None for all of it."""
    R, _, E, r = z.shape
    merged, delta = np.empty(r, np.float32), np.empty(B.shape[1], np.float32)
    num_bytes = B.shape[1] * B.itemsize
    for row in range(R):
        delta[:] = 0
        if is_merged[row]:
            merged[:] = 0
            for e in range(E):
                for i in range(r):
                    merged[i] += weights[row, place, e] * z[row, place, e, i]
        for e in range(E):
            weight = weights[row, place, e]
            if weight == 0:
                continue
            start = r * (e if kept is None else kept[row, place, e])
            for i in range(r):
                value = weight * (merged[i] if is_merged[row] else z[row, place, e, i])
                factors = B[start + i]
                ask_for(B[min(start + i + ROWS_AHEAD, len(B) - 1)].ctypes.data, num_bytes)
                for d in range(len(delta)):
                    delta[d] += value * as_float(factors[d])
        add_values_at(y, is_bfloat16, row, delta)


# In the midst of a token numba takes 23 us to find out what a dozen arrays are. What stays the same
# from token to token is therefore handed over once: a record of addresses, sizes and settings.
_ADDRESSES = ("z", "weights", "is_merged", "kept", "singular_values", "mean", "std", "rows")
_WRITTEN = ("places", "chosen_weights", "scores", "num")
_SIZES = ("R", "P", "E", "F", "r", "G", "K", "N", "measure", "num_kept")
RECORD = np.dtype(
    [(name, np.int64) for name in (*_ADDRESSES, *_WRITTEN, *_SIZES, *Team._fields)]
    + [("temperature", np.float64)]
)
Record = NDArray[Any]  # (1,) of `RECORD`


def bind(
    z: Floats,
    weights: Floats,
    is_merged: NDArray[np.bool_],
    kept: Ids | None,
    singular_values: Floats,
    rule: Rule | None = None,
    rows: Ids | None = None,
) -> Record:
    """A record of these arrays, which somebody must keep, for one token in each row: z (R, P, F, r)
    and weights (R, P, F) are written; kept (R, P, F) too, None where F is E.

    rule: of the router that serves these rows (G,), and has choices then too (`bind_choices`).
    """
    record = np.zeros(1, RECORD)
    arrays: dict[str, Any] = {"z": z, "weights": weights, "is_merged": is_merged, "kept": kept}
    record["R"], record["F"] = z.shape[0], z.shape[2]
    record["P"], record["E"], record["r"] = singular_values.shape
    if rule is not None and rows is not None:
        arrays |= {"singular_values": singular_values, "rows": rows}
        arrays |= {"mean": rule.mean, "std": rule.std}
        record["G"], record["measure"], record["num_kept"] = len(rows), rule.measure, rule.num_kept
        record["temperature"] = rule.temperature
    for name, array in arrays.items():
        if array is not None:
            record[name] = _address(array)
    for name, value in Team.of_torch()._asdict().items():
        record[name] = value
    return record


def bind_choices(record: Record, choices: Choices) -> None:
    """Have the next tokens' choices written here: where there is no room left, from the start."""
    arrays: list[Any] = [choices.places, choices.weights, choices.scores, choices.num]
    for name, array in zip(_WRITTEN, arrays, strict=True):
        record[name] = _address(array)
    record["N"], record["K"] = len(choices.places), choices.places.shape[3]


def _address(array: NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} is not contiguous; copy it first")
    return int(array.ctypes.data)


@compiled
def _bound(record: Any) -> tuple[Floats, Floats, NDArray[np.bool_], Ids, Team]:
    """z, weights, is_merged, kept (empty where there is none) and the team of a record."""
    R, P, F = record.R, record.P, record.F
    z = numba.carray(pointer(record.z), (R, P, F, record.r), np.float32)
    weights = numba.carray(pointer(record.weights), (R, P, F), np.float32)
    is_merged = numba.carray(pointer(record.is_merged), R, np.bool_)
    kept = numba.carray(pointer(record.kept), (R, P, F if record.kept else 0), np.int64)
    return z, weights, is_merged, kept, Team(record.start, record.work, record.size)


@compiled
def _choose(record: Any, z: Floats, weights: Floats, kept: Ids) -> None:
    """The choice of the record's router from z (R, P, F, r), and what it makes of the weights."""
    P, E, G, K, N = record.P, record.E, record.G, record.K, record.N
    S = numba.carray(pointer(record.singular_values), (P, E, record.r), np.float32)
    mean = numba.carray(pointer(record.mean), (P, E), np.float32)
    std = numba.carray(pointer(record.std), (P, E), np.float32)
    rows = numba.carray(pointer(record.rows), G, np.int64)
    rule = Rule(record.measure, record.num_kept, mean, std, record.temperature)
    num = numba.carray(pointer(record.num), 1, np.int64)
    token = num[0] % N
    num[0] += 1
    chosen = Chosen(
        numba.carray(pointer(record.places), (N, G, P, K), np.int64)[token],
        numba.carray(pointer(record.chosen_weights), (N, G, P, K), np.float32)[token],
        numba.carray(pointer(record.scores), (N, G, P, K), np.float32)[token],
    )
    choose(chosen, weights, rows, scored(z, rows, S, rule), rule)
    if kept.shape[2] > 0:
        for g in range(G):
            for p in range(P):
                for k in range(K):
                    chosen.places[g, p, k] = kept[rows[g], p, chosen.places[g, p, k]]


@compiled
def route_and_add_at(
    records: Record,
    y: int,
    x: int,
    is_bfloat16: bool,
    A: Stored,
    arrows: Arrows | None,
    B: Stored,
    is_first: bool,
    is_last: bool,
) -> None:
    """All of a bank's first layer, for the rows of one router: what `bind` was given is written,
    and y (R, 1, D_out) changes in place.

    Of several routers, each has a record with the same z and weights: the first one projects, the
    last one adds. arrows: where given, one router serves all rows, and only the experts that its
    filter keeps are projected on.
    """
    record = records[0]
    z, weights, is_merged, kept, team = _bound(record)
    E, r = record.E, record.r
    if arrows is not None:
        keep(kept, x, is_bfloat16, A, arrows, r, team)
        project_chosen(z, x, is_bfloat16, A, kept, E, team)
    elif is_first:
        project(z, x, is_bfloat16, A, team)
    _choose(record, z, weights, kept)
    if arrows is not None:
        add_(y, is_bfloat16, z, weights, is_merged, kept, B, 0)
    elif is_last:
        add_(y, is_bfloat16, z, weights, is_merged, None, B, 0)


@compiled
def project_and_add_at(
    records: Record, y: int, x: int, is_bfloat16: bool, A: Stored, B: Stored
) -> None:
    """All of a bank's first layer, where the weights are given."""
    record = records[0]
    z, weights, is_merged, _, team = _bound(record)
    project(z, x, is_bfloat16, A, team)
    add_(y, is_bfloat16, z, weights, is_merged, None, B, 0)


@compiled
def add_at(records: Record, y: int, is_bfloat16: bool, B: Stored, place: int) -> None:
    """`add_` with a record of `bind`."""
    record = records[0]
    z, weights, is_merged, kept, _ = _bound(record)
    if kept.shape[2] == 0:
        add_(y, is_bfloat16, z, weights, is_merged, None, B, place)
    else:
        add_(y, is_bfloat16, z, weights, is_merged, kept, B, place)
