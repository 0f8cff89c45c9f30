"""The routed model: one engine for every front end.

A side-by-side run is one batch: each column is a row with its own router, all rows share one
forward pass per token, one KV cache and the same sampling noise.
"""

import contextvars
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from spectr_demo.calibration import calibrate, generic_prompts
from spectr_demo.config import (
    GenerationSettings,
    RouterConfig,
    experts_from_environment,
)
from spectr_demo.experts import ExpertLibrary, load_experts
from spectr_demo.layers import attach_, detach_, follow, routed
from spectr_demo.loading import DeviceMap, LoadedBase, load_base
from spectr_demo.pooling import lead
from spectr_demo.prompts import (
    Message,
    decoder_inputs,
    encode,
    newline_ids,
    request_lines,
    request_start,
    shared_length,
    template_closing,
    template_opening,
    user_turn,
)
from spectr_demo.recorder import Recorder
from spectr_demo.routing import Calibration, FirstReading, RoutingPlan, parse_router
from spectr_demo.threads import release_threads
from spectr_demo.trace import RoutingTrace
from spectr_demo.tracing import build_trace, library_versions


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


def load(
    base: str | None = None,
    experts: Sequence[str] | None = None,
    *,
    device_map: DeviceMap | None = None,
) -> "SpectrModel":
    """The routed model: a base in 4-bit, and LoRA experts on it.

    base: Hub id or folder of a causal language model; None is `SPECTR_BASE_MODEL`, or the embedded
        default. experts: Hub ids or folders of PEFT adapters, `NAME=SOURCE` to rename one; None is
        `SPECTR_EXPERTS`, or the shipped ones. device_map: spreads a base that is too large for one
        GPU, such as "auto"; see `load_base`.
    """
    loaded = load_base(base, device_map=device_map)
    sources = experts_from_environment() if experts is None else list(experts)
    return SpectrModel(loaded, load_experts(sources, loaded.model))


