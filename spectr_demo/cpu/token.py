"""One token on a CPU: a compiled loop where torch would make a chain of calls.

One token needs little arithmetic, but between the base's products each call of torch costs 10 to
40 us whatever it computes (docs/performance.md). These functions do for one token what `routing`,
`pooling` and `bank` do for any number in torch, to rounding; both ways are tested against each
other. `multiply` is what all products with a few tokens come down to, the base's too where torch is
slower (`token_linear`). Axes: R rows, P projections of a bank, E experts, K selected, r rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.cpu.filter import Arrows, best, keep, project_chosen
from spectr_demo.cpu.numbers import (
    _DTYPES,
    Floats,
    Ids,
    Stored,
    _add_at,
    _as_float,
    _ask_for,
    _compiled,
    _floats_at,
    _pointer,
    stored,
)
from spectr_demo.cpu.products import _ROWS_AHEAD, Team, _share

_MOST_ROWS = 8
LENGTH, FIRST, OUTPUT = 0, 1, 2  # what a score measures: z, its first entry, S z


def can_route(x: Tensor, y: Tensor) -> bool:
    """Whether x (R, T, D_in) and y (R, T, D_out), on a CPU, are one token for each of a few rows:
    for many, torch's threads and matrix products pay."""
    is_token = x.shape[1] == 1 and x.shape[0] <= _MOST_ROWS
    is_plain = x.is_contiguous() and y.is_contiguous() and x.dtype == y.dtype
    return is_token and is_plain and x.dtype in _DTYPES


class Factors(NamedTuple):
    """A bank's memory as these functions read it: A, B of each layer, singular values."""

    A: Stored
    B: tuple[Stored, ...]
    singular_values: Floats

    @classmethod
    def of(cls, A: Tensor, B: Sequence[Tensor], singular_values: Tensor) -> "Factors | None":
        """None for tensors of another dtype, or of a GPU."""
        if A.device.type != "cpu" or A.dtype not in _DTYPES:
            return None
        return cls(stored(A), tuple(map(stored, B)), singular_values.numpy())


@_compiled
def project(z: Floats, x: int, is_bfloat16: bool, A: Stored, team: Team) -> None:
    """`z = A* x` of all experts: z (R, P, E, r), x (R, 1, D_in), A (P * E * r, D_in)."""
    (N, D), R = A.shape, len(z)
    tokens = _floats_at(x, is_bfloat16, R, D)
    _share(z.reshape(R, N), tokens, A.ctypes.data, A.itemsize, 0, N, team)


class Rule(NamedTuple):
    """How a router scores and chooses at a bank.

    measure: LENGTH, FIRST or OUTPUT. num_kept: of the experts with the longest first entry; the
    others have no score. mean, std (P, E): by which scores are standardised. temperature (of a
    softmax; 0 is 1/K each) and least (the best score must exceed it): see `routing.select`.
    """

    measure: int
    num_kept: int
    mean: Floats
    std: Floats
    temperature: float
    least: float


@_compiled
def scored(z: Floats, rows: Ids, singular_values: Floats, rule: Rule) -> Floats:
    """(G, P, E) scores of some rows (G,) of z (R, P, E, r); -inf for experts that are not kept."""
    G, (_, P, E, r) = len(rows), z.shape
    scores, lengths = np.empty((G, P, E), np.float32), np.empty(E, np.float32)
    for g in range(G):
        row = rows[g]
        for p in range(P):
            for e in range(E):
                squares = np.float32(0)
                for i in range(1 if rule.measure == FIRST else r):
                    value = z[row, p, e, i]
                    if rule.measure == OUTPUT:
                        value *= singular_values[p, e, i]
                    squares += value * value
                scores[g, p, e] = (np.sqrt(squares) - rule.mean[p, e]) / rule.std[p, e]
            if rule.num_kept < E:
                for e in range(E):
                    lengths[e] = abs(z[row, p, e, 0])
                for e in best(lengths, rule.num_kept):
                    lengths[e] = -1
                for e in range(E):
                    if lengths[e] >= 0:
                        scores[g, p, e] = -np.inf
    return scores


class Pool(NamedTuple):
    """The state of an `EvidencePool` that a bank's layers read and change.

    keeps (R,): what the tokens before still count: the decay, or 0 where a line ends. counts (R,):
    0 for a token that says nothing, else 1. token_weight (R,), first_weight (R, all experts): of
    the tokens, and of the first reading. total (R, all experts): of the layers so far.
    sums (R, P, E): of the bank. weights (P,), layers (P, E): of each layer, and up to it. is_lead:
    evidence less the experts' mean, see `pooling.lead`.
    """

    keeps: Floats
    counts: Floats
    token_weight: Floats
    first_weight: Floats
    total: Floats
    sums: Floats
    weights: Floats
    layers: Floats
    expert_ids: Ids
    is_lead: bool


