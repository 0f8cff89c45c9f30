"""One token on a CPU: a compiled loop where torch would make a chain of calls.

One token needs little arithmetic, but between the base's products each call of torch costs 10 to
40 us whatever it computes (docs/performance.md). These functions do for one token what `routing`,
`pooling` and `bank` do for any number in torch, to rounding; both ways are tested against each
other. `multiply` is what all products with a few tokens come down to, the base's too where torch is
slower (`token_linear`). Axes: R rows, P projections of a bank, E experts, K selected, r rank.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo import threads

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
# What torch keeps: float32, or the bits of bfloat16, which numpy does not know, as uint16.
Stored = NDArray[Any]

# Sums may be reordered, which lets them run in vectors; infinities keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}
_MOST_ROWS = 8
_BLOCK_BYTES, _TOKEN_BYTES = 1 << 17, 1 << 13
_VALUES_OF_A_THREAD = 1 << 15
_BYTES_AHEAD = 1 << 14
_LINE_BYTES = 64
_ROWS_AHEAD = 8
_DTYPES = (torch.float32, torch.bfloat16)
LENGTH, FIRST, OUTPUT = 0, 1, 2  # what a score measures: z, its first entry, S z


def _compiled(function: Callable[..., Any]) -> Any:
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=_FASTMATH)(function)
    with suppress(RuntimeError):  # no folder can be written: compiled anew at each start
        dispatcher.enable_caching()
    return dispatcher


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


def stored(values: Tensor) -> Stored:
    """The memory of a tensor on a CPU, in float32 or bfloat16."""
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    return values.numpy()


def _as_float(value):  # type: ignore[no-untyped-def]
    raise NotImplementedError("in compiled code only")


@overload(_as_float, inline="always")
def _as_float_of(value):  # type: ignore[no-untyped-def]
    if isinstance(value, numba.types.Integer):  # bfloat16 is the upper half of a float32
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@_compiled
def _rounded_bits(value: Any) -> Any:
    """Those of a number rounded to bfloat16: the upper half of a float32's."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


def _to_pointer(typing_context, address):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(numba.types.int64), build


_pointer: Any = intrinsic(_to_pointer)


@_compiled
def _floats_at(x: int, is_bfloat16: bool, num_rows: int, size: int) -> Floats:
    """(R, D) float32: a copy of what a tensor has at this address, in float32 or bfloat16."""
    values, num = np.empty((num_rows, size), np.float32), num_rows * size
    flat = values.reshape(num)
    if is_bfloat16:
        bits = numba.carray(_pointer(x), num, np.uint16)
        for i in range(num):
            flat[i] = _as_float(bits[i])
    else:
        flat[:] = numba.carray(_pointer(x), num, np.float32)
    return values


@_compiled
def _add_at(y: int, is_bfloat16: bool, row: int, delta: Floats) -> None:
    """`y[row] += delta` (D,) in a tensor (R, D) at this address, rounded once."""
    num = len(delta)
    if is_bfloat16:
        bits = numba.carray(_pointer(y + 2 * row * num), num, np.uint16)
        for d in range(num):
            bits[d] = _rounded_bits(_as_float(bits[d]) + delta[d])
    else:
        values = numba.carray(_pointer(y + 4 * row * num), num, np.float32)
        for d in range(num):
            values[d] += delta[d]


