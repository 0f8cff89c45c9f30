"""Paired tests of what README.md and docs/results.md say of two rows of the results.

All rows answer the same prompts, so two rows are compared prompt by prompt. A figure of a row is a
sum over its prompts. What is tested is the difference of two rows' figures:

p: of a permutation test, two-sided. If two rows were alike, their results for a prompt could as
well be exchanged: each prompt's difference has its sign drawn anew. A prompt keeps its domain.
interval: 95%, a percentile bootstrap over the prompts of each domain.

Scores are divided by the oracle's, which are taken as they are, not resampled.
Axes: n prompts of a domain, M messages, D domains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spectr_demo.config import DEFAULT_ROUTER
from spectr_demo.evaluation.composition import SEGMENTS, SINGLE, Message, Scores
from spectr_demo.evaluation.composition_figures import PLACES, Resampled
from spectr_demo.evaluation.requests import METRICS
from spectr_demo.evaluation.results import RESAMPLING_SEED, interval
from spectr_demo.evaluation.scores import NUM_RESAMPLES

NUM_PERMUTATIONS = 9999
_PERMUTATIONS_AT_ONCE = 500  # bounds the memory

ONE_CHOICE, EACH_LAYER = "one choice", "each layer for itself"
RAW_METRIC = "one choice in the raw metric"
# What is compared, by figure: the row that is to have more of it, and the other one. Rows that were
# not measured are left out.
PAIRS: Mapping[str, Sequence[tuple[str, str]]] = {
    "scores": (
        *(
            (DEFAULT_ROUTER, other)
            for other in (
                *("base", "uniform (outputs)", "uniform (parameters)", "TIES", "arrow", "lag"),
                *("norm", "spectr-paper", "spectr", "spectr-calibrated"),
            )
        ),
        ("oracle", DEFAULT_ROUTER),
        *(("spectr", other) for other in ("base", "uniform (outputs)", "TIES", "arrow")),
        *(("spectr-paper", other) for other in ("base", "uniform (outputs)", "TIES", "arrow")),
        ("spectr-calibrated", "spectr"),
    ),
    "likelihood": (
        *((DEFAULT_ROUTER, other) for other in ("spectr", "spectr-calibrated")),
        *(("spectr", other) for other in ("uniform (outputs)", "TIES", "arrow")),
        ("spectr-calibrated", "spectr"),
    ),
    "decisions": (
        *((DEFAULT_ROUTER, other) for other in ("spectr", "spectr-calibrated")),
        ("spectr", "arrow"),
        ("spectr-calibrated", "spectr"),
    ),
    "chat": (("spectr", DEFAULT_ROUTER), ("arrow", DEFAULT_ROUTER)),
    "requests": ((ONE_CHOICE, EACH_LAYER), (ONE_CHOICE, RAW_METRIC)),
    "messages": (
        *(
            (DEFAULT_ROUTER, other)
            for other in (
                *("base", "uniform (outputs)", "TIES", "arrow", "lag", "spectr-paper", "spectr"),
            )
        ),
        (SEGMENTS, DEFAULT_ROUTER),
    ),
    "places": ((PLACES[0], PLACES[1]),),
}

Floats = NDArray[np.float64]
Summands = list[Floats]  # of each domain (n,): what each prompt adds to a row's figure


def claims(figure: str, rows: Mapping[str, Summands]) -> list[dict[str, Any]]:
    """The tests of one figure's `PAIRS`, of the rows that were measured.

    more, less: the two rows, and their figures as `of_more` and `of_less`. difference: the first
    less the second, with its interval. num: how many prompts or messages are compared. One of which
    a domain has a single prompt is left out: there is nothing to resample.
    """
    return [
        {"figure": figure, "more": more, "less": less, **paired(rows[more], rows[less])}
        for more, less in PAIRS[figure]
        if {more, less} <= rows.keys() and min(map(len, rows[more])) > 1
    ]


def paired(more: Summands, less: Summands) -> dict[str, Any]:
    """Two rows' figures, their difference with its interval, p and the number of prompts."""
    # Of requirements-train.txt; the page and the report read results without it.
    from scipy.stats import bootstrap, permutation_test

    differences = [a - b for a, b in zip(more, less, strict=True)]
    pooled = np.concatenate(differences)
    test = permutation_test(
        (pooled,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_PERMUTATIONS,
        batch=_PERMUTATIONS_AT_ONCE,
        rng=RESAMPLING_SEED,
    )
    resampled = bootstrap(
        differences,
        lambda *domains, axis: sum(domain.sum(axis) for domain in domains),
        n_resamples=NUM_RESAMPLES,
        vectorized=True,
        method="percentile",
        rng=RESAMPLING_SEED,
    )
    return {
        "of_more": round(float(np.concatenate(more).sum()), 4),
        "of_less": round(float(np.concatenate(less).sum()), 4),
        "difference": interval(pooled.sum(), resampled.bootstrap_distribution),
        "p": round(float(test.pvalue), 5),
        "num": len(pooled),
    }


def mean_of_domains(values: Sequence[Floats]) -> Summands:
    """Summands of the mean over the domains of each domain's mean."""
    return [of_domain / (len(of_domain) * len(values)) for of_domain in values]


def score_claims(answers: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Of `of_oracle`, see `task_scores`. answers: scores of single answers by label and domain."""
    oracle = {name: float(np.mean(scores)) for name, scores in answers.get("oracle", {}).items()}
    names = [name for name, mean in oracle.items() if mean > 0]
    if not names:
        return []
    rows = {
        label: mean_of_domains([np.asarray(row[name]) / oracle[name] for name in names])
        for label, row in answers.items()
    }
    return claims("scores", rows)


def reading_claims(readings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of `way`, see `likelihoods`, and of the answer's decisions. readings: by label and domain."""
    nll = {
        label: {name: np.asarray(part["nll"]) for name, part in row.items()}
        for label, row in readings.items()
    }
    result = []
    if {"base", "oracle"} <= nll.keys():
        base, oracle = (
            float(np.mean([x.mean() for x in nll[label].values()])) for label in ("base", "oracle")
        )
        way = {
            label: mean_of_domains(
                [
                    (nll["base"][name] - of_domain) / (base - oracle)
                    for name, of_domain in row.items()
                ]
            )
            for label, row in nll.items()
        }
        result += claims("likelihood", way)
    right = {
        label: mean_of_domains([np.asarray(part["right"]) for part in row.values()])
        for label, row in readings.items()
        if all("right" in part for part in row.values())
    }
    return result + claims("decisions", right)


def chat_claims(chat: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Of the KL to the base. chat: by label, of each prompt."""
    return claims(
        "chat", {label: mean_of_domains([np.asarray(row["kl"])]) for label, row in chat.items()}
    )


def request_claims(
    named: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> list[dict[str, Any]]:
    """Of whom requests are for. named: `by_metric` of each domain."""
    own, raw = METRICS
    keys = {ONE_CHOICE: (own, "one"), EACH_LAYER: (own, "layers"), RAW_METRIC: (raw, "one")}
    rows = {
        row: mean_of_domains([np.asarray(of[metric][key]) for of in named.values()])
        for row, (metric, key) in keys.items()
    }
    return claims("requests", rows)


def message_claims(
    messages: Sequence[Message], scores: Mapping[str, Scores]
) -> list[dict[str, Any]]:
    """Of `of_single`, see `composition_figures`; whole messages are compared. In that of places the
    rows are a message's first part and its second one. Which domain stands first is arbitrary:
    each order of two domains is as frequent as the other one."""
    sums, single = Resampled(messages), scores[SINGLE]
    every = {label: sums.summands(values, single, "all") for label, values in scores.items()}
    places = {
        place: sums.summands(scores[DEFAULT_ROUTER], single, place)
        for place in PLACES[:2]
        if DEFAULT_ROUTER in scores
    }
    return [
        claim
        for figure, rows in {"messages": every, "places": places}.items()
        for claim in claims(figure, {label: [x] for label, x in rows.items() if x is not None})
    ]
