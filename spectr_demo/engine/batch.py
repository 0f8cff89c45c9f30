"""All runs of a model that go on at once are one batch: a pass makes a token for each of them.

To read a base's weights is most of what a token costs, and one pass reads them once for all rows. A
run reads its prompt by itself. Then its rows join the batch, at the next token (continuous
batching: Yu et al. 2022, "Orca", OSDI). Rows do not see each other: each has its own keys and
values, its own experts, and the noise of its own run. So a run writes what it writes alone. One
thread does all of this, for as long as there are runs.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from spectr_demo.base.loading import LoadedBase
from spectr_demo.cpu.threads import release_threads
from spectr_demo.cpu.token import MOST_ROWS
from spectr_demo.engine.decoding import Decoding, rows_can_join
from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import SharedRecorder
from spectr_demo.engine.run import Run

T = TypeVar("T")

MOST_RUNS = 8


class Batch:
    """The runs of one model. A run of another state of the library waits until those before it have
    ended, and so does one on a base whose rows cannot be joined, or on a GPU, whose token step has
    fixed addresses (`static.py`). Who comes later does not overtake them."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._waiting: deque[Run] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._ended: list[threading.Event] = []
        self._is_working = False
        self._thread: threading.Thread | None = None
        self._clear()

    def _clear(self) -> None:
        self._runs: list[Run] = []  # in the order of their rows
        self._decoding: Decoding | None = None
        self._tokens = torch.zeros(0, dtype=torch.long)  # (R,) to be read next
        self._plan: RoutingPlan | None = None

    @property
    def most_runs(self) -> int:
        """How many may go on at once; others wait for the end of one."""
        is_open = self._base.device.type == "cpu" and rows_can_join(self._base.model)
        return MOST_RUNS if is_open else 1

    def start(self, run: Run) -> Callable[[], None]:
        """Have a run go on, as soon as it can. Gives what waits for its end."""
        with self._lock:
            self._waiting.append(run)
            self._wake()

        def wait() -> None:
            # Python may free what nobody reads in any thread, this one too, which ends the runs.
            if threading.current_thread() is not self._thread:
                run.has_ended.wait()

        return wait

    def call(self, function: Callable[[], T]) -> T:
        """What a function that uses the model gives, called between two tokens: in the same thread,
        since two that compute would be in each other's way (`cpu/threads.py`)."""
        if threading.current_thread() is self._thread:
            return function()
        called: Future[T] = Future()

        def call() -> None:
            try:
                called.set_result(function())
            except BaseException as error:  # raised in the thread that asked
                called.set_exception(error)

        release_threads()
        with self._lock:
            self._calls.append(call)
            self._wake()
        return called.result()

    def _wake(self) -> None:
        if not self._is_working:
            self._is_working = True
            self._thread = threading.Thread(target=self._work, name="batch")
            self._thread.start()

    def _work(self) -> None:
        while self._goes_on():
            self._turn()
            for has_ended in self._ended:  # and nothing here holds what such a run held
                has_ended.set()
            self._ended.clear()
        release_threads()

    @torch.inference_mode()
    def _turn(self) -> None:
        """A token for all, and one of those who wait, so that those who write go on writing."""
        try:
            if self._calls:
                self._calls.popleft()()
            self._leave_out()
            if self._admits_next():
                self._begin(self._waiting.popleft())
            if self._runs:
                self._read()
        except Exception as error:  # some layers have read a token, others not: none can go on
            for run in self._runs:
                self._end(run, error)
            self._clear()

    def _end(self, run: Run, error: Exception | None = None) -> None:
        run.end(error)
        self._ended.append(run.has_ended)

    def _goes_on(self) -> bool:
        with self._lock:
            self._is_working = bool(self._runs or self._waiting or self._calls)
            return self._is_working

    def _leave_out(self) -> None:
        """Those whose reader has left before they began."""
        with self._lock:
            left = [run for run in self._waiting if run.is_cancelled.is_set()]
            for run in left:
                self._waiting.remove(run)
        for run in left:
            self._end(run)

    def _admits_next(self) -> bool:
        if not self._waiting or not self._runs:
            return bool(self._waiting)
        run = self._waiting[0]
        return (
            len(self._runs) < self.most_runs
            and run.snapshot is self._runs[0].snapshot
            and len(self._tokens) + len(run.routers) <= MOST_ROWS
        )

    def _begin(self, run: Run) -> None:
        """Reads its prompt, and writes its first token. Then it is one of the batch."""
        try:
            decoding = run.begin()
            tokens = run.take(decoding.ids, decoding.logits)
        except Exception as error:  # raised in the thread that reads the run's steps
            self._end(run, error)
            return
        if run.is_over:
            self._end(run)
            return
        self._runs.append(run)
        if self._decoding is None:
            self._decoding, self._tokens, self._plan = decoding, tokens, run.plan
        else:
            self._decoding.join(decoding)
            self._tokens = torch.cat([self._tokens, tokens])
            self._make_plan()

    def _read(self) -> None:
        """Reads the last token of each row, and writes the next."""
        decoding = self._decoding
        assert decoding is not None
        with routed(self._plan):
            decoding.read(self._tokens)
        over: dict[Run, Exception | None] = {}
        tokens: list[Tensor] = []
        kept: list[int] = []
        stop = 0
        for run in self._runs:
            start, stop = stop, stop + len(run.rows)
            try:
                drawn = run.take(decoding.ids[start:stop], decoding.logits[start:stop])
            except Exception as error:
                over[run] = error
                continue
            if run.is_over:
                over[run] = None
            else:
                tokens.append(drawn)
                kept += range(start, stop)
        try:
            self._runs = [run for run in self._runs if run not in over]
            if not self._runs:
                self._clear()
                return
            self._tokens = torch.cat(tokens)
            if over:
                decoding.keep(kept)
                self._make_plan()
        finally:
            for run, why in over.items():
                self._end(run, why)

    def _make_plan(self) -> None:
        """Of all rows that there are now, from the next token on."""
        recorders = [run.recorder for run in self._runs]
        for each in recorders:
            if each is not None:
                each.settle()
        snapshot, recorder = self._runs[0].snapshot, recorders[0]
        if len(recorders) > 1 and any(recorders):
            num_rows = [len(run.rows) for run in self._runs]
            recorder = SharedRecorder(recorders, num_rows, snapshot.library.banks)
        rows = [(run, row) for run in self._runs for row in run.rows]
        self._plan = snapshot.plan_lanes(
            [run.routers[row.column] for run, row in rows],
            [row.lane for _, row in rows],
            recorder,
            num_answered=[run.num_tokens - 1 for run, _ in rows],
        )
