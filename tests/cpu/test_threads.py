"""Runs do not compete with threads that nobody uses any more."""

from functools import partial
from pathlib import Path

import pytest
import torch

from spectr_demo import ui
from spectr_demo.cpu.products import multiply_in_threads
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine import model as engine
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import page

PROCESS = Path("/proc/self")


@pytest.fixture(autouse=True)
def gnu_openmp() -> None:
    maps = PROCESS / "maps"
    if torch.get_num_threads() < 2 or not maps.is_file() or "libgomp" not in maps.read_text():
        pytest.skip("needs Linux, two cores, and torch with GNU OpenMP")


def num_threads() -> int:
    return len(list((PROCESS / "task").iterdir()))


def compute() -> None:
    torch.ones(1 << 20).sqrt()


def test_helpers_end_and_come_back() -> None:
    compute()
    with_helpers = num_threads()
    release_threads()
    assert num_threads() < with_helpers
    compute()
    assert num_threads() == with_helpers


def test_compiled_products_use_them_too() -> None:
    """And no threads of their own."""
    A, x = torch.ones(1 << 12, 64), torch.ones(1, 64)
    product = torch.empty(1, 1 << 12)
    release_threads()
    alone = num_threads()
    multiply_in_threads(product, x, A)
    with_helpers = num_threads()
    assert with_helpers == alone + torch.get_num_threads() - 1
    compute()
    assert num_threads() == with_helpers


def test_nothing_to_release() -> None:
    release_threads()
    before = num_threads()
    release_threads()
    assert num_threads() == before


def test_a_run_and_a_page_release_those_of_their_caller(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[str] = []
    for module in (engine, page):
        release = partial(callers.append, module.__name__)
        monkeypatch.setattr(module, "release_threads", release)
    routed_model.compare("every day at noon", ["spectr"], max_new_tokens=2)
    ui.build(routed_model)
    assert callers == [engine.__name__, page.__name__]
