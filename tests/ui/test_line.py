"""The line in front of the model: its order, its places, and those who leave it."""

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import Any

import gradio as gr
import pytest

from spectr_demo.config import GenerationSettings
from spectr_demo.routing.routers import parse_router
from spectr_demo.ui import cards, line
from spectr_demo.ui.line import PLACES, PLACES_EACH, Line, Ticket, in_line
from spectr_demo.ui.run import Waiting, frames
from spectr_demo.ui.visitors import Visitor
from tests.ui.test_run import NAMES, FakeSteps

SETTINGS = GenerationSettings()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stand(queue: Line, names: str) -> tuple[list[Ticket], list[ExitStack]]:
    """A ticket for each letter, whose visitor it names, and what gives it up."""
    places = [ExitStack() for _ in names]
    pairs = zip(places, names, strict=True)
    return [place.enter_context(queue.ticket(name)) for place, name in pairs], places


@pytest.mark.parametrize(
    ("came", "order"),
    [
        ("abc", [0, 1, 2]),
        ("aaab", [0, 3, 1, 2]),
        ("aabbc", [0, 2, 4, 1, 3]),
    ],
)
def test_visitors_take_turns(came: str, order: list[int]) -> None:
    queue = Line()
    tickets, places = stand(queue, came)
    ran: list[int] = []
    while len(ran) < len(tickets):
        waiting = [n for n in range(len(tickets)) if n not in ran]
        (begun,) = [n for n in waiting if queue.begins(tickets[n], 0)]
        ran.append(begun)
        assert not any(queue.begins(tickets[n], 0) for n in waiting if n != begun)
        places[begun].close()
    assert ran == order


def test_a_newcomer_waits_for_one_run_of_each_other_visitor() -> None:
    queue = Line()
    tickets, _places = stand(queue, "aaa")
    assert queue.begins(tickets[0], 0)
    (newcomer,), _place = stand(queue, "b")
    assert queue.waiting(newcomer).place == 3  # the run that goes on, and one more of a


def test_a_place_is_told_and_the_time_until_it_once_a_run_has_ended() -> None:
    clock = Clock()
    queue = Line(clock=clock)
    tickets, places = stand(queue, "abcd")
    assert [queue.waiting(ticket) for ticket in tickets[:2]] == [
        Waiting(place=1, seconds=None),
        Waiting(place=2, seconds=None),
    ]
    assert queue.begins(tickets[0], 0)
    assert queue.waiting(tickets[1]) == Waiting(place=2, seconds=None)
    clock.now = 10
    places[0].close()
    assert queue.begins(tickets[1], 0)
    clock.now = 14
    assert queue.waiting(tickets[2]) == Waiting(place=2, seconds=6)
    assert queue.waiting(tickets[3]) == Waiting(place=3, seconds=16)
    clock.now = 40  # longer than the mean
    assert queue.waiting(tickets[3]) == Waiting(place=3, seconds=10)
    places[1].close()  # 30 s: the mean is 20 s
    assert queue.waiting(tickets[3]) == Waiting(place=2, seconds=20)
    places[2].close()  # it never ran
    assert queue.begins(tickets[3], 0)


def test_a_visitor_has_a_few_places_and_the_line_an_end() -> None:
    queue = Line()
    tickets, places = stand(queue, "a" * PLACES_EACH)
    assert queue.begins(tickets[0], 0)
    with pytest.raises(gr.Error, match=r"3 runs of yours .*: stop one of them"):
        stand(queue, "a")
    places[1].close()
    others = "".join(chr(1000 + n) for n in range(PLACES - PLACES_EACH + 1))
    _kept = stand(queue, "a"), stand(queue, others)
    with pytest.raises(gr.Error, match="64 runs wait for the model: try again"):
        stand(queue, "z")


def drain(run: Generator[Any, None, None], items: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: items.extend(run))
    thread.start()
    return thread


def as_visitor(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, threading.Event]:
    """The next runs are of these visitors; each can be made to leave."""
    left = {name: threading.Event() for name in names}
    visitors = iter([Visitor(name=name, is_gone=event.is_set) for name, event in left.items()])
    monkeypatch.setattr(line, "visitor", lambda: next(visitors))
    return left


def asked(steps: Callable[..., Any]) -> Generator[Any, None, None]:
    return steps("hello", [parse_router("spectr", NAMES)], SETTINGS)


def test_runs_go_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "TICK", 0.01)
    as_visitor(monkeypatch, "first", "second")
    fake = FakeSteps(5)
    steps = in_line(fake)
    first, second = asked(steps), asked(steps)
    assert next(first).columns[0].text == "x"
    waited = [next(second), next(second)]
    assert waited == [Waiting(place=2, seconds=None)] * 2
    assert len(list(first)) == 4
    turn, *rest = second
    assert turn == Waiting(place=1, seconds=0.0)
    assert [step.columns[0].num_tokens for step in rest] == [1, 2, 3, 4, 5]