@intrinsic
def _prefetch(typing_context, address):  # type: ignore[no-untyped-def]
    """Ask memory for the line at an address, without waiting for it."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        to_read, keep_near, data = number(0), number(2), number(1)
        pointer = builder.inttoptr(arguments[0], place)
        builder.call(function, [pointer, to_read, keep_near, data])
        return context.get_dummy_value()

    return numba.types.void(numba.types.uintp), build


@_compiled
def _ask_for(address: int, num_bytes: int) -> None:
    for line in range(0, num_bytes, _LINE_BYTES):
        _prefetch(address + line)  # type: ignore[call-arg]


@_compiled
def _dots(values: Floats, A: Stored, rows: Ids, token: Floats) -> None:
    """`values = A[rows] token`: values and rows (N,), A (., D) with its rows one after another,
    token (D,). Rows from anywhere in memory are waited for, so four are read at a time, past the
    end the last one again, and asked for some rows before."""
    last, num_bytes = len(rows) - 1, A.shape[1] * A.itemsize
    for n in range(0, len(rows), 4):
        for ahead in range(0 if n == 0 else n + _ROWS_AHEAD, min(n + _ROWS_AHEAD + 4, last + 1)):
            _ask_for(A.ctypes.data + rows[ahead] * num_bytes, num_bytes)
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
def multiply(values: Floats, x: Floats, A: Floats, start: int, stop: int) -> None:
    """`values = x A^T` for the rows of A from start to stop: values (R, N), x (R, D), A (N, D).

    A is read in the order in which it lies in memory, one row at a time, which memory gives two to
    three times as fast as several rows at once. A row meets as many tokens as stay in a core's
    nearest cache, and a block of rows stays in the next one for the others. Each token has a sum of
    its own, so its product does not depend on the tokens beside it, not even in rounding.
    """
    R, D = x.shape
    num_rows, num_tokens = _BLOCK_BYTES // (D * 4) + 1, _TOKEN_BYTES // (D * 4) + 1
    for first in range(start, stop, num_rows):
        for first_token in range(0, R, num_tokens):
            for n in range(first, min(first + num_rows, stop)):
                factors = A[n]
                for row in range(first_token, min(first_token + num_tokens, R)):
                    token, total = x[row], np.float32(0)
                    for d in range(D):
                        total += factors[d] * token[d]
                    values[row, n] = total


@_compiled
def multiply_bfloat16(values: Floats, x: Floats, A: Stored, start: int, stop: int) -> None:
    """The same with A (N, D) in bfloat16. What takes the time is to make floats of it, so four
    tokens are served at once, past the end the last one again."""
    (R, D), ahead = x.shape, _BYTES_AHEAD // (2 * A.shape[1]) + 1
    for n in range(start, stop):
        factors = A[n]
        _ask_for(A[min(n + ahead, stop - 1)].ctypes.data, 2 * D)
        if R == 1:
            token, total = x[0], np.float32(0)
            for d in range(D):
                total += _as_float(factors[d]) * token[d]
            values[0, n] = total
            continue
        for row in range(0, R, 4):
            second, third, fourth = min(row + 1, R - 1), min(row + 2, R - 1), min(row + 3, R - 1)
            x_0, x_1, x_2, x_3 = x[row], x[second], x[third], x[fourth]
            sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
            for d in range(D):
                factor = _as_float(factors[d])
                sum_0 += factor * x_0[d]
                sum_1 += factor * x_1[d]
                sum_2 += factor * x_2[d]
                sum_3 += factor * x_3[d]
            values[row, n], values[second, n] = sum_0, sum_1
            values[third, n], values[fourth, n] = sum_2, sum_3


@_compiled
def multiply_int8(
    values: Floats, x: Floats, A: NDArray[np.int8], scales: Floats, start: int, stop: int
) -> None:
    """`values = |x A^T|` with rows of A (N, D) that are 8 bits times a scale (N,)."""
    (R, D), ahead = x.shape, _BYTES_AHEAD // A.shape[1] + 1
    for n in range(start, stop):
        factors = A[n]
        _ask_for(A[min(n + ahead, stop - 1)].ctypes.data, D)
        for row in range(R):
            token, total = x[row], np.float32(0)
            for d in range(D):
                total += np.float32(factors[d]) * token[d]
            values[row, n] = abs(scales[n] * total)


@_compiled
def _expand(
    pairs: NDArray[np.uint32],
    packed: NDArray[np.uint16],
    scales: NDArray[np.uint16],
    code: Floats,
    start: int,
    stop: int,
) -> None:
    """Blocks of 32 rows of a matrix (N, D), from start to stop: pairs (N, D / 2) of bfloat16 from
    packed (N / 32, D / 2, 16), scales (., N) in bfloat16 and the 16 values of a code.

    16 bits hold two neighbours of a row in the lower halves of their bytes, and of the row that is
    16 further on in the upper ones.
    """
    rounded = np.empty(16, np.float32)
    for i in range(16):
        rounded[i] = _as_float(_rounded_bits(code[i]))
    num_scales, half = len(scales), packed.shape[2]
    num_pairs = packed.shape[1] // num_scales
    values, values_below = np.empty(16, np.uint32), np.empty(16, np.uint32)
    for block in range(start, stop):
        for r in range(half):
            row = 2 * half * block + r
            here, below = pairs[row], pairs[row + half]
            for s in range(num_scales):
                scale, scale_below = _as_float(scales[s, row]), _as_float(scales[s, row + half])
                for i in range(16):
                    values[i] = _rounded_bits(rounded[i] * scale)
                    values_below[i] = _rounded_bits(rounded[i] * scale_below)
                for d in range(s * num_pairs, (s + 1) * num_pairs):
                    bits = np.uint32(packed[block, d, r])
                    second, upper = (bits >> np.uint32(8)) & np.uint32(15), bits >> np.uint32(12)
                    here[d] = values[bits & np.uint32(15)] | (values[second] << np.uint32(16))
                    first = (bits >> np.uint32(4)) & np.uint32(15)
                    below[d] = values_below[first] | (values_below[upper] << np.uint32(16))


@intrinsic
def _next_part(typing_context, counter):  # type: ignore[no-untyped-def]
    """The number at an address, which is one more for the thread that asks next."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        number = ir.IntType(64)
        place = builder.bitcast(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, number(1), "monotonic")

    return numba.types.int64(numba.types.voidptr), build


