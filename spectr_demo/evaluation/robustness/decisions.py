"""Which expert each router chooses for one text, in every changed library, on the activations of
the text's own expert.

Axes: R rows, T tokens, C columns of a layer, V candidates (see `variants`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from spectr_demo.base.prompts import decoder_inputs, shared_length
from spectr_demo.engine.layers import routed
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.plan import Plan, RoutingPlan
from spectr_demo.engine.reading import Listening, evidence_mask
from spectr_demo.evaluation.reading import Text
from spectr_demo.evaluation.robustness.libraries import Key, Library
from spectr_demo.evaluation.robustness.variants import GenericText, Variants
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.context import EvidencePool, Start
from spectr_demo.routing.routers import ROUTERS, parse_router

METHODS = ("arrow", "spectr", "norm", "spectr calibrated", "spectr in context")


class _Generic(Listening):
    """Collects the statistics of one generic text."""

    def __init__(self, statistics: GenericText, num_opening: int) -> None:
        self._statistics = statistics
        self._num_opening = num_opening

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        for path in bank.paths:
            self._statistics.add(path, x[0, self._num_opening :])


def read_generic(
    engine: SpectrModel, variants: Variants, prompts: Sequence[str], bar: tqdm
) -> None:
    """Measure the variants' statistics over generic prompts, read as the bare base does."""
    statistics = GenericText(variants)
    bar.set_description("generic prompts")
    for prompt in prompts:
        ids = engine.encode(prompt)
        _forward(engine, [ids], _Generic(statistics, shared_length(engine.template.opening, ids)))
        bar.update()
    statistics.finish()


class _Context:
    """The evidence of `spectr-context` in each library, pooled as the router does."""

    def __init__(
        self,
        variants: Variants,
        libraries: Mapping[Key, Library],
        is_evidence: Tensor,
        *,
        first: _Context | None = None,
        newline_ids: Tensor | None = None,
    ) -> None:
        """is_evidence: (R, T) bool. first: of the first reading, whose rows are the lines of one
        request. newline_ids: tokens at which a second reading returns to it."""
        self._variants = variants
        decay = ROUTERS["spectr-context"].preset.decay
        assert decay is not None
        self._ids = {key: torch.cat(library) for key, library in libraries.items()}
        starts = {} if first is None else {key: first.start(key) for key in libraries}
        self._pools = {
            key: EvidencePool(decay, len(ids), is_evidence, starts.get(key))
            for key, ids in self._ids.items()
        }
        self._newline_ids = newline_ids
        self._banks: dict[tuple[str, Key], ExpertBank] = {}

    def start(self, key: Key) -> Start:
        """What all lines ask for together. Evidence of 0 names no expert."""
        pool = self._pools[key]
        return pool.start([len(pool.latest)], least=0.0)

    def begin_pass(self, input_ids: Tensor) -> None:
        """input_ids: (R, T)."""
        newlines = self._newline_ids
        is_newline = None if newlines is None else torch.isin(input_ids, newlines)
        for pool in self._pools.values():
            pool.begin_pass(*input_ids.shape, is_newline=is_newline, device=input_ids.device)

    def add(self, path: str, standard: Tensor) -> dict[Key, Tensor]:
        """By library (R, T, right and rivals), -inf where a candidate does not touch the layer,
        from its columns' scores (R, T, C)."""
        layer = self._variants.layers[path]
        scores = everywhere(self._variants, path, standard.index_select(-1, layer.columns))
        pooled = {}
        for key, ids in self._ids.items():
            own = scores.index_select(-1, ids)
            places = (own[0, 0] > -torch.inf).nonzero()[:, 0]
            pooled[key] = torch.full_like(own, -torch.inf)
            if len(places) == 0:
                continue
            found = self._pools[key].add(self._bank(path, key, places), own[:, :, None, places])
            pooled[key] = pooled[key].index_copy(-1, places, found[:, :, 0])
        return pooled

    def _bank(self, path: str, key: Key, places: Tensor) -> ExpertBank:
        """What tells the pool the layer and the candidates; the same one for all tokens."""
        if (path, key) not in self._banks:
            library = self._variants.layers[path].library
            self._banks[path, key] = replace(library, expert_ids=places.cpu())
        return self._banks[path, key]


def everywhere(variants: Variants, path: str, scores: Tensor) -> Tensor:
    """(..., V) of all candidates from those that touch the layer, -inf for the others."""
    layer = variants.layers[path]
    if len(layer.candidates) == variants.num_candidates:
        return scores
    shape = (*scores.shape[:-1], variants.num_candidates)
    return scores.new_full(shape, -torch.inf).index_copy(-1, layer.candidates, scores)


class _FirstReading(Listening):
    """The lines of a prompt, read by the bare base for `spectr-context`."""

    def __init__(self, variants: Variants, context: _Context) -> None:
        self._variants = variants
        self._context = context

    def begin_pass(self, input_ids: Tensor) -> None:
        self._context.begin_pass(input_ids)

    def listen(self, bank: ExpertBank, x: Tensor) -> None:
        variants = self._variants
        for path in bank.paths:
            rows = [variants.standardise(path, variants.scores(path, row)) for row in x]
            self._context.add(path, torch.stack(rows))