class SpectrModel:
    """A base model with a library of experts attached, none of them merged into its weights."""

    def __init__(self, base: LoadedBase, library: ExpertLibrary) -> None:
        self.base = base
        self.library = library
        self.model = base.model
        self.tokenizer = base.tokenizer
        attach_(self.model, library)
        self.template_opening = template_opening(base.tokenizer)
        self.template_closing = template_closing(base.tokenizer)
        self.user_turn = user_turn(base.tokenizer)
        self.newline_ids = newline_ids(base.tokenizer)
        self._hooks = follow(self.model)
        self._calibration: Calibration | None = None
        self._calibration_lock = threading.Lock()
        self._least_leads: dict[RouterConfig, float] = {}

    def detach(self) -> None:
        """Take the experts off again: `self.model` is then the base as it was loaded."""
        for hook in self._hooks:
            hook.remove()
        detach_(self.model)

    def generate(
        self,
        prompt: str | Sequence[Message],
        router: str | RouterConfig = "spectr-context",
        **settings: Any,
    ) -> str:
        """The answer of one router, as text. settings: fields of `GenerationSettings`."""
        return self.compare(prompt, [router], record=False, **settings).columns[0].text

    def compare(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        *,
        record: bool = True,
        **settings: Any,
    ) -> Step:
        """Run the columns side by side to their end. settings: fields of `GenerationSettings`."""
        run = self.stream(prompt, columns, GenerationSettings(**settings), record=record)
        return deque(run, maxlen=1).pop()

    def stream(
        self,
        prompt: str | Sequence[Message],
        columns: Sequence[str | RouterConfig],
        settings: GenerationSettings | None = None,
        *,
        record: bool = False,
        trace_every: int | None = None,
    ) -> Iterator[Step]:
        """Generate with several routers at once, one step per token.

        prompt: the user's message, or a list of chat messages; a base without a chat template
            reads plain text. columns: routers, as `parse_router` takes them.
        trace_every: with `record`, also give a partial trace every so many tokens.
        Closing the iterator cancels the run between two tokens and frees what it holds.
        Raises ValueError at once for an unknown router, an empty prompt, or one that is too long.
        """
        settings = settings or GenerationSettings()
        if not columns:
            raise ValueError(
                "there is no column to run; name at least one router, such as 'spectr'"
            )
        routers = [parse_router(column, self.library.names) for column in columns]
        prompt_ids = self.encode(prompt)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and len(prompt_ids) + settings.max_new_tokens > context:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens, and {settings.max_new_tokens} more may "
                f"be generated; the context of {self.base.name} is {context}: shorten one of them"
            )
        run = _Run(self, routers, prompt_ids, settings, record, trace_every if record else None)
        return run.steps()

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt in the base's chat template. Raises ValueError if it is empty."""
        return encode(self.tokenizer, prompt)

    def plan(
        self,
        routers: Sequence[RouterConfig],
        texts: Sequence[Sequence[int]],
        recorder: Recorder | None = None,
        *,
        num_prompt: Sequence[int] | None = None,
    ) -> RoutingPlan:
        """A plan for one batch; routers that read the prompt first do it here.

        texts: token ids of each row, which are padded on the left. num_prompt: how many tokens of
            each are its prompt; None says all.
        """
        num_prompt = num_prompt or [len(ids) for ids in texts]
        least_leads = {r: self._least_lead(r) for r in routers if r.confidence is not None}
        readers = [row for row, router in enumerate(routers) if router.reads_first]
        first_reading = None
        if readers:
            first_reading = self._read_first(
                [routers[row] for row in readers],
                [texts[row][: num_prompt[row]] for row in readers],
            )
        return RoutingPlan(
            routers,
            self.library.names,
            recorder,
            calibration=self.calibration if any(r.calibrated for r in routers) else None,
            is_evidence=self._is_evidence(
                texts,
                [
                    num if router.reads_first else shared_length(self.template_opening, ids)
                    for router, ids, num in zip(routers, texts, num_prompt, strict=True)
                ],
            ),
            first_reading=first_reading,
            least_leads=least_leads,
            newline_ids=torch.tensor(
                sorted(self.newline_ids), dtype=torch.long, device=self.base.device
            ),
        )

    def _is_evidence(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """(R, T) bool, True from each row's start on, in texts that are padded on the left."""
        width = max(map(len, texts))
        firsts = [width - len(ids) + start for ids, start in zip(texts, starts, strict=True)]
        is_evidence = torch.arange(width) >= torch.tensor(firsts)[:, None]
        return is_evidence.to(self.base.device)

    @torch.inference_mode()
    def _read_first(
        self, routers: Sequence[RouterConfig], prompts: Sequence[Sequence[int]]
    ) -> FirstReading:
        """The bare base reads the prompts, one for each router, and the experts listen."""
        lines_of = [
            request_lines(
                ids,
                request_start(ids, self.template_opening, self.user_turn),
                self.template_closing,
                self.newline_ids,
            )
            for ids in prompts
        ]
        texts, starts = zip(*(line for lines in lines_of for line in lines), strict=True)
        reading = FirstReading(
            routers,
            self.library.names,
            calibration=self.calibration,
            num_lines=[len(lines) for lines in lines_of],
            is_evidence=self._is_evidence(texts, starts),
        )
        with routed(reading):
            self.model.get_decoder()(**decoder_inputs(texts, self.base.device), use_cache=False)
        return reading

    def _least_lead(self, router: RouterConfig) -> float:
        """The lead that the best expert has at most, in this share of the generic prompts."""
        assert router.confidence is not None
        if router not in self._least_leads:
            prompts = [self.encode(prompt) for prompt in generic_prompts()]
            reading = self._read_first([router] * len(prompts), prompts)
            leads = lead(reading.pool(router)[0].latest).amax(-1)
            self._least_leads[router] = float(leads.quantile(router.confidence))
        return self._least_leads[router]

    @property
    def calibration(self) -> Calibration:
        """Of every expert, measured when it is first needed (on a ZeroGPU, where there is one)."""
        with self._calibration_lock:
            if self._calibration is None:
                self._calibration = calibrate(self.base, self.library)
            return self._calibration


class _Run:
    """One run: its plan, its thread, its clock. Nothing of it outlives `steps()`."""

    def __init__(
        self,
        engine: SpectrModel,
        routers: Sequence[RouterConfig],
        prompt_ids: list[int],
        settings: GenerationSettings,
        record: bool,
        trace_every: int | None,
    ) -> None:
        self.engine = engine
        self.labels = unique_labels(routers)
        self.prompt_ids = prompt_ids
        self.settings = settings
        self.trace_every = trace_every
        self.routers = routers
        self.recorder = Recorder() if record else None
        self.end_ids = _end_token_ids(engine)
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
            prompts = [self.prompt_ids] * len(self.routers)
            self.plan = self.engine.plan(self.routers, prompts, self.recorder)
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
        model: Any = self.engine.model
        settings = self.settings
        input_ids = torch.tensor(
            [self.prompt_ids] * len(self.answers), device=self.engine.base.device
        )
        processors = LogitsProcessorList()
        if settings.temperature > 0:
            processors.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_p < 1:
                processors.append(TopPLogitsWarper(settings.top_p))
            processors.append(_SharedNoise(settings.seed))
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,  # sampling is the last processor's, with a generator of its own
                eos_token_id=sorted(self.end_ids) or None,
                pad_token_id=_pad_token_id(self.engine, self.end_ids),
            ),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Cancelled(self.is_cancelled)]),
            streamer=_TokenStreamer(self._add_tokens),
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
        text = str(self.engine.tokenizer.decode(answer, skip_special_tokens=True))
        return text.rstrip("�")  # the first bytes of a character whose rest is still to come

    def _trace(self, *, is_complete: bool) -> RoutingTrace:
        engine = self.engine
        return build_trace(
            model=engine.model,
            tokenizer=engine.tokenizer,
            library=engine.library,
            plan=self.plan,
            labels=self.labels,
            prompt_ids=self.prompt_ids,
            answers=self.answers,
            is_complete=is_complete,
            meta={
                "model": engine.base.source,
                "model_fingerprint": engine.base.fingerprint,
                "quantization": engine.base.quantization,
                "experts": {a.name: a.sha256 for a in engine.library.adapters},
                "generation": self.settings.to_json(),
                "versions": library_versions(),
            },
        )


