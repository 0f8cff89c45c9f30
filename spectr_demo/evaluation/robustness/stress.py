"""Weak and alike experts: when does routing stop working, and which diagnostics predict it?

Nothing is generated or trained. Each text is read once with its own expert (`single:NAME`), and at
every layer all variants of the library are scored on the activations there: these are the right
ones, and the same for every variant. What a wrong choice would do to later layers is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
from spectr_demo.evaluation.robustness.variants import (
    Experts,
    GenericText,
    Variants,
    cut,
    with_noise,
)
from spectr_demo.experts.inspection import ExpertSummary, overlaps
from spectr_demo.experts.library import ExpertLibrary
from spectr_demo.routing.bank import ExpertBank
from spectr_demo.routing.context import EvidencePool, Start
from spectr_demo.routing.routers import ROUTERS, parse_router

RANKS = (8, 4, 2, 1)
SIGMAS = (0.1, 0.3, 1.0, 3.0)
METHODS = ("arrow", "spectr", "norm", "spectr calibrated", "spectr in context")
DIAGNOSTICS = (
    *("update_norm", "effective_rank", "leading_share"),
    *("nearest_overlap", "generic_margin"),
)

_Key = tuple[str, ...]
_Outcomes = dict[_Key, dict[str, NDArray[np.float64]]]  # by library and expert: (2, methods)


def stress(
    engine: SpectrModel,
    texts: Mapping[str, Sequence[Text]],
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    num_experts: Sequence[int] = (32, 100, 1000),
) -> dict[str, Any]:
    """Routing accuracy of each method as the library gets worse; plain JSON values.

    texts: by expert name. prompts: generic ones, by which scores are standardised. seeds: of the
    distractors; the first is the noise's too. num_experts: of the libraries with distractors;
    those no larger than the library itself are left out.

    Accuracy is given as `decisions` and `majority`. A decision is one token in one linear layer
    that the text's expert touches, those that make the answer (as in `routing_accuracy`); scores
    closer than rounding can tell share it. The majority is over prompt and answer, without
    the template's opening. Both are means over an expert's texts, then over the experts.

    rank: experts cut to their truncated SVD, with nothing trained again.
    alike: each expert with a noisy twin; `own` is the share of decisions for it rather than its
        twin, `either` the accuracy in the library with all twins, where both are right.
    undertrained: noise on the text's expert alone. It makes the update longer, which `norm` likes.
    number: distractors are the factors of a random expert at another layer with the same
        projection, so real weights that belong to no domain. They are drawn anew at each layer,
        which is kinder than real experts to whatever sums over layers; and there are only as many
        as experts times layers, so far beyond that more of them change little.
    diagnostics: of each cut or noisy expert, and the Spearman correlation of each with the
        accuracy over all of them, null where one is constant.
    """
    library = engine.library
    experts = {name: library.index(name) for name in texts}
    if len(library.names) < 2 or not texts or not all(texts.values()):
        counts = {name: len(own) for name, own in texts.items()}
        raise ValueError(
            f"stress: {len(library.names)} experts and texts {counts}; it needs two experts and a "
            "text for each that is tested"
        )
    sizes = sorted(n for n in set(num_experts) if n > len(library.names))
    noisy = with_noise(library, SIGMAS, seeds[0])
    num_distractors = sizes[-1] - len(library.names) if sizes else 0
    variants = Variants(library, RANKS, noisy, seeds, num_distractors)
    num_texts = sum(map(len, texts.values()))
    outcomes: _Outcomes = {}
    with torch.inference_mode(), tqdm(total=len(prompts) + num_texts, unit="text") as bar:
        read_generic(engine, variants, prompts, bar)
        for name, e in experts.items():
            libraries = _libraries(variants, e, seeds, sizes)
            results = [_read(engine, variants, name, libraries, text, bar) for text in texts[name]]
            for key in libraries:
                mean = np.mean([result[key] for result in results], axis=0)
                outcomes.setdefault(key, {})[name] = mean
    alike, diagnostics = _diagnose(library, variants, noisy, outcomes)
    return {
        "methods": list(METHODS),
        "num_texts": {name: len(own) for name, own in texts.items()},
        "rank": {str(k): _mean(outcomes["rank", str(k)]) for k in RANKS},
        "alike": {
            str(sigma): {
                "overlap": overlap,
                "own": _mean(outcomes["own", str(sigma)]),
                "either": _mean(outcomes["either", str(sigma)]),
            }
            for sigma, overlap in zip(SIGMAS, alike, strict=True)
        },
        "undertrained": {str(s): _mean(outcomes["undertrained", str(s)]) for s in SIGMAS},
        "number": {
            str(len(library.names)): {"mean": _mean(outcomes["number",])},
            **{str(n): _over_seeds(outcomes, n, seeds) for n in sizes},
        },
        "diagnostics": diagnostics,
    }


class _Library(NamedTuple):
    """Candidates to choose from: those that are right for a text, and the others."""

    right: Tensor
    rivals: Tensor


def _libraries(
    variants: Variants, own: int, seeds: Sequence[int], sizes: Sequence[int]
) -> dict[_Key, _Library]:
    """Every library in which a text of expert `own` is tested."""
    E = variants.num_experts
    others = [e for e in range(E) if e != own]

    def library(right: Iterable[int], rivals: Iterable[int]) -> _Library:
        device = next(iter(variants.layers.values())).columns.device
        return _Library(*(torch.tensor(list(ids), device=device) for ids in (right, rivals)))

    libraries: dict[_Key, _Library] = {("number",): library([own], others)}
    for block, k in enumerate(RANKS, start=1):
        libraries["rank", str(k)] = library([block * E + own], (block * E + e for e in others))
    for block, sigma in enumerate(map(str, SIGMAS), start=1 + len(RANKS)):
        twin, twins = block * E + own, [block * E + e for e in others]
        libraries["own", sigma] = library([own], [twin])
        libraries["either", sigma] = library([own, twin], [*others, *twins])
        libraries["undertrained", sigma] = library([twin], others)
    for s, seed in enumerate(seeds):
        start = variants.num_blocks * E + s * variants.num_distractors
        for n in sizes:  # a smaller library is part of a larger one
            distractors = range(start, start + n - E)
            libraries["number", str(n), str(seed)] = library([own], [*others, *distractors])
    return libraries


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
        libraries: Mapping[_Key, _Library],
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
        self._banks: dict[tuple[str, _Key], ExpertBank] = {}

    def start(self, key: _Key) -> Start:
        """What all lines ask for together. Evidence of 0 names no expert."""
        pool = self._pools[key]
        return pool.start([len(pool.latest)], least=0.0)

    def begin_pass(self, input_ids: Tensor) -> None:
        """input_ids: (R, T)."""
        newlines = self._newline_ids
        is_newline = None if newlines is None else torch.isin(input_ids, newlines)
        for pool in self._pools.values():
            pool.begin_pass(*input_ids.shape, is_newline=is_newline, device=input_ids.device)

    def add(self, path: str, standard: Tensor) -> dict[_Key, Tensor]:
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

    def _bank(self, path: str, key: _Key, places: Tensor) -> ExpertBank:
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
        libraries: Mapping[_Key, _Library],
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

    def _count(self, key: _Key, right: Tensor, rival: Tensor) -> None:
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

    def result(self, key: _Key) -> NDArray[np.float64]:
        """(2, methods): the share of right decisions, and whether the majority is right."""
        right, rival = (votes.amax(-1) for votes in self._votes[key])
        majority = torch.where(right == rival, 0.5, (right > rival).float())
        share = self._right[key] / self._num[key].clamp(min=1)
        return torch.stack([share, majority]).double().cpu().numpy()


def _read(
    engine: SpectrModel,
    variants: Variants,
    name: str,
    libraries: Mapping[_Key, _Library],
    text: Text,
    bar: tqdm,
) -> dict[_Key, NDArray[np.float64]]:
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


def _diagnose(
    library: ExpertLibrary, variants: Variants, noisy: Sequence[Experts], outcomes: _Outcomes
) -> tuple[list[float | None], dict[str, Any]]:
    """The mean overlap of the twins for each sigma, and the section `diagnostics`."""
    E = len(library.names)
    rows, twin_overlaps = [], []
    for block, k in enumerate(RANKS, start=1):
        experts = cut(library, k)
        matrix = overlaps(replace(library, aligned=experts))
        key = "rank", str(k)
        rows += _rows(library, experts, matrix, variants.margins[block], key, outcomes)
    for block, (sigma, experts) in enumerate(zip(SIGMAS, noisy, strict=True), 1 + len(RANKS)):
        matrix = overlaps(replace(library, aligned=(*library.aligned, *experts)))
        twin_overlaps.append(_number(matrix[:E, E:].diagonal().mean()))
        key = "undertrained", str(sigma)
        rows += _rows(library, experts, matrix[E:, :E], variants.margins[block], key, outcomes)
    accuracy = np.array([[row["accuracy"][method] for method in METHODS] for row in rows])
    correlation: dict[str, dict[str, float | None]] = {}
    for diagnostic in DIAGNOSTICS:
        values = np.array([row[diagnostic] for row in rows], dtype=float)
        correlation[diagnostic] = {
            method: _spearman(values, accuracy[:, m]) for m, method in enumerate(METHODS)
        }
    return twin_overlaps, {"variants": rows, "spearman": correlation}


def _rows(
    library: ExpertLibrary,
    experts: Experts,
    matrix: NDArray[np.float64],
    margins: Tensor,
    key: _Key,
    outcomes: _Outcomes,
) -> list[dict[str, Any]]:
    """One row for each tested expert. matrix: (E, E) overlap with the experts it stands against."""
    rows = []
    for name, result in outcomes[key].items():
        e = library.index(name)
        summary = ExpertSummary.from_adapter(library.adapters[e], experts[e])
        others = np.delete(matrix[e], e)
        known = others[~np.isnan(others)]
        values = (
            *(summary.update_norm, summary.effective_rank, summary.spectrum[0]),
            *(known.max() if known.size else float("nan"), float(margins[e])),
        )
        rows.append(
            {
                "expert": name,
                "variant": " ".join(key),
                **{d: _number(value) for d, value in zip(DIAGNOSTICS, values, strict=True)},
                "accuracy": dict(zip(METHODS, map(_number, result[0]), strict=True)),
            }
        )
    return rows


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """None where either is constant: it then has no order."""
    from scipy.stats import spearmanr  # comes with scikit-learn, which only data and scores need

    is_known = ~np.isnan(x)
    x, y = x[is_known], y[is_known]
    if len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None
    return _number(spearmanr(x, y).statistic)


def _mean(results: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    return _by_method(np.mean(list(results.values()), axis=0))


def _over_seeds(outcomes: _Outcomes, n: int, seeds: Sequence[int]) -> dict[str, Any]:
    keys = {str(seed): ("number", str(n), str(seed)) for seed in seeds}
    values = {s: np.mean(list(outcomes[key].values()), axis=0) for s, key in keys.items()}
    return {
        "mean": _by_method(np.mean(list(values.values()), axis=0)),
        "seeds": {seed: _by_method(value) for seed, value in values.items()},
    }


def _by_method(values: NDArray[np.float64]) -> dict[str, Any]:
    return {
        method: {"decisions": _number(values[0, m]), "majority": _number(values[1, m])}
        for m, method in enumerate(METHODS)
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
