"""Products of a few tokens with a matrix, by all of torch's threads.

torch's own products read a matrix at a third of the speed of memory where tokens are few. These
read it in the order in which it lies there. A row of the result does not depend on the other rows,
not even in rounding. Axes: R tokens, N rows of a matrix, D values of a row.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, cast

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.cpu import threads
from spectr_demo.cpu.numbers import (
    FASTMATH,
    Floats,
    Ids,
    Stored,
    as_float,
    ask_for,
    compiled,
    pointer,
    rounded_bits,
)

_BLOCK_BYTES, _TOKEN_BYTES = 1 << 17, 1 << 13
_VALUES_OF_A_THREAD = 1 << 15
_BYTES_AHEAD = 1 << 14
ROWS_AHEAD = 8


@compiled
def _dots(values: Floats, A: Stored, rows: Ids, token: Floats) -> None:
    """`values = A[rows] token`: values and rows (N,), A (., D) with its rows one after another,
    token (D,). Rows from anywhere in memory are waited for, so four are read at a time, past the
    end the last one again, and asked for some rows before."""
    last, num_bytes = len(rows) - 1, A.shape[1] * A.itemsize
    for n in range(0, len(rows), 4):
        for ahead in range(0 if n == 0 else n + ROWS_AHEAD, min(n + ROWS_AHEAD + 4, last + 1)):
            ask_for(A.ctypes.data + rows[ahead] * num_bytes, num_bytes)
        second, third, fourth = min(n + 1, last), min(n + 2, last), min(n + 3, last)
        A_0, A_1, A_2, A_3 = A[rows[n]], A[rows[second]], A[rows[third]], A[rows[fourth]]
        sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
        for d in range(len(token)):
            value = token[d]
            sum_0 += as_float(A_0[d]) * value
            sum_1 += as_float(A_1[d]) * value
            sum_2 += as_float(A_2[d]) * value
            sum_3 += as_float(A_3[d]) * value
        values[n], values[second], values[third], values[fourth] = sum_0, sum_1, sum_2, sum_3


@compiled
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


@compiled
def multiply_bfloat16(values: Floats, x: Floats, A: Stored, start: int, stop: int) -> None:
    """`multiply` with A (N, D) in bfloat16. Making floats of A takes the time, so four tokens share
    it. Past the last token, that one is computed again."""
    (R, D), ahead = x.shape, _BYTES_AHEAD // (2 * A.shape[1]) + 1
    for n in range(start, stop):
        factors = A[n]
        ask_for(A[min(n + ahead, stop - 1)].ctypes.data, 2 * D)
        if R == 1:
            token, total = x[0], np.float32(0)
            for d in range(D):
                total += as_float(factors[d]) * token[d]
            values[0, n] = total
            continue
        for row in range(0, R, 4):
            second, third, fourth = min(row + 1, R - 1), min(row + 2, R - 1), min(row + 3, R - 1)
            x_0, x_1, x_2, x_3 = x[row], x[second], x[third], x[fourth]
            sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
            for d in range(D):
                factor = as_float(factors[d])
                sum_0 += factor * x_0[d]
                sum_1 += factor * x_1[d]
                sum_2 += factor * x_2[d]
                sum_3 += factor * x_3[d]
            values[row, n], values[second, n] = sum_0, sum_1
            values[third, n], values[fourth, n] = sum_2, sum_3


@compiled
def multiply_int8(
    values: Floats, x: Floats, A: NDArray[np.int8], scales: Floats, start: int, stop: int
) -> None:
    """`values = |x A^T|` with rows of A (N, D) that are 8 bits times a scale (N,)."""
    (R, D), ahead = x.shape, _BYTES_AHEAD // A.shape[1] + 1
    for n in range(start, stop):
        factors = A[n]
        ask_for(A[min(n + ahead, stop - 1)].ctypes.data, D)
        for row in range(R):
            token, total = x[row], np.float32(0)
            for d in range(D):
                total += np.float32(factors[d]) * token[d]
            values[row, n] = abs(scales[n] * total)


@compiled
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
        rounded[i] = as_float(rounded_bits(code[i]))
    num_scales, half = len(scales), packed.shape[2]
    num_pairs = packed.shape[1] // num_scales
    values, values_below = np.empty(16, np.uint32), np.empty(16, np.uint32)
    for block in range(start, stop):
        for r in range(half):
            row = 2 * half * block + r
            here, below = pairs[row], pairs[row + half]
            for s in range(num_scales):
                scale, scale_below = as_float(scales[s, row]), as_float(scales[s, row + half])
                for i in range(16):
                    values[i] = rounded_bits(rounded[i] * scale)
                    values_below[i] = rounded_bits(rounded[i] * scale_below)
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
    taken. task: address of ten int64, see `share`."""
    numbers: Any = numba.carray(task, 10, np.int64)
    _, num_parts, kind, values, x, A, more, R, N, D = numbers
    products = numba.carray(pointer(values), (R, N), np.float32)
    tokens = numba.carray(pointer(x), (R, D), np.float32)
    floats = numba.carray(pointer(A), (N, D), np.float32)
    bits = numba.carray(pointer(A), (N, D), np.uint16)
    rows = numba.carray(pointer(more), N, np.int64)
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
            numbers_8 = numba.carray(pointer(A), (N, D), np.int8)
            scales = numba.carray(pointer(more), N, np.float32)
            multiply_int8(products, tokens, numbers_8, scales, start, stop)
        part = _next_part(task)