@_compiled
def pooled(scores: Floats, pool: Pool) -> Floats:
    """(R, P, E) evidence from scores (R, P, E), as `EvidencePool.add` describes it; the pool's
    total and sums are changed in place."""
    R, P, E = scores.shape
    evidence = np.empty((R, P, E), np.float32)
    for row in range(R):
        for p in range(P):
            highest = scores[row, p].max()
            spoken = pool.counts[row] * max(highest, np.float32(0))
            for e in range(E):
                value = pool.keeps[row] * pool.sums[row, p, e]
                if scores[row, p, e] == highest:
                    value += spoken
                pool.sums[row, p, e] = value
                expert = pool.expert_ids[e]
                pool.total[row, expert] += pool.weights[p] * value
                weight = pool.token_weight[row] * pool.layers[p, e] + pool.first_weight[row, expert]
                evidence[row, p, e] = pool.total[row, expert] / weight
            if pool.is_lead and E > 1:
                mean = evidence[row, p].sum() / np.float32(E)
                for e in range(E):
                    evidence[row, p, e] -= mean
    return evidence


class Chosen(NamedTuple):
    """What a router chose for one token: places in the bank, weights and scores of K experts,
    (G, P, K) each."""

    places: Ids
    weights: Floats
    scores: Floats


class Choices(NamedTuple):
    """Memory for what a router chooses for N tokens, one after another: as `Chosen`, (N, G, P, K)
    each, and how many tokens there have been, (1,)."""

    places: Ids
    weights: Floats
    scores: Floats
    num: Ids

    @classmethod
    def empty(cls, num_tokens: int, num_rows: int, num_layers: int, num_chosen: int) -> "Choices":
        shape = num_tokens, num_rows, num_layers, num_chosen
        values = np.empty((2, *shape), np.float32)
        return cls(np.empty(shape, np.int64), values[0], values[1], np.zeros(1, np.int64))

    @property
    def is_full(self) -> bool:
        return bool(self.num[0] == len(self.places))


@_compiled
def choose(chosen: Chosen, weights: Floats, rows: Ids, scores: Floats, rule: Rule) -> None:
    """The K experts with the best scores (G, P, E), and the weights of all experts in these rows
    (G,) of weights (R, P, E)."""
    G, P, K = chosen.places.shape
    for g in range(G):
        for p in range(P):
            top, some, of_all = chosen.scores[g, p], chosen.weights[g, p], weights[rows[g], p]
            places = best(scores[g, p], K)
            sum_of_weights = np.float32(0)
            for k in range(K):
                chosen.places[g, p, k], top[k] = places[k], scores[g, p, places[k]]
                weight = np.float32(1)
                if rule.temperature > 0:
                    weight = np.exp((top[k] - top[0]) / np.float32(rule.temperature))
                some[k] = weight
                sum_of_weights += weight
            is_any = top[0] > rule.least
            of_all[:] = 0
            for k in range(K):
                some[k] = some[k] / sum_of_weights if is_any else np.float32(0)
                of_all[places[k]] = some[k]


@_compiled
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
                _ask_for(B[min(start + i + _ROWS_AHEAD, len(B) - 1)].ctypes.data, num_bytes)
                for d in range(len(delta)):
                    delta[d] += value * _as_float(factors[d])
        _add_at(y, is_bfloat16, row, delta)


# In the midst of a token numba takes 23 us to find out what a dozen arrays are. What stays the same
# from token to token is therefore handed over once, as the numbers of a record: twelve addresses;
# R, P, E, F, r, G, K and N; four numbers of the rule; the team.
_CHOICES, _SIZES, _RULE, _TEAM, _RECORD = 8, 12, 20, 24, 27


def bind(
    z: Floats,
    weights: Floats,
    is_merged: NDArray[np.bool_],
    kept: Ids | None,
    singular_values: Floats,
    rule: Rule | None = None,
    rows: Ids | None = None,
) -> Ids:
    """A record of these arrays, which somebody must keep, for one token in each row: z (R, P, F, r)
    and weights (R, P, F) are written; kept (R, P, F) too, None where F is E.

    rule: of the router that serves these rows (G,), and has choices then too (`bind_choices`).
    """
    (P, E, r), (R, _, F, _) = singular_values.shape, z.shape
    record = np.zeros(_RECORD, np.int64)
    arrays = [z, weights, is_merged, kept]
    if rule is not None and rows is not None:
        arrays += [singular_values, rule.mean, rule.std, rows]
        record[_RULE - 3] = len(rows)
        record[_RULE], record[_RULE + 1] = rule.measure, rule.num_kept
        record.view(np.float64)[_RULE + 2 : _TEAM] = rule.temperature, rule.least
    assert all(array is None or array.flags.c_contiguous for array in arrays)
    record[: len(arrays)] = [0 if array is None else array.ctypes.data for array in arrays]
    record[_SIZES : _RULE - 3] = R, P, E, F, r
    record[_TEAM:] = Team.of_torch()
    return record


def bind_choices(record: Ids, choices: Choices) -> None:
    """Have the next tokens' choices written here: where there is no room left, from the start."""
    record[_CHOICES:_SIZES] = [array.ctypes.data for array in choices]
    record[_RULE - 1], record[_RULE - 2] = len(choices.places), choices.places.shape[3]


