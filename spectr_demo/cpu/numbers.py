"""What compiled code is made of: the compiler's settings, tensors by their address, bfloat16.

numba does not know bfloat16. Such values are kept as uint16, their bits: bfloat16 is the upper half
of a float32.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

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

# Sums may be reordered, which lets them run in vectors; infinities keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}
_LINE_BYTES = 64
DTYPES = (torch.float32, torch.bfloat16)


def compiled(function: Callable[..., Any]) -> Any:
    """By numba, when it is first called; without Python's lock, and cached on disk if it can be."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=FASTMATH)(function)
    with suppress(RuntimeError):  # no folder can be written: compiled anew at each start
        dispatcher.enable_caching()
    return dispatcher


def stored(values: Tensor) -> Stored:
    """The memory of a tensor on a CPU, in float32 or bfloat16."""
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    return values.numpy()


def as_float(value):  # type: ignore[no-untyped-def]
    raise NotImplementedError("in compiled code only")


@overload(as_float, inline="always")
def _as_float_of(value):  # type: ignore[no-untyped-def]
    if isinstance(value, numba.types.Integer):  # bfloat16 is the upper half of a float32
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@compiled
def rounded_bits(value: Any) -> Any:
    """Those of a number rounded to bfloat16: the upper half of a float32's."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16(
        (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


def _to_pointer(typing_context, address):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.voidptr(numba.types.int64), build


pointer: Any = intrinsic(_to_pointer)


@compiled
def floats_at(x: int, is_bfloat16: bool, num_rows: int, size: int) -> Floats:
    """(R, D) float32: a copy of what a tensor has at this address, in float32 or bfloat16."""
    values, num = np.empty((num_rows, size), np.float32), num_rows * size
    flat = values.reshape(num)
    if is_bfloat16:
        bits = numba.carray(pointer(x), num, np.uint16)
        for i in range(num):
            flat[i] = as_float(bits[i])
    else:
        flat[:] = numba.carray(pointer(x), num, np.float32)
    return values


@compiled
def add_values_at(y: int, is_bfloat16: bool, row: int, delta: Floats) -> None:
    """`y[row] += delta` (D,) in a tensor (R, D) at this address, rounded once."""
    num = len(delta)
    if is_bfloat16:
        bits = numba.carray(pointer(y + 2 * row * num), num, np.uint16)
        for d in range(num):
            bits[d] = rounded_bits(as_float(bits[d]) + delta[d])
    else:
        values = numba.carray(pointer(y + 4 * row * num), num, np.float32)
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


@compiled
def ask_for(address: int, num_bytes: int) -> None:
    """Ask memory for so many bytes, without waiting for them."""
    for line in range(0, num_bytes, _LINE_BYTES):
        _prefetch(address + line)  # type: ignore[call-arg]
