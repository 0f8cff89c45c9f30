"""Runs do not compete with threads that nobody uses any more.

Threads are told apart by their ids: those of other tests may end at any moment, and one that was
told to end is listed until the system has cleared it away.
"""

import time
from functools import partial
from pathlib import Path

import pytest
import torch

from spectr_demo import ui
from spectr_demo.cpu.products import multiply_in_threads
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine import run
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import page

PROCESS = Path("/proc/self")
PATIENCE = 60.0  # seconds; a busy machine clears a thread away late


@pytest.fixture(autouse=True)
def gnu_openmp() -> None:
    maps = PROCESS / "maps"
    if torch.get_num_threads() < 2 or not maps.is_file() or "libgomp" not in maps.read_text():
        pytest.skip("needs Linux, two cores, and torch with GNU OpenMP")


def threads() -> set[str]:
    """The ids of this process's threads."""
    return {task.name for task in (PROCESS / "task").iterdir()}


def num_helpers() -> int:
    """How many threads an operation needs beside its caller's."""
    return torch.get_num_threads() - 1


def compute() -> None:
    torch.ones(1 << 20).sqrt()


def end(ids: set[str]) -> bool:
    """Whether none of the threads is there any more, soon."""
    limit = time.monotonic() + PATIENCE
    while ids & threads():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def test_helpers_end_and_come_back() -> None:
    release_threads()
    alone = threads()
    compute()
    helpers = threads() - alone
    assert len(helpers) == num_helpers()
    release_threads()
    assert end(helpers)
    alone = threads()
    compute()
    assert len(threads() - alone) == num_helpers()


def test_compiled_products_use_them_too() -> None:
    """And no threads of their own."""
    A, x = torch.ones(1 << 12, 64), torch.ones(1, 64)
    product = torch.empty(1, 1 << 12)
    release_threads()
    alone = threads()
    multiply_in_threads(product, x, A)
    with_helpers = threads()
    assert len(with_helpers - alone) == num_helpers()
    compute()
    assert threads() <= with_helpers


def test_nothing_to_release() -> None:
    release_threads()
    release_threads()
    alone = threads()
    compute()
    assert len(threads() - alone) == num_helpers()


def test_a_run_and_a_page_release_those_of_their_caller(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[str] = []
    for module in (run, page):
        release = partial(callers.append, module.__name__)
        monkeypatch.setattr(module, "release_threads", release)
    routed_model.compare("every day at noon", ["spectr"], max_new_tokens=2)
    ui.build(routed_model)
    assert callers == [run.__name__, page.__name__]
