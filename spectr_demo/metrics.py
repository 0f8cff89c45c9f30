"""What a server does, counted for Prometheus. No metric holds a word of a prompt or an answer."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from spectr_demo.engine.run import Step

PATH = "/metrics"
MOST_EXPERTS = 200  # that have a label of their own; a label costs Prometheus a series
OTHERS, NOT_KNOWN = "(others)", "(not known)"
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500)

# refused: no place in line, or a fault of the request that its sender can mend.
Outcome = Literal["finished", "stopped", "left", "refused", "failed"]


class Metrics:
    """Those of one server, in a registry of their own."""

    def __init__(self, expert_names: Iterable[str] = (), clock: Callable[[], float] | None = None):
        """expert_names: counted from 0 on; those that come later begin with their first token.
        clock: seconds."""
        self.clock = clock or time.monotonic
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory and CPU time, on Linux
        self.waiting = Gauge("spectr_runs_waiting", "Runs in line", registry=registry)
        self.running = Gauge("spectr_runs_running", "Runs that use the model", registry=registry)
        self.runs = Counter(
            "spectr_runs", "Runs that are over, by outcome", ["outcome"], registry=registry
        )
        self.in_line = Histogram(
            "spectr_in_line_seconds",
            "From a run's place in line to its turn",
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "spectr_first_token_seconds",
            "From a run's place in line to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("spectr_generated_tokens", "Tokens of all answers", registry=registry)
        self.rate = Histogram(
            "spectr_answer_tokens_per_second",
            "An answer's rate of decoding, from its first token on",
            buckets=_RATES,
            registry=registry,
        )
        self.of_expert = Counter(
            "spectr_expert_tokens",
            "Tokens of answers that are over, by the expert that served them; by weight where "
            "several did",
            ["expert"],
            registry=registry,
        )
        self._named: set[str] = set()
        self._lock = threading.Lock()
        for outcome in get_args(Outcome):
            self.runs.labels(outcome)
        for name in ("base", *expert_names):
            self.of_expert.labels(self.label(name))

    def label(self, expert: str) -> str:
        """Of the first experts their names; of all further ones the same."""
        with self._lock:
            if expert not in self._named and len(self._named) > MOST_EXPERTS:  # and "base"
                return OTHERS
            self._named.add(expert)
            return expert

    def run(
        self,
        is_refusal: Callable[[Exception], bool],
        is_gone: Callable[[], bool] = lambda: False,
    ) -> "CountedRun":
        """A run from its place in line to its end, as a context. is_refusal: whether an error is
        the request's own. is_gone: whether the client has left."""
        return CountedRun(self, is_refusal, is_gone)

    def response(self, request: Request) -> Response:
        """All of them as text, Prometheus' or OpenMetrics', whichever the scraper asks for."""
        encode, media_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self.registry), headers={"content-type": media_type})


class CountedRun:
    """One run; it is used by one thread at a time."""

    def __init__(
        self, metrics: Metrics, is_refusal: Callable[[Exception], bool], is_gone: Callable[[], bool]
    ) -> None:
        self._metrics, self._is_refusal, self._is_gone = metrics, is_refusal, is_gone
        self._has_begun = False
        self._step: Step | None = None
        self._num_tokens = 0
        # What the last trace says of each column; the steps between have none.
        self._shares: tuple[Mapping[str, float], ...] | None = None

    def __enter__(self) -> "CountedRun":
        self._came = self._metrics.clock()
        self._metrics.waiting.inc()
        return self

    def begin(self) -> None:
        """Its turn has come."""
        metrics, self._has_begun = self._metrics, True
        metrics.waiting.dec()
        metrics.running.inc()
        metrics.in_line.observe(metrics.clock() - self._came)

    def add(self, step: Step) -> None:
        """One token later in every column."""
        metrics = self._metrics
        if self._step is None:
            metrics.first_token.observe(metrics.clock() - self._came)
        self._step = step
        num_tokens = sum(column.num_tokens for column in step.columns)
        metrics.tokens.inc(num_tokens - self._num_tokens)
        self._num_tokens = num_tokens
        if (trace := step.trace) is not None:
            self._shares = tuple(
                dict(zip(trace.expert_names, trace.share(label, "answer").tolist(), strict=True))
                for label in trace.labels
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        metrics = self._metrics
        (metrics.running if self._has_begun else metrics.waiting).dec()
        metrics.runs.labels(self._outcome(error)).inc()
        if self._step is not None:
            self._add_answers(self._step)

    def _outcome(self, error: BaseException | None) -> Outcome:
        if isinstance(error, Exception):
            return "refused" if self._is_refusal(error) else "failed"
        if self._step is not None:
            if any(column.error for column in self._step.columns):
                return "failed"
            if self._step.is_last:
                return "finished"
        # Who stops a run closes its generator; what cancels its task is a client that leaves.
        is_closed = isinstance(error, GeneratorExit)
        if self._is_gone() or (error is not None and not is_closed):
            return "left"
        return "stopped" if is_closed else "finished"

    def _add_answers(self, step: Step) -> None:
        metrics = self._metrics
        for number, column in enumerate(step.columns):
            if column.tokens_per_second:
                metrics.rate.observe(column.tokens_per_second)
            share = step.expert_shares[number] if step.expert_shares else None
            if share is None and self._shares is not None:
                share = self._shares[number]
            if share is None:
                share = {NOT_KNOWN: 1.0}
            of_base = max(0.0, 1 - sum(share.values()))
            for name, part in (*share.items(), ("base", of_base)):
                if part:
                    metrics.of_expert.labels(metrics.label(name)).inc(part * column.num_tokens)
