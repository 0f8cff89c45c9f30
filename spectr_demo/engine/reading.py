"""What routers must know before a run, read by the bare base while the experts listen.

Two things are read so. Ordinary prompts, which the base wrote itself, show what each layer's inputs
are like where no expert is needed (`Reader.ordinary`). And the prompt itself is read before the
run: which requests it holds, and which expert each of them is for (`Reader.prompt`).

Axes: R rows, T tokens, N tokens of all rows that count, M linear layers, E experts.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectr_demo.base.generic import generic_prompts
from spectr_demo.base.loading import LoadedBase
from spectr_demo.base.prompts import Part, Template, encode, parts, token_pieces
from spectr_demo.config import RouterConfig
from spectr_demo.engine.batches import read_after
from spectr_demo.engine.intervention import changed_weights, weights_of
from spectr_demo.engine.kept import keep_heard, kept_heard
from spectr_demo.engine.ordinary import (
    Heard,
    Ordinary,
    OrdinaryText,
    expert_layers,
    identity,
)
from spectr_demo.engine.plan import Places, Plan
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.detection import Detector, Evidence, Metric
from spectr_demo.routing.lanes import Span, best_cut, cost_of_cut, joined, spans

# A token that is n tokens before a request's end says 0.85^n as much of whom it is for.
_FADING = 0.85
# Tokens in all runs of a message's parts, padded to the longest: about as many as ordinary prompts
# have, so it takes no more memory. A longer message is a text, and read as one.
_MOST_READ = 8192
_RUNS_AT_ONCE = 8
_EXPERTS_AT_ONCE = 128  # measured together: their scores of all ordinary tokens take memory


class Listening(Plan):
    """A `Plan` under which the experts add nothing to the base and are only listened to."""

    is_base_only = needs_all_tokens = False

    def begin_pass(self, input_ids: Tensor) -> None:
        pass

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        if place == 0:
            self.listen(bank, x)
        return y

    def end_pass(self, hidden: Tensor) -> None:
        pass

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        """What to do with the input x (R, T, D_in) of a bank's layers. What was read before the
        requests may be part of it, see `read_after`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Requests:
    """R requests to be read after one beginning, padded on the right.

    ids: (R, T) int64. counts: (R, T) bool, tokens that count: a request's own, and those of the
    template after it. late, whole: (N,) float32, their weights in the two means of `Evidence`.
    `late` fades towards the beginning. `whole` is half the request's own tokens and half those
    after it, at which the base knows all of it.
    """

    ids: Tensor
    counts: Tensor
    late: Tensor
    whole: Tensor

    @classmethod
    def of(cls, requests: Sequence[Sequence[int]], closing: Sequence[int]) -> "Requests":
        num_after = len(closing)
        width = max(map(len, requests)) + num_after
        rows = [[*own, *closing, *[0] * (width - len(own) - num_after)] for own in requests]
        num_own = torch.tensor([len(own) for own in requests])[:, None]
        at, num = torch.arange(width), num_own + num_after
        counts = at < num
        late = torch.where(counts, _FADING ** (num - 1 - at).clamp(min=0), 0)
        whole = torch.where(at < num_own, 1 / num_own, 1 / max(1, num_after)) * counts
        late, whole = (each / each.sum(1, keepdim=True) for each in (late, whole))
        return cls(torch.tensor(rows), counts, late[counts], whole[counts])

    @property
    def owners(self) -> Tensor:
        """(N,) int64: the row of each token that counts."""
        return self.counts.nonzero()[:, 0]

    def counted(self, values: Tensor) -> Tensor:
        """(N, ...) from values (R, B + T, ...): of these tokens, and of B that were read before."""
        own = values[:, values.shape[1] - self.counts.shape[1] :]
        return own[self.counts.to(values.device)]

    def evidence(self, library: ExpertLibrary) -> Evidence:
        """Room for what they tell about the experts of a library."""
        return Evidence(self.owners, self.late, self.whole, expert_layers(library))


class _Listener(Listening):
    """Collects the evidence of requests with the detectors that are there."""

    def __init__(
        self,
        requests: Requests,
        library: ExpertLibrary,
        detectors: Mapping[ExpertBank, Detector],
    ) -> None:
        self.requests = requests
        self.detectors = detectors
        self.evidence = requests.evidence(library)

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        inputs = self.requests.counted(x)
        self.evidence.add(bank, self.detectors[bank].scores(inputs))


