"""The threads that torch computes with on a CPU: GNU OpenMP's, shared with compiled loops."""

import ctypes
from contextlib import suppress
from typing import Any

import torch

_SOFT = 1  # omp_pause_soft: what is set stays, the threads end


def _openmp(name: str, *arguments: Any) -> Any:
    """A C function of the OpenMP that this process has loaded; None if it is another one."""
    with suppress(OSError, AttributeError, TypeError):  # no such library, function; Windows
        function = getattr(ctypes.CDLL(None), name)
        function.argtypes = arguments
        return function
    return None


_pause = _openmp("omp_pause_resource_all", ctypes.c_int)
_parallel = _openmp("GOMP_parallel", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def release_threads() -> None:
    """End the threads that torch keeps for the calling thread; it gets new ones when it needs any.

    Each thread that computes gets such helpers of its own, and GNU OpenMP counts them all: where
    there are more than cores, those that wait for the next operation sleep at once, and must be
    woken. A token is hundreds of short operations; on two cores it took 1.8 times as long in a
    thread whose creator had computed before. Does nothing where OpenMP is another one.
    """
    if _pause is not None:
        _pause(_SOFT)


def num_threads() -> int:
    """How many threads `run_in_threads` may use: torch's, or 1 where they are not OpenMP's."""
    return 1 if _parallel is None else torch.get_num_threads()


def start_address() -> int:
    """Of the C function by which compiled code does what `run_in_threads` does: `void start(void
    (*function)(void *), void *argument, unsigned num, unsigned zero)`. 0 if there is none."""
    return 0 if _parallel is None else ctypes.cast(_parallel, ctypes.c_void_p).value or 0


def run_in_threads(function: int, argument: int, num: int) -> None:
    """Call a C function `void f(void *argument)`, by its address, in so many threads at once, and
    return when all have returned.

    The threads are torch's own, so that none compete with them. num: all that it has; OpenMP would
    end the others, and make them anew for torch's next operation.
    """
    assert _parallel is not None
    _parallel(function, argument, num, 0)
