"""One run: its rows, its clock, its steps.

All columns are rows of one batch. They share one forward pass per token, one KV cache and the same
sampling noise. A column whose router finds several requests in the prompt has a row for each of
them; its answer is theirs, in order. The thread of `batch.py` makes the tokens.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import pad_left
from spectr_demo.config import GenerationSettings, RouterConfig, library_versions
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.batches import check_rows
from spectr_demo.engine.decoding import Decoding
from spectr_demo.engine.faults import FiniteLogits, fault_of
from spectr_demo.engine.layers import routed
from spectr_demo.engine.recorder import Recorder
from spectr_demo.engine.sampling import end_token_ids, logits_processors, pad_token_id
from spectr_demo.engine.snapshot import Snapshot
from spectr_demo.engine.static import token_step
from spectr_demo.engine.tracing import Row, build_trace
from spectr_demo.trace import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class ColumnOutput:
    """One column so far. text: the answers to its requests, a line each where there are several.
    num_settled: its first characters that stay, while several answers grow side by side.
    num_tokens counts generated tokens, end tokens included; tokens_per_second is the rate of
    decoding, from the first token on (0 before the second). is_cut: whether an answer has all the
    tokens that it may have, and no end. error: why an answer ends before; see `engine/faults.py`.
    """

    label: str
    text: str
    num_settled: int
    num_tokens: int
    is_finished: bool
    tokens_per_second: float
    is_cut: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token later in every column. The last step of a recorded run carries its full trace; a
    partial trace comes every `trace_every` tokens before, where asked for.

    expert_shares: of each column, the weights of experts over the answer so far, in the mean over
    its tokens; what is missing to 1 was left to the base. None where only a trace knows, since the
    router looks at tokens.
    """

    columns: tuple[ColumnOutput, ...]
    expert_shares: tuple[Mapping[str, float] | None, ...] = ()
    is_last: bool = False
    trace: RoutingTrace | None = None