class _Decisions(RoutingPlan):
    """The plan of one text's own expert, which also decides at each layer in every library."""

    def __init__(
        self,
        engine: SpectrModel,
        variants: Variants,
        name: str,
        libraries: Mapping[Key, Library],
        text: Text,
        context: _Context,
    ) -> None:
        names = engine.library.names
        super().__init__([parse_router(f"single:{name}", names)], names)
        self._variants = variants
        self._libraries = libraries
        self._start = shared_length(engine.template.opening, text.prompt_ids)
        # The answer is made at the prompt's last token and every answer token but the last.
        self._answer = slice(len(text.prompt_ids) - 1 - self._start, None)
        zeros = torch.zeros(len(METHODS), device=engine.model.device)
        self._right, self._num = dict.fromkeys(libraries, zeros), dict.fromkeys(libraries, zeros)
        self._votes = {
            key: tuple(zeros.new_zeros(len(METHODS), len(ids)) for ids in library)
            for key, library in libraries.items()
        }
        self._context = context

    def begin_pass(self, input_ids: Tensor) -> None:
        super().begin_pass(input_ids)
        self._context.begin_pass(input_ids)

    def add(self, y: Tensor, bank: ExpertBank, place: int, x: Tensor) -> Tensor:
        self._decide(bank.paths[place], x[0])
        return super().add(y, bank, place, x)

    def _decide(self, path: str, x: Tensor) -> None:
        layer, variants = self._variants.layers[path], self._variants
        raw = variants.scores(path, x)
        standard = variants.standardise(path, raw)
        in_context = self._context.add(path, standard[None])
        alone = torch.cat([raw[: len(METHODS) - 2], standard[None]])
        alone = everywhere(variants, path, alone.index_select(-1, layer.columns))
        for key, library in self._libraries.items():
            num_right = len(library.right)
            pooled = in_context[key]
            self._count(
                key,
                torch.cat([alone.index_select(-1, library.right), pooled[..., :num_right]]),
                torch.cat([alone.index_select(-1, library.rivals), pooled[..., num_right:]]),
            )

    def _count(self, key: Key, right: Tensor, rival: Tensor) -> None:
        """right, rival: (methods, T, candidates), -inf where one does not touch the layer."""
        right, right_ids = right[:, self._start :].max(-1)
        rival, rival_ids = rival[:, self._start :].max(-1)
        counts = (right > -torch.inf) & (rival > -torch.inf)
        lead = torch.where(counts, right - rival, 0)
        # Equal scores may differ by rounding, which goes with the layer's scores.
        slack = 1e-4 * right.abs().mean(-1, keepdim=True)
        is_right = torch.where(lead.abs() <= slack, 0.5, (lead > 0).float()) * counts
        self._right[key] = self._right[key] + is_right[:, self._answer].sum(-1)
        self._num[key] = self._num[key] + counts[:, self._answer].sum(-1)
        for_right, for_rivals = self._votes[key]
        for_right.scatter_add_(-1, right_ids, is_right)
        for_rivals.scatter_add_(-1, rival_ids, counts.float() - is_right)

    def result(self, key: Key) -> NDArray[np.float64]:
        """(2, methods): the share of right decisions, and whether the majority is right."""
        right, rival = (votes.amax(-1) for votes in self._votes[key])
        majority = torch.where(right == rival, 0.5, (right > rival).float())
        share = self._right[key] / self._num[key].clamp(min=1)
        return torch.stack([share, majority]).double().cpu().numpy()


def read_text(
    engine: SpectrModel,
    variants: Variants,
    name: str,
    libraries: Mapping[Key, Library],
    text: Text,
    bar: tqdm,
) -> dict[Key, NDArray[np.float64]]:
    bar.set_description(name)
    num_prompt = len(text.prompt_ids)
    ids = [*text.prompt_ids, *text.answer_ids[:-1]]
    device = engine.model.device
    lines, starts = zip(*engine.template.request_lines(text.prompt_ids), strict=True)
    first = _Context(variants, libraries, evidence_mask(lines, starts, device))
    _forward(engine, lines, _FirstReading(variants, first))
    context = _Context(
        variants,
        libraries,
        evidence_mask([ids], [num_prompt], device),
        first=first,
        newline_ids=torch.tensor(sorted(engine.template.newline_ids), device=device),
    )
    plan = _Decisions(engine, variants, name, libraries, text, context)
    _forward(engine, [ids], plan)
    bar.update()
    return {key: plan.result(key) for key in libraries}


def _forward(engine: SpectrModel, texts: Sequence[Sequence[int]], plan: Plan) -> None:
    with torch.inference_mode(), routed(plan):
        decoder = engine.model.get_decoder()
        decoder(**decoder_inputs(texts, engine.model.device), use_cache=False)
