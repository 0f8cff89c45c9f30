"""The threads that torch computes with on a CPU."""

import ctypes
from contextlib import suppress

_SOFT = 1  # omp_pause_soft: what is set stays, the threads end


def release_threads() -> None:
    """End the threads that torch keeps for the calling thread; it gets new ones when it needs any.

    Each thread that computes gets such helpers of its own, and GNU OpenMP counts them all: where
    there are more than cores, those that wait for the next operation sleep at once, and must be
    woken. A token is hundreds of short operations; on two cores it took 1.8 times as long in a
    thread whose creator had computed before. Does nothing where OpenMP is another one.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library, function; Windows
        ctypes.CDLL(None).omp_pause_resource_all(_SOFT)
