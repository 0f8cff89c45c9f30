"""Routing one token on a CPU: one compiled loop where torch would make a chain of calls.

One token needs little arithmetic, but between the base's products each call of torch costs 10 to
40 us whatever it computes (docs/performance.md). These functions do for one token what `routing`,
`pooling` and `bank` do for any number in torch, to rounding; both ways are tested against each
other. Axes: R rows, P projections of a bank, E experts, K selected, r rank.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
# What torch keeps: float32, or the bits of bfloat16, which numpy does not know, as uint16.
Stored = NDArray[Any]

_MOST_ROWS = 8
_FEW_BYTES = 1 << 20
_LINE_BYTES = 64
_ROWS_AHEAD = 8
_DTYPES = (torch.float32, torch.bfloat16)
LENGTH, FIRST, OUTPUT = 0, 1, 2  # what a score measures: z, its first entry, S z


def _compiled(function: Callable[..., Any]) -> Any:
    # Sums may be reordered, which lets them run in vectors; infinities keep their meaning.
    fastmath = {"reassoc", "contract", "nsz"}
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
    with suppress(RuntimeError):  # no folder can be written: compiled anew at each start
        dispatcher.enable_caching()
    return dispatcher


def can_route(x: Tensor) -> bool:
    """Whether x (R, T, D_in), on a CPU, is one token for each of a few rows: for many, torch's
    threads and matrix products pay."""
    return x.shape[1] == 1 and x.shape[0] <= _MOST_ROWS and x.dtype in _DTYPES


class Factors(NamedTuple):
    """A bank's memory as these functions read it: A, B of each layer, singular values.

    is_read_fast: one core reads A as fast as torch's threads, with their calls, do.
    """

    A: Stored
    B: tuple[Stored, ...]
    singular_values: Floats
    is_read_fast: bool

    @classmethod
    def of(cls, A: Tensor, B: Sequence[Tensor], singular_values: Tensor) -> "Factors | None":
        """None for tensors of another dtype, or of a GPU."""
        if A.device.type != "cpu" or A.dtype not in _DTYPES:
            return None
        is_read_fast = A.dtype == torch.bfloat16 or A.nbytes <= _FEW_BYTES
        return cls(stored(A), tuple(map(stored, B)), singular_values.numpy(), is_read_fast)


def stored(values: Tensor) -> Stored:
    """The memory of a tensor on a CPU, in float32 or bfloat16."""
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    return np.asarray(values.numpy())


def _as_float(value):  # type: ignore[no-untyped-def]
    raise NotImplementedError("in compiled code only")


@overload(_as_float, inline="always")
def _as_float_of(value):  # type: ignore[no-untyped-def]
    if isinstance(value, numba.types.Integer):  # bfloat16 is the upper half of a float32
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _as_stored(value, like):  # type: ignore[no-untyped-def]
    raise NotImplementedError("in compiled code only")


@overload(_as_stored, inline="always")
def _as_stored_of(value, like):  # type: ignore[no-untyped-def]
    if isinstance(like, numba.types.Integer):  # rounded to the nearest, of two to the even one
        return lambda value, like: _rounded_bits(np.float32(value).view(np.uint32))
    return lambda value, like: value


@_compiled
def _rounded_bits(bits: Any) -> Any:
    """The upper half of a float32's bits, rounded."""
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@_compiled
def _as_floats(x: Stored) -> Floats:
    """(R, D) float32 from x (R, 1, D)."""
    values = np.empty((x.shape[0], x.shape[2]), np.float32)
    for row in range(x.shape[0]):
        for d in range(x.shape[2]):
            values[row, d] = _as_float(x[row, 0, d])
    return values


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Ask memory for the line at an address, without waiting for it."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        to_read, keep_close, data = number(0), number(3), number(1)
        pointer = builder.inttoptr(arguments[0], place)
        builder.call(function, [pointer, to_read, keep_close, data])
        return context.get_dummy_value()

    return numba.types.void(numba.types.uintp), build