@_compiled
def _bound(record: Ids) -> tuple[Floats, Floats, NDArray[np.bool_], Ids, Team]:
    """z, weights, is_merged, kept (empty where there is none) and the team of a record."""
    R, P, _, F, r, _, _, _ = record[_SIZES:_RULE]
    z = numba.carray(_pointer(record[0]), (R, P, F, r), np.float32)
    weights = numba.carray(_pointer(record[1]), (R, P, F), np.float32)
    is_merged = numba.carray(_pointer(record[2]), R, np.bool_)
    kept = numba.carray(_pointer(record[3]), (R, P, F if record[3] else 0), np.int64)
    return z, weights, is_merged, kept, Team(record[_TEAM], record[_TEAM + 1], record[_TEAM + 2])


@_compiled
def _route(record: Ids, z: Floats, weights: Floats, kept: Ids, pool: Pool | None) -> None:
    """The choice of the record's router from z (R, P, F, r), and what it makes of the weights."""
    _, P, E, _, r, G, K, N = record[_SIZES:_RULE]
    S = numba.carray(_pointer(record[4]), (P, E, r), np.float32)
    mean = numba.carray(_pointer(record[5]), (P, E), np.float32)
    std = numba.carray(_pointer(record[6]), (P, E), np.float32)
    rows = numba.carray(_pointer(record[7]), G, np.int64)
    temperature, least = record.view(np.float64)[_RULE + 2 : _TEAM]
    rule = Rule(record[_RULE], record[_RULE + 1], mean, std, temperature, least)
    num = numba.carray(_pointer(record[_CHOICES + 3]), 1, np.int64)
    token = num[0] % N
    num[0] += 1
    chosen = Chosen(
        numba.carray(_pointer(record[_CHOICES]), (N, G, P, K), np.int64)[token],
        numba.carray(_pointer(record[_CHOICES + 1]), (N, G, P, K), np.float32)[token],
        numba.carray(_pointer(record[_CHOICES + 2]), (N, G, P, K), np.float32)[token],
    )
    scores = scored(z, rows, S, rule)
    if pool is not None:
        scores = pooled(scores, pool)
    choose(chosen, weights, rows, scores, rule)
    if kept.shape[2] > 0:
        for g in range(G):
            for p in range(P):
                for k in range(K):
                    chosen.places[g, p, k] = kept[rows[g], p, chosen.places[g, p, k]]


@_compiled
def route_and_add_at(
    record: Ids,
    y: int,
    x: int,
    is_bfloat16: bool,
    A: Stored,
    arrows: Arrows | None,
    B: Stored,
    pool: Pool | None,
    is_first: bool,
    is_last: bool,
) -> None:
    """All of a bank's first layer, for the rows of one router: what `bind` was given is written,
    and y (R, 1, D_out) changes in place.

    Of several routers, each has a record with the same z and weights: the first one projects, the
    last one adds. arrows: where given, one router serves all rows, and only the experts that its
    filter keeps are projected on.
    """
    z, weights, is_merged, kept, team = _bound(record)
    E, r = record[_SIZES + 2], record[_SIZES + 4]
    if arrows is not None:
        keep(kept, x, is_bfloat16, A, arrows, r, team)
        project_chosen(z, x, is_bfloat16, A, kept, E, team)
    elif is_first:
        project(z, x, is_bfloat16, A, team)
    _route(record, z, weights, kept, pool)
    if arrows is not None:
        add_(y, is_bfloat16, z, weights, is_merged, kept, B, 0)
    elif is_last:
        add_(y, is_bfloat16, z, weights, is_merged, None, B, 0)


@_compiled
def project_and_add_at(
    record: Ids, y: int, x: int, is_bfloat16: bool, A: Stored, B: Stored
) -> None:
    """All of a bank's first layer, where the weights are given."""
    z, weights, is_merged, _, team = _bound(record)
    project(z, x, is_bfloat16, A, team)
    add_(y, is_bfloat16, z, weights, is_merged, None, B, 0)


@_compiled
def add_at(record: Ids, y: int, is_bfloat16: bool, B: Stored, place: int) -> None:
    """`add_` with a record of `bind`."""
    z, weights, is_merged, kept, _ = _bound(record)
    if kept.shape[2] == 0:
        add_(y, is_bfloat16, z, weights, is_merged, None, B, place)
    else:
        add_(y, is_bfloat16, z, weights, is_merged, kept, B, place)


class MixedToken(NamedTuple):
    """What one token adds at the layers of a bank; the same memory serves all tokens of a run.

    records: of `bind`, one for each router that looks at tokens, as are choices; where there is
    none, one without a rule. is_filtered: whether experts are kept by a filter. arrays: what the
    records point to, which must be kept as long.
    """

    B: tuple[Stored, ...]
    records: tuple[Ids, ...]
    choices: list[Choices]
    is_filtered: bool
    arrays: tuple[Any, ...]

    def add_(self, y: Tensor, place: int) -> Tensor:
        """y (R, 1, D_out) with it, in place."""
        add_at(self.records[0], y.data_ptr(), y.dtype == torch.bfloat16, self.B[place], place)
        return y
