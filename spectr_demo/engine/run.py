"""One run: its thread, its clock, its steps.

All columns are rows of one batch. They share one forward pass per token, one KV cache and the same
sampling noise. transformers' own `generate` runs them, under the run's plan.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from spectr_demo.base.loading import LoadedBase
from spectr_demo.config import GenerationSettings, RouterConfig, library_versions
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.layers import routed
from spectr_demo.engine.plan import RoutingPlan
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.sampling import (
    Cancelled,
    TokenStreamer,
    end_token_ids,
    logits_processors,
    pad_token_id,
)
from spectr_demo.engine.tracing import build_trace
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class ColumnOutput:
    """One column so far. num_tokens counts generated tokens, the end token included;
    tokens_per_second is the rate of decoding, from its first token on (0 before the second)."""

    label: str
    text: str
    num_tokens: int
    is_finished: bool
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token later in every column. The last step of a recorded run carries its full trace; a
    partial trace comes every `trace_every` tokens before, where asked for."""

    columns: tuple[ColumnOutput, ...]
    is_last: bool = False
    trace: RoutingTrace | None = None


class Run:
    """Nothing of it outlives `steps()`."""

    def __init__(
        self,
        base: LoadedBase,
        library: ExpertLibrary,
        routers: Sequence[RouterConfig],
        prompt_ids: list[int],
        settings: GenerationSettings,
        make_plan: Callable[[Recorder | None], RoutingPlan],
        *,
        record: bool,
        trace_every: int | None,
    ) -> None:
        """make_plan: called in the run's own thread, since it may read the prompt."""
        self.base = base
        self.library = library
        self.labels = unique_labels(routers)
        self.prompt_ids = prompt_ids
        self.settings = settings
        self.make_plan = make_plan
        self.recorder = Recorder() if record else None
        self.trace_every = trace_every if record else None
        self.end_ids = end_token_ids(base)
        self.answers: list[list[int]] = [[] for _ in routers]
        self.is_finished = [False] * len(routers)
        self.clock: list[list[float]] = [[] for _ in routers]  # first and last token's time
        self.is_cancelled = threading.Event()
        self.queue: SimpleQueue[Step | BaseException | None] = SimpleQueue()

    def steps(self) -> Iterator[Step]:
        worker = threading.Thread(target=contextvars.copy_context().run, args=(self._work,))
        release_threads()  # the caller's, in whose way the worker's would be
        worker.start()
        try:
            while (item := self.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.is_cancelled.set()
            worker.join()

    def _work(self) -> None:
        """In the worker thread: transformers' own generation, under this run's plan."""
        try:
            self.plan = self.make_plan(self.recorder)
            with torch.inference_mode(), routed(self.plan):
                self._generate()
                if not self.is_cancelled.is_set():
                    trace = self._trace(is_complete=True) if self.recorder else None
                    self.queue.put(replace(self._step(), is_last=True, trace=trace))
        except Exception as error:  # handed to the thread that reads the steps, and raised there
            self.queue.put(error)
        finally:
            self.queue.put(None)

    def _generate(self) -> None:
        model: Any = self.base.model
        input_ids = torch.tensor([self.prompt_ids] * len(self.answers), device=self.base.device)
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(
                max_new_tokens=self.settings.max_new_tokens,
                do_sample=False,  # sampling is the last processor's, with a generator of its own
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=pad_token_id(self.base, self.end_ids),
            ),
            logits_processor=logits_processors(self.settings),
            stopping_criteria=StoppingCriteriaList([Cancelled(self.is_cancelled)]),
            streamer=TokenStreamer(self._add_tokens),
        )

    def _add_tokens(self, token_ids: list[int]) -> None:
        now = time.perf_counter()
        for row, token_id in enumerate(token_ids):
            if not self.is_finished[row]:
                self.answers[row].append(token_id)
                self.clock[row] = [*self.clock[row][:1], now]
                self.is_finished[row] = (
                    token_id in self.end_ids
                    or len(self.answers[row]) == self.settings.max_new_tokens
                )
        num_tokens = max(map(len, self.answers))
        is_due = self.trace_every is not None and num_tokens % self.trace_every == 0
        trace = self._trace(is_complete=False) if is_due and not all(self.is_finished) else None
        self.queue.put(replace(self._step(), trace=trace))

    def _step(self) -> Step:
        return Step(
            columns=tuple(
                ColumnOutput(
                    label=label,
                    text=self._text(answer),
                    num_tokens=len(answer),
                    is_finished=is_finished,
                    tokens_per_second=_rate(len(answer), clock),
                )
                for label, answer, is_finished, clock in zip(
                    self.labels, self.answers, self.is_finished, self.clock, strict=True
                )
            )
        )

    def _text(self, answer: list[int]) -> str:
        text = str(self.base.tokenizer.decode(answer, skip_special_tokens=True))
        return text.rstrip("�")  # the first bytes of a character whose rest is still to come

    def _trace(self, *, is_complete: bool) -> RoutingTrace:
        return build_trace(
            model=self.base.model,
            tokenizer=self.base.tokenizer,
            library=self.library,
            plan=self.plan,
            labels=self.labels,
            prompt_ids=self.prompt_ids,
            answers=self.answers,
            is_complete=is_complete,
            meta={
                "model": self.base.source,
                "model_fingerprint": self.base.fingerprint,
                "quantization": self.base.quantization,
                "experts": {a.name: a.sha256 for a in self.library.adapters},
                "generation": self.settings.to_json(),
                "versions": library_versions(),
            },
        )


def unique_labels(routers: Sequence[RouterConfig]) -> list[str]:
    """A label for each column: its router, its expert, and a number where that is not unique."""
    labels: list[str] = []
    for router in routers:
        label = router.name if router.expert is None else f"{router.name}:{router.expert}"
        same = sum(known == label or known.startswith(f"{label} (") for known in labels)
        labels.append(f"{label} ({same + 1})" if same else label)
    return labels


def _rate(num_tokens: int, clock: list[float]) -> float:
    if num_tokens < 2 or clock[-1] <= clock[0]:
        return 0.0
    return (num_tokens - 1) / (clock[-1] - clock[0])