@_compiled
def _dots(values: Floats, A: Stored, rows: Ids, token: Floats) -> None:
    """`values = A[rows] token`: values and rows (N,), A (., D) with its rows one after another,
    token (D,). Rows from anywhere in memory are waited for, so four are read at a time, past the
    end the last one again, and asked for some rows before."""
    last, num_bytes = len(rows) - 1, A.shape[1] * A.itemsize
    for n in range(0, len(rows), 4):
        for ahead in range(0 if n == 0 else n + _ROWS_AHEAD, min(n + _ROWS_AHEAD + 4, last + 1)):
            address = A.ctypes.data + rows[ahead] * num_bytes
            for line in range(0, num_bytes, _LINE_BYTES):
                _prefetch(address + line)  # type: ignore[call-arg]
        second, third, fourth = min(n + 1, last), min(n + 2, last), min(n + 3, last)
        A_0, A_1, A_2, A_3 = A[rows[n]], A[rows[second]], A[rows[third]], A[rows[fourth]]
        sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
        for d in range(len(token)):
            value = token[d]
            sum_0 += _as_float(A_0[d]) * value
            sum_1 += _as_float(A_1[d]) * value
            sum_2 += _as_float(A_2[d]) * value
            sum_3 += _as_float(A_3[d]) * value
        values[n], values[second], values[third], values[fourth] = sum_0, sum_1, sum_2, sum_3


@_compiled
def project(x: Stored, A: Stored, num_layers: int, num_experts: int, rank: int) -> Floats:
    """`z = A* x` of all experts: (R, P, E, r) from x (R, 1, D_in) and A (P * E * r, D_in)."""
    values = _as_floats(x)
    z = np.empty((x.shape[0], num_layers, num_experts, rank), np.float32)
    rows = z.reshape(x.shape[0], -1)
    for i in range(A.shape[0]):
        factors = A[i]
        for row in range(x.shape[0]):
            token, total = values[row], np.float32(0)
            for d in range(x.shape[2]):
                total += _as_float(factors[d]) * token[d]
            rows[row, i] = total
    return z


@_compiled
def best(values: Floats, num: int) -> Ids:
    """(num,) places of the largest of values (E,), the largest first; of equals the first."""
    places = np.zeros(num, np.int64)
    count = 0
    for e in range(len(values)):
        if count < num:
            count += 1
        elif not values[e] > values[places[num - 1]]:
            continue
        k = count - 1
        while k > 0 and values[e] > values[places[k - 1]]:
            places[k] = places[k - 1]
            k -= 1
        places[k] = e
    return places


class Arrows(NamedTuple):
    """The first row a of each expert's A* in 8 bits: half the bytes or fewer, and enough to tell
    which experts are not among the best.

    values (P * E, D_in) int8, scales (P * E,), errors (P * E,) float32: a is `scale * values` but
    for an error of that length, so `a . x` is known within `error * ||x||`.
    """

    values: NDArray[np.int8]
    scales: Floats
    errors: Floats

    @classmethod
    def of(cls, rows: Tensor) -> "Arrows":
        """rows: (P * E, D_in), float."""
        rows = rows.float()
        scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        values = (rows / scales).round()
        length = torch.linalg.vector_norm
        # And what the sums of float32 that are compared may differ by in their last places.
        errors = length(rows - scales * values, dim=-1) + 1e-5 * length(rows, dim=-1)
        return cls(values.to(torch.int8).numpy(), scales[:, 0].numpy(), errors.numpy())