class Run:
    """Nothing of it outlives `steps()`."""

    def __init__(
        self,
        base: LoadedBase,
        snapshot: Snapshot,
        routers: Sequence[RouterConfig],
        prompt_ids: list[int],
        settings: GenerationSettings,
        *,
        record: bool,
        trace_every: int | None,
    ) -> None:
        self.base = base
        self.snapshot = snapshot
        self.library = snapshot.library
        self.routers = routers
        self.labels = unique_labels(routers)
        self.prompt_ids = prompt_ids
        self.settings = settings
        self.recorder = Recorder(settings.max_new_tokens) if record else None
        self.trace_every = trace_every if record else None
        self.end_ids = end_token_ids(base)
        self.pad_id = pad_token_id(base, self.end_ids)
        self.finite = FiniteLogits(sorted(self.end_ids))
        self.processors = LogitsProcessorList([self.finite, *logits_processors(settings)])
        self.rows: list[Row] = []
        self.is_cancelled, self.has_ended = threading.Event(), threading.Event()
        self.queue: SimpleQueue[Step | BaseException | None] = SimpleQueue()
        self._closing = ExitStack()

    def steps(self, start: Callable[["Run"], Callable[[], None]]) -> Iterator[Step]:
        """start: has another thread call `begin`, `take` and `end`, and gives what waits for it."""
        release_threads()  # the caller's, in whose way those of the thread would be
        wait = start(self)
        try:
            while (item := self.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.is_cancelled.set()
            wait()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to write."""
        return self.is_cancelled.is_set() or all(row.is_finished for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Written so far, by the longest row."""
        return max(len(row.answer) for row in self.rows)

    def begin(self) -> Decoding:
        """Reads the prompt, under the run's own plan."""
        self._prepare()
        texts = [row.lane.ids for row in self.rows]
        model, device = self.base.model, self.base.device
        check_rows(model, [len(text) for text in texts])
        ids, mask = (part.to(device) for part in pad_left(texts, self.pad_id))
        num_most = self.settings.max_new_tokens
        step = token_step(model, self.plan, device, ids.shape[1] + num_most)
        cache = self._closing.enter_context(step)
        with routed(self.plan):
            return Decoding.begun(
                model,
                ids,
                mask,
                cache,
                max_new_tokens=num_most,
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=self.pad_id,
            )

    def take(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Draws a token for each row, and hands the step on: (R,) int64, to be read next.

        ids: (R, T) read so far. logits: (R, V). A row that has ended before is padded.
        """
        drawn = self.processors(ids, logits).argmax(-1)  # type: ignore[arg-type]
        has_ended = [row.is_finished for row in self.rows]
        if any(has_ended):
            drawn = torch.where(torch.tensor(has_ended, device=drawn.device), self.pad_id, drawn)
        self._add_tokens(drawn.tolist())
        return drawn

    def end(self, error: BaseException | None = None) -> None:
        """The last step, or why there is none."""
        try:
            if error is None and not self.is_cancelled.is_set():
                trace = self._trace(is_complete=True) if self.recorder else None
                self.queue.put(replace(self._step(), is_last=True, trace=trace))
        except Exception as caught:
            error = caught
        self._closing.close()
        if error is not None:
            self.queue.put(error)
        self.queue.put(None)

    def _prepare(self) -> None:
        """Which rows there are, and their plan. A router may read the prompt for it."""
        found = self.snapshot.lanes_of(self.routers, self.prompt_ids)
        for column, lanes in enumerate(found):
            self.rows += [Row(column=column, lane=lane) for lane in lanes]
        self.plan = self.snapshot.plan_lanes(
            [self.routers[row.column] for row in self.rows],
            [row.lane for row in self.rows],
            self.recorder,
        )
        names, weights = self.library.names, self.plan.constant.unchanged.tolist()
        for number in set(range(len(self.rows))) - self.plan.num_chosen.keys():
            used = zip(names, weights[number], strict=True)
            self.rows[number].weights = {name: weight for name, weight in used if weight}

    def _add_tokens(self, token_ids: list[int]) -> None:
        now = time.perf_counter()
        is_broken = self.finite.is_broken.tolist()
        for row, token_id, broken in zip(self.rows, token_ids, is_broken, strict=True):
            if broken and not row.is_finished:
                row.is_finished, row.fault = True, self._fault(row)
            if not row.is_finished:
                row.answer.append(token_id)
                row.clock = [*row.clock[:1], now]
                row.has_end = token_id in self.end_ids
                is_full = len(row.answer) == self.settings.max_new_tokens
                row.is_finished = row.has_end or is_full
        is_due = self.trace_every is not None and self.num_tokens % self.trace_every == 0
        is_last = all(row.is_finished for row in self.rows)
        trace = self._trace(is_complete=False) if is_due and not is_last else None
        self.queue.put(replace(self._step(), trace=trace))

    def _step(self) -> Step:
        columns, shares = [], []
        for column, label in enumerate(self.labels):
            rows = [row for row in self.rows if row.column == column]
            shares.append(_expert_share(rows))
            texts = [self._text(row.answer) for row in rows]
            num_settled = next((i for i, row in enumerate(rows) if not row.is_finished), len(rows))
            columns.append(
                ColumnOutput(
                    label=label,
                    text="\n".join(texts),
                    num_settled=len("\n".join(texts[: num_settled + 1])),
                    num_tokens=sum(len(row.answer) for row in rows),
                    is_finished=all(row.is_finished for row in rows),
                    is_cut=any(row.is_finished and not (row.has_end or row.fault) for row in rows),
                    error="; ".join(dict.fromkeys(row.fault for row in rows if row.fault)),
                    tokens_per_second=sum(_rate(len(row.answer), row.clock) for row in rows),
                )
            )
        return Step(columns=tuple(columns), expert_shares=tuple(shares))

    def _fault(self, row: Row) -> str:
        plan = self.snapshot.plan_lanes([self.routers[row.column]], [row.lane], None)
        return fault_of(self.base.model, self.library, plan, row.token_ids)

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
            rows=self.rows,
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
    """A label for each column: its router, its expert, what it is made to do, and a number where
    that is not unique."""
    labels: list[str] = []
    for router in routers:
        label = router.name if router.expert is None else f"{router.name}:{router.expert}"
        if router.intervention is not None:
            label += f", {router.intervention.kind} {router.intervention.expert}"
        same = sum(known == label or known.startswith(f"{label} (") for known in labels)
        labels.append(f"{label} ({same + 1})" if same else label)
    return labels


def _expert_share(rows: Sequence[Row]) -> dict[str, float] | None:
    share: dict[str, float] = defaultdict(float)
    num_tokens = sum(len(row.answer) for row in rows)
    for row in rows:
        if row.weights is None:
            return None
        for name, weight in row.weights.items():
            share[name] += weight * len(row.answer) / max(1, num_tokens)
    return dict(share)


def _rate(num_tokens: int, clock: list[float]) -> float:
    if num_tokens < 2 or clock[-1] <= clock[0]:
        return 0.0
    return (num_tokens - 1) / (clock[-1] - clock[0])
