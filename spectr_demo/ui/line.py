"""One fair line in front of a model that makes some runs at a time: a visitor after the other."""

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import gradio as gr

from spectr_demo.charts.text import counted
from spectr_demo.engine.run import Step
from spectr_demo.metrics import Metrics
from spectr_demo.ui.run import Waiting
from spectr_demo.ui.visitors import visitor

PLACES = 64  # runs that wait
PLACES_EACH = 3  # runs of one visitor, the one that goes on included
TICK = 0.5  # seconds between two looks at whether someone who waits is still there
P = ParamSpec("P")
T = TypeVar("T")
_REMEMBERED = 20  # runs, of which the mean says what the next ones will take


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A run that waits or goes on. name: the visitor's. begun: when, by the line's clock."""

    name: str
    begun: float | None = None


class Line:
    """The order of runs: the first of each visitor, then the second of each."""

    def __init__(
        self,
        most_runs: int = 1,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        """most_runs: that may go on at once. metrics: those of the server, where its runs are
        counted."""
        self._most_runs = most_runs
        self._clock = clock
        self.metrics = metrics or Metrics()
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Ticket]] = {}  # by visitor; whose turn it is stands first
        self._running: list[Ticket] = []  # in the order in which they began
        self._took: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def ticket(self, name: str) -> Iterator[Ticket]:
        """A place of a visitor, until this is left; with it the run ends. Raises gr.Error where
        there is no place."""
        ticket = Ticket(name=name)
        with self._changed:
            self._check_room(name)
            self._waiting.setdefault(name, deque()).append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._leave(ticket)
                self._changed.notify_all()

    def begins(self, ticket: Ticket, seconds: float) -> bool:
        """Whether its run may go on. Waits for its turn, for so many seconds at most."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_next(ticket), seconds):
                return False
            others = self._waiting.pop(ticket.name)
            others.popleft()
            if others:  # behind all other visitors
                self._waiting[ticket.name] = others
            self._running.append(ticket)
            ticket.begun = self._clock()
            self._changed.notify_all()  # another may find a place, too
            return True

    def waiting(self, ticket: Ticket) -> Waiting:
        """Where a ticket stands."""
        with self._changed:
            num_before = self._order().index(ticket)
            is_full = len(self._running) == self._most_runs
            seconds = None
            if self._took:
                run = statistics.fmean(self._took)  # of which some go on at once
                seconds = num_before * run / self._most_runs
                if is_full:
                    begun = self._running[0].begun
                    assert begun is not None
                    seconds += max(0.0, run - (self._clock() - begun))
            return Waiting(place=1 + num_before + is_full, seconds=seconds)

    def _is_next(self, ticket: Ticket) -> bool:
        has_room = len(self._running) < self._most_runs
        return has_room and next(iter(self._waiting.values()))[0] is ticket

    def _order(self) -> list[Ticket]:
        turns = itertools.zip_longest(*self._waiting.values())
        return [ticket for turn in turns for ticket in turn if ticket is not None]

    def _check_room(self, name: str) -> None:
        own = len(self._waiting.get(name, ()))
        own += sum(ticket.name == name for ticket in self._running)
        if own >= PLACES_EACH:
            raise _refused(
                f"{counted(own, 'run')} of yours wait or go on, which is as many as one visitor "
                "may have: stop one of them, or wait for its end"
            )
        if sum(map(len, self._waiting.values())) >= PLACES:
            raise _refused(f"{counted(PLACES, 'run')} wait for the model: try again in a minute")

    def _leave(self, ticket: Ticket) -> None:
        if ticket.begun is None:
            self._waiting[ticket.name].remove(ticket)
            if not self._waiting[ticket.name]:
                del self._waiting[ticket.name]
        else:
            self._took.append(self._clock() - ticket.begun)
            self._running.remove(ticket)


def _refused(message: str) -> gr.Error:
    return gr.Error(message, print_exception=False)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, gr.Error)


def in_line(
    run: Callable[P, Generator[T, None, None]], line: Line | None = None
) -> Callable[P, Generator[Waiting | T, None, None]]:
    """The same runs, as many at a time as the line lets through. One whose visitor is gone leaves
    the line, or ends within two tokens: the one that is being made, and the next.

    It goes around what asks for a GPU, which so is not held by those who wait. line: that others
    stand in, too; None is one of its own.
    """
    line = line or Line()

    def in_turn(*args: P.args, **kwargs: P.kwargs) -> Generator[Waiting | T, None, None]:
        who, seconds = visitor(), 0.0
        with line.metrics.run(_is_refusal, who.is_gone) as counted, line.ticket(who.name) as ticket:
            while not line.begins(ticket, seconds):
                if who.is_gone():
                    return
                yield line.waiting(ticket)
                seconds = TICK
            counted.begin()
            if seconds:
                yield Waiting(place=1, seconds=0.0)
            with closing(run(*args, **kwargs)) as going:
                for item in going:
                    if isinstance(item, Step):
                        counted.add(item)
                    if who.is_gone():
                        return
                    yield item

    return in_turn