def _take_parts(task: Any) -> None:
    """What each thread does for a product: takes the next part that nobody has, until all are
    taken. task: address of ten int64, see `_share`."""
    numbers: Any = numba.carray(task, 10, np.int64)
    _, num_parts, kind, values, x, A, more, R, N, D = numbers
    products = numba.carray(_pointer(values), (R, N), np.float32)
    tokens = numba.carray(_pointer(x), (R, D), np.float32)
    floats = numba.carray(_pointer(A), (N, D), np.float32)
    bits = numba.carray(_pointer(A), (N, D), np.uint16)
    rows = numba.carray(_pointer(more), N, np.int64)
    part: int = _next_part(task)  # type: ignore[call-arg]
    while part < num_parts:
        start, stop = part * N // num_parts, (part + 1) * N // num_parts
        if kind == 4:
            multiply(products, tokens, floats, start, stop)
        elif kind == 2:
            multiply_bfloat16(products, tokens, bits, start, stop)
        elif kind == -4:
            _dots(products[0, start:stop], floats, rows[start:stop], tokens[0])
        elif kind == -2:
            _dots(products[0, start:stop], bits, rows[start:stop], tokens[0])
        else:
            numbers_8 = numba.carray(_pointer(A), (N, D), np.int8)
            scales = numba.carray(_pointer(more), N, np.float32)
            multiply_int8(products, tokens, numbers_8, scales, start, stop)
        part = _next_part(task)


_PACKED_ROWS = 32