@_compiled
def keep(x: Stored, A: Stored, arrows: Arrows, num_layers: int, rank: int, num_kept: int) -> Ids:
    """(R, P, F) places of the experts with the longest first entries of `z = A* x`, for x
    (R, 1, D_in) and A (P * E * r, D_in). A is read where the arrows leave it open."""
    tokens, R, P = _as_floats(x), x.shape[0], num_layers
    E = len(arrows.scales) // P
    about, longest = np.empty((R, P * E), np.float32), np.empty((R, P, num_kept), np.int64)
    for i in range(P * E):
        arrow = arrows.values[i]
        for row in range(R):
            token, total = tokens[row], np.float32(0)
            for d in range(x.shape[2]):
                total += np.float32(arrow[d]) * token[d]
            about[row, i] = abs(arrows.scales[i] * total)
    surely, lengths = np.empty(E, np.float32), np.empty(E, np.float32)
    candidates, starts = np.empty(E, np.int64), np.empty(E, np.int64)
    for row in range(R):
        squares = np.float32(0)
        for value in tokens[row]:
            squares += value * value
        length = np.sqrt(squares)
        for p in range(P):
            for e in range(E):
                surely[e] = about[row, p * E + e] - arrows.errors[p * E + e] * length
            least, count = surely[best(surely, num_kept)[num_kept - 1]], 0
            for e in range(E):
                i = p * E + e
                if about[row, i] + arrows.errors[i] * length < least:
                    continue
                candidates[count], starts[count] = e, i * rank
                count += 1
            _dots(lengths, A, starts[:count], tokens[row])
            for c in range(count):
                lengths[c] = abs(lengths[c])
            places = best(lengths[:count], num_kept)
            for f in range(num_kept):
                longest[row, p, f] = candidates[places[f]]
    return longest


@_compiled
def project_chosen(
    x: Stored, A: Stored, kept: Ids, num_layers: int, num_experts: int, rank: int
) -> Floats:
    """`z = A* x` of a few experts: (R, P, F, r) from x (R, 1, D_in), A (P * E * r, D_in) and their
    places in the bank (R, P, F)."""
    R, P, F = kept.shape
    tokens, rows = _as_floats(x), np.empty(F * rank, np.int64)
    z = np.empty((R, P, F, rank), np.float32)
    for row in range(R):
        for p in range(P):
            for f in range(F):
                for i in range(rank):
                    rows[f * rank + i] = (p * num_experts + kept[row, p, f]) * rank + i
            _dots(z[row, p].reshape(-1), A, rows, tokens[row])
    return z


class Rule(NamedTuple):
    """How a router scores and chooses at a bank.

    measure: LENGTH, FIRST or OUTPUT. num_kept: of the experts with the longest first entry; the
    others have no score. mean, std (P, E): by which scores are standardised. top_k, temperature (of
    a softmax; 0 is 1/K each) and least (the best score must exceed it): see `routing.select`.
    """

    measure: int
    num_kept: int
    mean: Floats
    std: Floats
    top_k: int
    temperature: float
    least: float


@_compiled
def scored(z: Floats, singular_values: Floats, rule: Rule) -> Floats:
    """(R, P, E) scores from z (R, P, E, r); -inf for experts that are not kept."""
    R, P, E, r = z.shape
    scores, lengths = np.empty((R, P, E), np.float32), np.empty(E, np.float32)
    for row in range(R):
        for p in range(P):
            for e in range(E):
                squares = np.float32(0)
                for i in range(1 if rule.measure == FIRST else r):
                    value = z[row, p, e, i]
                    if rule.measure == OUTPUT:
                        value *= singular_values[p, e, i]
                    squares += value * value
                scores[row, p, e] = (np.sqrt(squares) - rule.mean[p, e]) / rule.std[p, e]
            if rule.num_kept < E:
                for e in range(E):
                    lengths[e] = abs(z[row, p, e, 0])
                for e in best(lengths, rule.num_kept):
                    lengths[e] = -1
                for e in range(E):
                    if lengths[e] >= 0:
                        scores[row, p, e] = -np.inf
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


@_compiled
def choose(scores: Floats, rule: Rule) -> tuple[Ids, Floats, Floats, Floats]:
    """The K experts with the best scores (R, P, E): their places, weights and scores, (R, P, K)
    each; and the weights of all, (R, P, E)."""
    R, P, E = scores.shape
    K = min(rule.top_k, E)
    places = np.empty((R, P, K), np.int64)
    weights, top = np.empty((R, P, K), np.float32), np.empty((R, P, K), np.float32)
    dense = np.zeros((R, P, E), np.float32)
    for row in range(R):
        for p in range(P):
            chosen = best(scores[row, p], K)
            for k in range(K):
                places[row, p, k], top[row, p, k] = chosen[k], scores[row, p, chosen[k]]
            sum_of_weights = np.float32(0)
            for k in range(K):
                weight = np.float32(1)
                if rule.temperature > 0:
                    lead = top[row, p, k] - top[row, p, 0]
                    weight = np.exp(lead / np.float32(rule.temperature))
                weights[row, p, k] = weight
                sum_of_weights += weight
            is_any = top[row, p, 0] > rule.least
            for k in range(K):
                weight = weights[row, p, k] / sum_of_weights if is_any else np.float32(0)
                weights[row, p, k] = dense[row, p, places[row, p, k]] = weight
    return places, weights, top, dense


