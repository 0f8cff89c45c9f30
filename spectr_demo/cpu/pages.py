"""Memory on a CPU: kept when it is freed, in large pages, or mapped from a file."""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_memory() -> None:
    """Let the C library keep up to 128 MB that this process has freed, for what it needs next.

    GNU's gives blocks of some hundred kB back at once, and gets them again from the system page by
    page, each cleared: for adapters that are aligned one after another half of the time. Does
    nothing with another library.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such function; Windows
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, 128 << 20)
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # blocks below come from what is kept


def zeros_in_large_pages(
    shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros in a CPU's memory, which Linux is asked to map in pages of 2 MB where they fill some:
    then rows from anywhere in a large library are found sooner."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def zeros_on_disk(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Zeros that are mapped from a file in `folder`: the system keeps in memory what is used.

    The file has no name any more when this returns, and is gone with the tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_values = torch.Size(shape).numel()
    with NamedTemporaryFile(dir=folder) as file:
        return torch.from_file(file.name, shared=True, size=num_values, dtype=dtype).view(shape)