def _expand_parts(task: Any) -> None:
    """The same for `expand_in_threads`, whose task has nine int64."""
    numbers: Any = numba.carray(task, 9, np.int64)
    _, num_parts, values, A, scales, code, N, D, num_scales = numbers
    num_blocks = N // _PACKED_ROWS
    pairs = numba.carray(_pointer(values), (N, D // 2), np.uint32)
    packed = numba.carray(_pointer(A), (num_blocks, D // 2, _PACKED_ROWS // 2), np.uint16)
    scale_of = numba.carray(_pointer(scales), (num_scales, N), np.uint16)
    numbers_4 = numba.carray(_pointer(code), 16, np.float32)
    part: int = _next_part(task)  # type: ignore[call-arg]
    while part < num_parts:
        start, stop = part * num_blocks // num_parts, (part + 1) * num_blocks // num_parts
        _expand(pairs, packed, scale_of, numbers_4, start, stop)
        part = _next_part(task)


_take_all_parts, _expand_all_parts = _compiled(_take_parts), _compiled(_expand_parts)


@cache
def _address(function: Callable[[Any], None]) -> int:
    """Of this as a C function, `void function(void *task)`, compiled when it is first needed."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": _FASTMATH}
    with suppress(RuntimeError):  # no folder can be written
        return cast(int, numba.cfunc("void(voidptr)", cache=True, **options)(function).address)
    return cast(int, numba.cfunc("void(voidptr)", **options)(function).address)


class Team(NamedTuple):
    """Threads for compiled code: the addresses of what starts them (`threads.START`) and of what
    they run; how many there may be."""

    start: int
    work: int
    size: int

    @classmethod
    def of_torch(cls, function: Callable[[Any], None] = _take_parts) -> "Team":
        return cls(threads.START, _address(function), threads.num_threads())


def _to_call(typing_context, start, work, task, num):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place, place, number, number])
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        addresses = [builder.inttoptr(address, place) for address in arguments[1:3]]
        builder.call(function, [*addresses, builder.trunc(arguments[3], number), number(0)])
        return context.get_dummy_value()

    return numba.types.void(*[numba.types.int64] * 4), build


_start: Any = intrinsic(_to_call)


@_compiled
def _share(values: Floats, x: Floats, A: int, kind: int, more: int, N: int, team: Team) -> None:
    """A product with N rows of A, by as many threads as it is worth: values (R, N), x (R, D).

    A and more: addresses. kind: bytes of A's values, 4, 2 or 1; those of 1 have scales (N,) at
    `more`. Negative: not the first N rows, but those whose numbers (N,) are there, for R = 1.
    """
    R, D = x.shape
    num_parts = max(1, min(team.size, N * D // _VALUES_OF_A_THREAD))
    task = np.zeros(10, np.int64)
    task[1], task[2], task[3], task[4] = num_parts, kind, values.ctypes.data, x.ctypes.data
    task[5], task[6], task[7], task[8], task[9] = A, more, R, N, D
    if num_parts == 1:
        _take_all_parts(_pointer(task.ctypes.data))
    else:
        # All threads, even where parts are fewer: OpenMP would end the others, and torch's next
        # operation would have to make them anew.
        _start(team.start, team.work, task.ctypes.data, team.size)
    task[0] = 0  # an array lives until it is last named, whoever has its address


@_compiled
def _share_dots(values: Floats, A: Stored, rows: Ids, token: Floats, team: Team) -> None:
    """`_dots` by several threads."""
    N, numbers = len(rows), rows.ctypes.data
    products, tokens = values.reshape(1, N), token.reshape(1, len(token))
    _share(products, tokens, A.ctypes.data, -A.itemsize, numbers, N, team)


@_compiled
def _multiply_at(values: int, x: int, A: int, R: int, N: int, D: int, team: Team) -> None:
    """The same in float32 with the addresses of all."""
    products = numba.carray(_pointer(values), (R, N), np.float32)
    tokens = numba.carray(_pointer(x), (R, D), np.float32)
    _share(products, tokens, A, 4, 0, N, team)


def multiply_in_threads(values: Tensor, x: Tensor, A: Tensor) -> None:
    """`values = x A^T` of a few tokens, by torch's threads, unless A is small: values (..., N), x
    (..., D), A (N, D), float32 on a CPU, contiguous."""
    addresses = values.data_ptr(), x.data_ptr(), A.data_ptr()
    (N, D), num_values = A.shape, x.numel()
    _multiply_at(*addresses, num_values // D, N, D, Team.of_torch())


@_compiled
def _expand_at(
    values: int, A: int, scales: int, code: int, N: int, D: int, num_scales: int, team: Team
) -> None:
    task = np.zeros(9, np.int64)
    task[1], task[2], task[3], task[4], task[5] = 4 * team.size, values, A, scales, code
    task[6], task[7], task[8] = N, D, num_scales
    if team.size == 1:
        _expand_all_parts(_pointer(task.ctypes.data))
    else:
        _start(team.start, team.work, task.ctypes.data, team.size)
    task[0] = 0  # as above


def expand_in_threads(values: Tensor, packed: Tensor, scales: Tensor, code: Tensor) -> None:
    """The values (N, D) bfloat16 of 4-bit weights that bitsandbytes has packed for a CPU: packed
    (N, D / 2) uint8, scales (., N) bfloat16, code (16,) float32, contiguous. What its kernel
    multiplies by, the code in bfloat16 times the scales, rounded once."""
    addresses = [tensor.data_ptr() for tensor in (values, packed, scales, code)]
    _expand_at(*addresses, *values.shape, len(scales), Team.of_torch(_expand_parts))


@_compiled
def project(z: Floats, x: int, is_bfloat16: bool, A: Stored, team: Team) -> None:
    """`z = A* x` of all experts: z (R, P, E, r), x (R, 1, D_in), A (P * E * r, D_in)."""
    (N, D), R = A.shape, len(z)
    tokens = _floats_at(x, is_bfloat16, R, D)
    _share(z.reshape(R, N), tokens, A.ctypes.data, A.itemsize, 0, N, team)


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
def keep(
    kept: Ids, x: int, is_bfloat16: bool, A: Stored, arrows: Arrows, rank: int, team: Team
) -> None:
    """kept (R, P, F) = places of the experts with the longest first entries of `z = A* x`, for x
    (R, 1, D_in) and A (P * E * r, D_in). A is read where the arrows leave it open."""
    (R, P, num_kept), D = kept.shape, A.shape[1]
    tokens = _floats_at(x, is_bfloat16, R, D)
    E = len(arrows.scales) // P
    about = np.empty((R, P * E), np.float32)
    arrow, scale = arrows.values.ctypes.data, arrows.scales.ctypes.data
    _share(about, tokens, arrow, 1, scale, P * E, team)
    surely, lengths = np.empty(E, np.float32), np.empty(P * E, np.float32)
    candidates, starts = np.empty(P * E, np.int64), np.empty(P * E, np.int64)
    ends = np.zeros(P + 1, np.int64)
    for row in range(R):
        squares = np.float32(0)
        for value in tokens[row]:
            squares += value * value
        length, count = np.sqrt(squares), 0
        for p in range(P):
            for e in range(E):
                surely[e] = about[row, p * E + e] - arrows.errors[p * E + e] * length
            least = surely[best(surely, num_kept)[num_kept - 1]]
            for e in range(E):
                i = p * E + e
                if about[row, i] + arrows.errors[i] * length < least:
                    continue
                candidates[count], starts[count] = e, i * rank
                count += 1
            ends[p + 1] = count
        _share_dots(lengths[:count], A, starts[:count], tokens[row], team)
        for p in range(P):
            of_layer = np.abs(lengths[ends[p] : ends[p + 1]])
            longest = best(of_layer, num_kept)
            for f in range(num_kept):
                kept[row, p, f] = candidates[ends[p] + longest[f]]


@_compiled
def project_chosen(
    z: Floats, x: int, is_bfloat16: bool, A: Stored, kept: Ids, num_experts: int, team: Team
) -> None:
    """`z = A* x` of a few experts: z (R, P, F, r), x (R, 1, D_in), A (P * E * r, D_in); kept
    (R, P, F): their places in the bank."""
    R, P, F, rank = z.shape
    tokens, rows = _floats_at(x, is_bfloat16, R, A.shape[1]), np.empty((P, F, rank), np.int64)
    for row in range(R):
        for p in range(P):
            for f in range(F):
                for i in range(rank):
                    rows[p, f, i] = (p * num_experts + kept[row, p, f]) * rank + i
        _share_dots(z[row].reshape(-1), A, rows.reshape(-1), tokens[row], team)


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
