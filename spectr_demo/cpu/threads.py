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
_parallel = _openmp("GOMP_parallel")
# By its address compiled code starts torch's own threads: `void start(void (*function)(void *),
# void *argument, unsigned num, unsigned flags)` returns when the function has in all of them.
START = ctypes.cast(_parallel, ctypes.c_void_p).value or 0 if _parallel else 0


def num_threads() -> int:
    """How many threads compiled code may start: torch's, or 1 where they are not GNU OpenMP's."""
    return torch.get_num_threads() if START else 1


def release_threads() -> None:
    """End the threads that torch keeps for the calling thread; it gets new ones when it needs any.

    Each thread that computes gets such helpers of its own, and GNU OpenMP counts them all: where
    there are more than cores, those that wait for the next operation sleep at once, and must be
    woken. A token is hundreds of short operations; on two cores it took 1.8 times as long in a
    thread whose creator had computed before. Does nothing where OpenMP is another one.
    """
    if _pause is not None:
        _pause(_SOFT)