class _TokenStreamer(BaseStreamer):
    """Hands on the tokens of all rows, one call per step; the prompt comes first and is skipped."""

    def __init__(self, on_tokens: Any) -> None:
        self.on_tokens = on_tokens
        self.has_prompt = False

    def put(self, value: Tensor) -> None:
        if self.has_prompt:
            self.on_tokens(value.tolist())
        self.has_prompt = True

    def end(self) -> None:
        pass


class _Cancelled(StoppingCriteria):
    def __init__(self, is_cancelled: threading.Event) -> None:
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_cancelled.is_set(), device=input_ids.device)


class _SharedNoise(LogitsProcessor):
    """Draws each row's token, with the same noise for every row, and leaves it as the only one.

    The exponential race: `argmax p_i / q_i` with `q_i ~ Exp(1)` is a sample of p. The generator is
    the run's own, so runs in other threads do not disturb it; and since rows share the noise, a
    row's text depends neither on its place nor on its neighbours.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape[-1]).exponential_(generator=self.generator)
        drawn = (scores.float().softmax(-1) / noise.to(scores.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0)


def unique_labels(routers: Sequence[RouterConfig]) -> list[str]:
    """A label for each column: its router, its expert, and a number where that is not unique."""
    labels: list[str] = []
    for router in routers:
        label = router.name if router.expert is None else f"{router.name}:{router.expert}"
        same = sum(known == label or known.startswith(f"{label} (") for known in labels)
        labels.append(f"{label} ({same + 1})" if same else label)
    return labels


def mean_logprob(trace: RoutingTrace, label: str) -> float:
    """Mean log-probability of a column's answer tokens under its own model, in nats."""
    column = trace.column(label)
    return float(np.mean(column.logprob[column.num_prompt :]))


def _rate(num_tokens: int, clock: list[float]) -> float:
    if num_tokens < 2 or clock[-1] <= clock[0]:
        return 0.0
    return (num_tokens - 1) / (clock[-1] - clock[0])


def _end_token_ids(engine: SpectrModel) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those the base's authors name."""
    configured = engine.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, engine.tokenizer.eos_token_id] if i is not None}


def _pad_token_id(engine: SpectrModel, end_ids: set[int]) -> int:
    pad = engine.tokenizer.pad_token_id
    return pad if pad is not None else min(end_ids, default=0)
