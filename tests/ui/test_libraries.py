"""Whose experts a visitor has: of all, or their own; how many may have some, and when they end."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.library import read_adapters
from spectr_demo.experts.preflight import Candidate
from spectr_demo.ui import libraries as module
from spectr_demo.ui.libraries import IDLE_SECONDS, MOST_ADDED, MOST_VISITORS, Libraries, is_owner
from spectr_demo.ui.visitors import Visitor
from tests.conftest import SaveExpert


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def be(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function after which the handler is called by another visitor."""
    now = {"name": "one"}
    monkeypatch.setattr(module, "visitor", lambda: Visitor(name=now["name"], is_gone=lambda: False))
    return lambda name: now.update(name=name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def libraries(routed_model: SpectrModel, clock: Clock) -> Libraries:
    return Libraries(routed_model, clock=clock)


def candidate(libraries: Libraries, source: str) -> Candidate:
    (adapter,), problems = read_adapters(source, libraries.shared.model.config)
    assert problems == []
    return Candidate.of(adapter, libraries.model.library)


def names(libraries: Libraries) -> tuple[str, ...]:
    return libraries.model.library.names


def test_what_one_visitor_changes_no_other_has(
    libraries: Libraries, be: Callable[[str], None], save_expert: SaveExpert
) -> None:
    be("one")
    libraries.propose(candidate(libraries, save_expert("mine", seed=5)))
    assert not libraries.is_own, "nothing is changed yet"
    assert libraries.add(for_all=False) == "mine"
    assert libraries.candidate is None
    assert names(libraries) == ("red", "green", "blue", "mine")
    be("two")
    assert names(libraries) == ("red", "green", "blue") and not libraries.is_own
    with pytest.raises(ValueError, match="there is no adapter to add: look at one first"):
        libraries.add(for_all=False)
    libraries.change(lambda model: model.remove("red"), for_all=False)
    assert names(libraries) == ("green", "blue")
    be("one")
    assert names(libraries) == ("red", "green", "blue", "mine")
    assert libraries.shared.library.names == ("red", "green", "blue")


def test_a_change_for_all_reaches_those_without_their_own(
    libraries: Libraries, be: Callable[[str], None]
) -> None:
    be("one")
    libraries.change(lambda model: model.disable("blue"), for_all=False)
    assert not libraries.is_behind
    be("owner")
    libraries.change(lambda model: model.remove("red"), for_all=True)
    assert names(libraries) == ("green", "blue") and not libraries.is_own
    be("two")
    assert names(libraries) == ("green", "blue")
    be("one")
    assert names(libraries) == ("red", "green"), "they keep theirs"
    assert libraries.is_behind
    libraries.take_that_of_all()
    assert names(libraries) == ("green", "blue") and not libraries.is_behind


def test_a_page_is_told_once_that_it_shows_another_library(
    libraries: Libraries, be: Callable[[str], None]
) -> None:
    be("one")
    assert libraries.news() is None
    libraries.change(lambda model: model.remove("red"), for_all=True)
    for name in ("one", "two"):
        be(name)
        assert libraries.news() is libraries.shared
        assert libraries.news() is None
    libraries.change(lambda model: model.remove("green"), for_all=False)
    assert libraries.news() is libraries.model is not libraries.shared
    be("one")
    assert libraries.news() is None


def test_a_change_that_fails_leaves_the_library_of_all(
    libraries: Libraries, be: Callable[[str], None]
) -> None:
    be("one")
    with pytest.raises(ValueError, match="unknown expert 'wild'"):
        libraries.change(lambda model: model.remove("wild"), for_all=False)
    assert not libraries.is_own


def test_memory_comes_back_when_the_page_is_closed(
    libraries: Libraries, be: Callable[[str], None]
) -> None:
    be("one")
    libraries.change(lambda model: model.remove("red"), for_all=False)
    bank = weakref.ref(libraries.model.library.banks[0])
    snapshot = libraries.model.snapshot  # of a run that goes on
    libraries.leave()
    assert not libraries.is_own
    gc.collect()
    assert bank() is not None
    del snapshot
    gc.collect()
    assert bank() is None


def test_so_many_visitors_have_their_own_until_one_leaves_or_is_idle(
    libraries: Libraries, be: Callable[[str], None], clock: Clock
) -> None:
    def change() -> None:
        libraries.change(lambda model: model.disable("red"), for_all=False)

    for number in range(MOST_VISITORS):
        be(f"{number}")
        change()
        clock.now += 1
    be("late")
    with pytest.raises(ValueError, match="16 visitors have experts of their own here"):
        change()
    assert not libraries.is_own
    be("3")
    libraries.leave()
    be("late")
    change()
    be("later")
    with pytest.raises(ValueError, match="try again later"):
        change()
    clock.now += IDLE_SECONDS - 10
    be("0")
    assert libraries.is_own  # who does something is not idle
    clock.now += 10
    be("later")
    change()
    be("1")
    assert not libraries.is_own
    be("0")
    assert libraries.is_own


def test_a_visitor_adds_so_many(
    libraries: Libraries, be: Callable[[str], None], save_expert: SaveExpert
) -> None:
    be("one")
    sources = [save_expert(f"mine{i}", seed=i, r=2) for i in range(MOST_ADDED + 1)]
    for source in sources[:-1]:
        libraries.propose(candidate(libraries, source))
        libraries.add(for_all=False)
    libraries.propose(candidate(libraries, sources[-1]))
    with pytest.raises(ValueError, match=r"you have added 4 experts.*remove one of them first"):
        libraries.add(for_all=False)
    libraries.change(lambda model: model.remove("mine0"), for_all=False)
    assert libraries.add(for_all=False) == f"mine{MOST_ADDED}", "it is still the one looked at"


def test_a_large_library_is_not_copied_for_one(
    libraries: Libraries, be: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    be("one")
    size = module.num_bytes(libraries.shared.library)
    assert size > 0
    monkeypatch.setattr(module, "free_memory", lambda device: 9 * size)
    with pytest.raises(ValueError, match="it can only be changed for all"):
        libraries.change(lambda model: model.remove("red"), for_all=False)
    libraries.change(lambda model: model.remove("red"), for_all=True)


def test_what_runs_elsewhere_gets_no_snapshot(routed_model: SpectrModel) -> None:
    def run(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    snapshot = routed_model.snapshot
    assert Libraries(routed_model, is_fixed=True).bound(run, snapshot)("x") == (("x",), {})
    bound: Any = Libraries(routed_model).bound(run, snapshot)
    assert bound("x") == (("x",), {"snapshot": snapshot})


@pytest.mark.parametrize(
    ("set_to", "given", "expected"),
    [
        ("s3cret", "s3cret", True),
        ("s3cret", "s3cre", False),
        ("s3cret", "", False),
        ("s3cret", "ключ", False),
        ("", "", False),
        ("", "s3cret", False),
        (None, "", False),
    ],
)
def test_the_owner_is_who_has_the_token(
    set_to: str | None, given: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECTR_OWNER_TOKEN", raising=False)
    if set_to is not None:
        monkeypatch.setenv("SPECTR_OWNER_TOKEN", set_to)
    assert is_owner(given) is expected