@_compiled
def add_(
    y: Stored,
    z: Floats,
    weights: Floats,
    is_merged: NDArray[np.bool_],
    kept: Ids | None,
    B: Stored,
    place: int,
) -> None:
    """`y += sum_e w_e B*_e z_e` at one layer, in place; with `sum_e w_e z_e` for each z_e in the
    rows that are merged. y (R, 1, D_out), z (R, P, E, r), weights (R, P, E), B (E * r, D_out). kept
    (R, P, E): places in the bank of those that z has, or None for all of it."""
    R, _, E, r = z.shape
    merged, delta = np.empty(r, np.float32), np.empty(y.shape[2], np.float32)
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
                for d in range(y.shape[2]):
                    delta[d] += value * _as_float(factors[d])
        for d in range(y.shape[2]):
            y[row, 0, d] = _as_stored(_as_float(y[row, 0, d]) + delta[d], y[row, 0, d])


@_compiled
def route(
    z: Floats, singular_values: Floats, rule: Rule, pool: Pool | None
) -> tuple[Ids, Floats, Floats, Floats]:
    """What a router chooses from z (R, P, E, r), as `choose` returns it."""
    scores = scored(z, singular_values, rule)
    if pool is not None:
        scores = pooled(scores, pool)
    return choose(scores, rule)


Chosen = tuple[Ids, Floats, Floats]  # of each row, `places`, `weights`, `top`: (R, P, K) each


@_compiled
def route_and_add_(
    y: Stored,
    x: Stored,
    A: Stored,
    arrows: Arrows | None,
    B: Stored,
    singular_values: Floats,
    rule: Rule,
    pool: Pool | None,
    is_merged: NDArray[np.bool_],
) -> tuple[Floats, Floats, Ids | None, Chosen]:
    """All of a bank's first layer, where one router serves all rows: y (R, 1, D_out) changes in
    place. arrows: where given, only the experts that the router's filter keeps are projected on.

    Returns z, weights and kept, as `add_` takes them for the bank's other layers, and the choice.
    """
    P, E, r = singular_values.shape
    if arrows is None:
        kept, z = None, project(x, A, P, E, r)
    else:
        kept = keep(x, A, arrows, P, r, rule.num_kept)
        z = project_chosen(x, A, kept, P, E, r)
    places, chosen, top, weights = route(z, singular_values, rule, pool)
    add_(y, z, weights, is_merged, kept, B, 0)
    return z, weights, kept, (places, chosen, top)


@_compiled
def project_and_add_(
    y: Stored,
    x: Stored,
    A: Stored,
    B: Stored,
    weights: Floats,
    is_merged: NDArray[np.bool_],
    rank: int,
) -> Floats:
    """All of a bank's first layer, where the weights (R, P, E) are given. Returns z."""
    z = project(x, A, weights.shape[1], weights.shape[2], rank)
    add_(y, z, weights, is_merged, None, B, 0)
    return z


class MixedToken(NamedTuple):
    """What one token adds at the layers of a bank; the arguments of `add_`."""

    B: tuple[Stored, ...]
    z: Floats
    weights: Floats
    is_merged: NDArray[np.bool_]
    kept: Ids | None

    def add_(self, y: Tensor, place: int) -> Tensor:
        """y (R, 1, D_out) with it, in place."""
        B = self.B[place]
        add_(stored(y), self.z, self.weights, self.is_merged, self.kept, B, place)
        return y