class _Measuring(Listening):
    """Measures, over ordinary text, the experts of a library that are unknown."""

    def __init__(self, requests: Requests, library: ExpertLibrary, known: OrdinaryText) -> None:
        self._requests = requests
        self._evidence = requests.evidence(library)
        self._known = known
        self._is_unknown = known.is_unknown(library)
        self.heard: list[Heard] = []

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        unknown = self._is_unknown[bank.expert_ids].nonzero().flatten()
        if len(unknown) == 0:
            return
        inputs = self._requests.counted(x)
        metric = self._known.metric(bank) or Metric.of(inputs)
        for some in unknown.split(_EXPERTS_AT_ONCE):
            chosen = torch.zeros(bank.num_experts).index_fill(0, some, 1)
            new = bank if chosen.all() else bank.folded(chosen, is_merged=False)
            assert new is not None
            self.heard.append(Heard.of(new, metric, inputs, self._evidence.late_means))


@dataclass(frozen=True, kw_only=True)
class Lane:
    """A part of a prompt that is read and answered by itself.

    start, stop: its own tokens in the prompt; line ends between two lanes are in none. ids: all
    that is read in it: what stands before the request (the template's opening, earlier turns), its
    own tokens, the template's closing.
    Of a router that read it: weights (E,) of the experts, all 0 where none stands out; standing
    (E,) and certainty of each layer (P, E), see `routing.detection`. None, and empty, for others.
    """

    start: int
    stop: int
    ids: list[int]
    weights: Tensor | None = None
    standing: Tensor | None = None
    by_layer: Mapping[ExpertBank, Tensor] = field(default_factory=dict)

    @property
    def expert(self) -> int | None:
        """The one that stands out most; None where none does."""
        if self.standing is None or self.weights is None or not self.weights.any():
            return None
        return int(self.standing.argmax())

    @classmethod
    def whole(cls, ids: Sequence[int]) -> "Lane":
        """All of a prompt, as a router takes it that does not read the request."""
        return cls(start=0, stop=len(ids), ids=list(ids))


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt's parts, each run of which was read as if it were all that is asked.

    runs: the lane that each run would be, of no router yet. explained: (E,) of each run, how much
    of it each expert accounts for.
    """

    parts: Sequence[Part]
    runs: Mapping[Span, Lane]
    explained: Mapping[Span, Tensor]

    def lanes(self, router: RouterConfig, least: float | None) -> list[Lane]:
        """The runs that are requests of their own, in order, with the weights of their experts.
        least: what an expert must exceed, see `Reader.least_standing`."""
        lengths = [part.stop - part.start for part in self.parts]
        costs = [cost_of_cut(is_next=part.is_next, is_item=part.is_item) for part in self.parts]
        cut = best_cut(lengths, costs, self.explained)
        experts = [self.lane(run, router, least).expert for run in cut]
        runs = joined(cut, experts, [part.is_next for part in self.parts])
        return [self.lane(run, router, least) for run in runs]

    def lane(self, run: Span, router: RouterConfig, least: float | None) -> Lane:
        """One run of parts as a lane."""
        lane = self.runs[run]
        assert lane.standing is not None
        return replace(lane, weights=weights_of(lane.standing, router, least))


class Reader:
    """Reads with one base, for one library of experts; what it finds out is kept."""

    def __init__(
        self,
        base: LoadedBase,
        library: ExpertLibrary,
        template: Template,
        places: Places,
        known: OrdinaryText,
    ) -> None:
        """places: of the library's experts, see `wrap_`. known: about the base and its experts."""
        self._base = base
        self._library = library
        self.template = template
        self._places = places
        self.known = known
        self._ordinary: Ordinary | None = None

    @property
    def is_measured(self) -> bool:
        return self._ordinary is not None

    @property
    def ordinary(self) -> Ordinary:
        """Measured when it is first needed (on a ZeroGPU, where there is one)."""
        if self._ordinary is None:
            with self.known.lock:
                if self._ordinary is None:
                    self._ordinary = self._measure()
        return self._ordinary

    def _measure(self) -> Ordinary:
        known, library = self.known, self._library
        known.add_packed(library, identity(self._base))
        unknown = known.is_unknown(library)
        if not unknown.any():
            return known.of(library)
        prompts = known.prompts or tuple(generic_prompts(self._base))
        heard = kept_heard(self._base, library, prompts) if unknown.all() else None
        known.add(library, self._hear(prompts) if heard is None else heard)
        known.prompts = prompts
        ordinary = known.of(library)
        if unknown.all() and heard is None:
            keep_heard(self._base, library, known, ordinary)
        return ordinary

    def _hear(self, prompts: Sequence[str]) -> list[Heard]:
        """Of all unknown experts, while the base reads the prompts."""
        requests = self.requests([encode(self._base.tokenizer, prompt) for prompt in prompts])
        measuring = _Measuring(requests, self._library, self.known)
        self.read(self.template.opening, [(requests, measuring)])
        return measuring.heard

    def requests(self, prompts: Sequence[Sequence[int]]) -> Requests:
        """Those of prompts' token ids, each taken for one request after the template's opening."""
        own = [ids[slice(*self.template.request(ids))] for ids in prompts]
        return Requests.of(own, self.template.closing)

    def read(self, beginning: Sequence[int], some: Sequence[tuple[Requests, Listening]]) -> None:
        """The bare base reads requests, each after the same beginning. Those who listen hear the
        layers of this library."""
        for _, listener in some:
            listener.places = self._places
        batches = [(requests.ids, listener) for requests, listener in some]
        deque(read_after(self._base.model, beginning, batches, is_kept=True), maxlen=0)

    def least_standing(self, router: RouterConfig) -> float | None:
        """What an expert must exceed: what this share of ordinary prompts reach at most."""
        if router.confidence is None:
            return None
        most = self.ordinary.standing(self.ordinary.certainty).amax(-1)
        return float(most.quantile(router.confidence))

    def changed(self, router: RouterConfig, standing: Tensor) -> Tensor:
        """(E,) weights of the experts under the router's intervention, from their standing (E,) in
        a request."""
        assert router.intervention is not None
        at = torch.arange(len(standing)) == self._library.index(router.intervention.expert)
        return changed_weights(standing, router, at, self.least_standing(router))

    def prompt(self, ids: Sequence[int]) -> ReadPrompt:
        """Reads a prompt, and each part of it that may be a request of its own. One of a single
        request has one lane, which is the whole of it."""
        start, stop = self.template.request(ids)
        found = parts(token_pieces(self._base.tokenizer, ids), start, stop)
        if len(spans(len(found))) * (stop - start) > _MOST_READ:
            found = [Part(start=start, stop=stop, is_next=False)]
        return self._read_parts(ids, found)

    def whole(self, router: RouterConfig, ids: Sequence[int]) -> Lane:
        """A prompt that is taken for one request."""
        start, stop = self.template.request(ids)
        part = Part(start=start, stop=stop, is_next=False)
        return self._read_parts(ids, [part]).lane((0, 1), router, self.least_standing(router))

    def _is_blank(self, token: int) -> bool:
        return not str(self._base.tokenizer.decode([token])).strip()

    def _read_parts(self, ids: Sequence[int], found: Sequence[Part]) -> ReadPrompt:
        """Blank tokens at which a message may be cut belong to no run of parts."""
        start, stop = found[0].start, found[-1].stop
        bounds = {}
        for first, end in spans(len(found)):
            a, b = found[first].start, found[end - 1].stop
            while first > 0 and a < b - 1 and self._is_blank(ids[a]):
                a += 1
            while end < len(found) and a < b - 1 and self._is_blank(ids[b - 1]):
                b -= 1
            bounds[first, end] = a, b
        # Those of similar length together, since they are padded to the longest.
        order = sorted(bounds, key=lambda run: bounds[run][1] - bounds[run][0])
        batches = [order[i : i + _RUNS_AT_ONCE] for i in range(0, len(order), _RUNS_AT_ONCE)]
        some = []
        for runs in batches:
            requests = Requests.of([ids[slice(*bounds[run])] for run in runs], ids[stop:])
            some.append((requests, _Listener(requests, self._library, self.ordinary.detectors)))
        self.read(ids[:start], some)
        read: dict[Span, Lane] = {}
        explained: dict[Span, Tensor] = {}
        for runs, (_, listener) in zip(batches, some, strict=True):
            evidence = listener.evidence
            standing, of_runs = self.ordinary.standing(evidence.certainty), evidence.explained
            for row, run in enumerate(runs):
                a, b = bounds[run]
                read[run] = Lane(
                    start=a,
                    stop=b,
                    ids=[*ids[:start], *ids[a:b], *ids[stop:]],
                    standing=standing[row],
                    by_layer={bank: layers[row] for bank, layers in evidence.by_layer.items()},
                )
                explained[run] = of_runs[row]
        return ReadPrompt(found, read, explained)