def test_who_leaves_the_line_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "TICK", 0.01)
    left = as_visitor(monkeypatch, "first", "gone", "closed", "last")
    steps = in_line(FakeSteps(5))
    first, gone, closed, last = (asked(steps) for _ in range(4))
    next(first)
    assert [next(run).place for run in (gone, closed, last)] == [2, 3, 4]
    left["gone"].set()
    assert list(gone) == []
    assert next(last).place == 3
    closed.close()
    assert next(last).place == 2
    first.close()
    assert next(last) == Waiting(place=1, seconds=0.0)


def test_a_run_ends_with_the_token_after_which_its_visitor_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = as_visitor(monkeypatch, "first", "next")
    fake = FakeSteps(1_000_000)
    steps = in_line(fake)
    run = asked(steps)
    next(run), next(run)
    left["first"].set()
    assert list(run) == []
    assert fake.is_closed
    assert fake.num_made == 3
    assert next(asked(steps)).columns[0].num_tokens == 1  # the model is free


def test_frames_show_the_place_and_stop_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "TICK", 0.01)
    as_visitor(monkeypatch, "first", "second", "third")
    steps = in_line(FakeSteps(5))
    first = asked(steps)
    next(first)
    stop = threading.Event()
    routers = [parse_router("spectr", NAMES)]
    shown = frames(steps, "hello", routers, SETTINGS, stop)
    assert "reading the prompt" in cards.answers(next(shown), NAMES)
    assert "number 2 in line<" in cards.answers(next(shown), NAMES)
    stop.set()
    (last,) = shown
    assert last.status == "stopped"
    assert "■ stopped" in cards.answers(last, NAMES)

    third = frames(steps, "hello", routers, SETTINGS, threading.Event())
    next(third)
    assert next(third).in_line == Waiting(place=2, seconds=None)
    first.close()
    frame = next(third)
    assert (frame.status, frame.in_line) == ("waiting", None)
    assert "reading the prompt" in cards.answers(frame, NAMES)
    assert list(third)[-1].status == "finished"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "number 2 in line"),
        (12.3, "number 2 in line, about 12 s"),
        (0.0, "number 2 in line, about 1 s"),
    ],
)
def test_the_words_of_a_place(seconds: float | None, words: str) -> None:
    assert cards.in_line(Waiting(place=2, seconds=seconds)) == words


def test_every_run_is_counted_by_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "TICK", 0.01)
    names = ["finished", "stopped", "gone", "gone in line", "failed"]
    left = as_visitor(monkeypatch, *names)
    queue = Line()
    steps = in_line(FakeSteps(5), queue)
    routers = [parse_router("spectr", NAMES)]
    assert list(frames(steps, "hello", routers, SETTINGS, threading.Event()))  # closed at its end

    stopped = asked(steps)
    next(stopped)
    stopped.close()

    gone, waits = asked(steps), asked(steps)
    next(gone), next(waits)
    assert gauges(queue) == (1, 1)
    for name, run in (("gone in line", waits), ("gone", gone)):
        left[name].set()
        assert list(run) == []

    with pytest.raises(RuntimeError):
        list(asked(in_line(broken, queue)))
    monkeypatch.setattr(line, "visitor", lambda: Visitor(name="greedy", is_gone=lambda: False))
    held = [asked(steps) for _ in range(PLACES_EACH)]
    for run in held:
        next(run)
    with pytest.raises(gr.Error):
        next(asked(steps))
    for run in reversed(held):
        run.close()

    outcomes = {
        outcome: queue.metrics.registry.get_sample_value("spectr_runs_total", {"outcome": outcome})
        for outcome in ("finished", "stopped", "left", "failed", "refused")
    }
    stopped_too = {"stopped": 1 + PLACES_EACH}
    assert outcomes == {"finished": 1, "left": 2, "failed": 1, "refused": 1} | stopped_too
    assert gauges(queue) == (0, 0)


def gauges(queue: Line) -> tuple[float, float]:
    """Runs that wait, and runs that go on."""
    of = queue.metrics.registry.get_sample_value
    return of("spectr_runs_waiting") or 0, of("spectr_runs_running") or 0


def broken(*args: Any) -> Generator[Any, None, None]:
    raise RuntimeError("out of memory")
    yield


def test_threads_that_wait_are_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(n) for n in range(20)]
    monkeypatch.setattr(line, "TICK", 60.0)  # only a turn that comes ends the wait
    as_visitor(monkeypatch, *names)
    steps = in_line(FakeSteps(3))
    items: list[list[Any]] = [[] for _ in names]
    threads = [drain(asked(steps), each) for each in items]
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    for each in items:
        assert [x.columns[0].num_tokens for x in each if not isinstance(x, Waiting)] == [1, 2, 3]
