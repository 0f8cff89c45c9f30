"""Memory that is kept, and memory in large pages: what the system is asked for."""

import mmap
import subprocess
import sys

import pytest
import torch

from spectr_demo.cpu.pages import zeros_in_large_pages

CPU = torch.device("cpu")
FAULTS = """
import resource, sys, torch
from spectr_demo.cpu.pages import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 20), torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_freed_memory_is_used_again() -> None:
    """In a process of its own, since it stays set."""
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120
    )
    before, after = map(int, run.stdout.split())
    assert after < before / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 100_000])
def test_zeros_in_large_pages_are_zeros(rows: int, dtype: torch.dtype) -> None:
    zeros = zeros_in_large_pages((rows, 16), dtype=dtype, device=CPU)
    assert zeros.shape == (rows, 16)
    assert zeros.dtype == dtype
    assert not zeros.any()
    zeros[-1] = 1
    assert float(zeros.sum()) == 16
    assert not zeros_in_large_pages((rows, 16), dtype=dtype, device=CPU).any(), "memory is shared"


def test_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert zeros_in_large_pages((100_000, 16), dtype=torch.float32, device=CPU).shape[0] == 100_000