_PACKED_ROWS = 32


def _expand_parts(task: Any) -> None:
    """What each thread does for `expand_in_threads`, as `_take_parts`. task: of nine int64."""
    numbers: Any = numba.carray(task, 9, np.int64)
    _, num_parts, values, A, scales, code, N, D, num_scales = numbers
    num_blocks = N // _PACKED_ROWS
    pairs = numba.carray(pointer(values), (N, D // 2), np.uint32)
    packed = numba.carray(pointer(A), (num_blocks, D // 2, _PACKED_ROWS // 2), np.uint16)
    scale_of = numba.carray(pointer(scales), (num_scales, N), np.uint16)
    numbers_4 = numba.carray(pointer(code), 16, np.float32)
    part: int = _next_part(task)  # type: ignore[call-arg]
    while part < num_parts:
        start, stop = part * num_blocks // num_parts, (part + 1) * num_blocks // num_parts
        _expand(pairs, packed, scale_of, numbers_4, start, stop)
        part = _next_part(task)


_take_all_parts, _expand_all_parts = compiled(_take_parts), compiled(_expand_parts)


@cache
def _address(function: Callable[[Any], None]) -> int:
    """Of this as a C function, `void function(void *task)`, compiled when it is first needed."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH}
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


@compiled
def share(values: Floats, x: Floats, A: int, kind: int, more: int, N: int, team: Team) -> None:
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
        _take_all_parts(pointer(task.ctypes.data))
    else:
        # All threads, even where parts are fewer: OpenMP would end the others, and torch's next
        # operation would have to make them anew.
        _start(team.start, team.work, task.ctypes.data, team.size)
    task[0] = 0  # an array lives until it is last named, whoever has its address


@compiled
def share_dots(values: Floats, A: Stored, rows: Ids, token: Floats, team: Team) -> None:
    """`_dots` by several threads."""
    N, numbers = len(rows), rows.ctypes.data
    products, tokens = values.reshape(1, N), token.reshape(1, len(token))
    share(products, tokens, A.ctypes.data, -A.itemsize, numbers, N, team)


@compiled
def _multiply_at(values: int, x: int, A: int, R: int, N: int, D: int, team: Team) -> None:
    """`share` in float32, of what is at these addresses."""
    products = numba.carray(pointer(values), (R, N), np.float32)
    tokens = numba.carray(pointer(x), (R, D), np.float32)
    share(products, tokens, A, 4, 0, N, team)


def multiply_in_threads(values: Tensor, x: Tensor, A: Tensor) -> None:
    """`values = x A^T` of a few tokens, by torch's threads, unless A is small: values (..., N), x
    (..., D), A (N, D), float32 on a CPU, contiguous."""
    addresses = values.data_ptr(), x.data_ptr(), A.data_ptr()
    (N, D), num_values = A.shape, x.numel()
    _multiply_at(*addresses, num_values // D, N, D, Team.of_torch())


@compiled
def _expand_at(
    values: int, A: int, scales: int, code: int, N: int, D: int, num_scales: int, team: Team
) -> None:
    task = np.zeros(9, np.int64)
    task[1], task[2], task[3], task[4], task[5] = 4 * team.size, values, A, scales, code
    task[6], task[7], task[8] = N, D, num_scales
    if team.size == 1:
        _expand_all_parts(pointer(task.ctypes.data))
    else:
        _start(team.start, team.work, task.ctypes.data, team.size)
    task[0] = 0  # an array lives until it is last named, whoever has its address


def expand_in_threads(values: Tensor, packed: Tensor, scales: Tensor, code: Tensor) -> None:
    """The values (N, D) bfloat16 of 4-bit weights that bitsandbytes has packed for a CPU: packed
    (N, D / 2) uint8, scales (., N) bfloat16, code (16,) float32, contiguous. What its kernel
    multiplies by, the code in bfloat16 times the scales, rounded once."""
    addresses = [tensor.data_ptr() for tensor in (values, packed, scales, code)]
    _expand_at(*addresses, *values.shape, len(scales), Team.of_torch(_expand_parts))
