"""Correlates figures of an expert that are known before any prompt (norm, rank, overlap) with how
often it is routed to rightly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spectr_demo.evaluation.robustness.decisions import METHODS
from spectr_demo.evaluation.robustness.libraries import Key
from spectr_demo.evaluation.robustness.variants import Experts, Variants, cut
from spectr_demo.experts.inspection import ExpertSummary, overlaps
from spectr_demo.experts.library import ExpertLibrary

DIAGNOSTICS = (
    *("update_norm", "effective_rank", "leading_share"),
    *("nearest_overlap", "generic_margin"),
)

Outcomes = dict[Key, dict[str, NDArray[np.float64]]]  # by library and expert: (2, methods)


def diagnose(
    library: ExpertLibrary, variants: Variants, noisy: Mapping[float, Experts], outcomes: Outcomes
) -> tuple[list[float | None], dict[str, Any]]:
    """The mean overlap of the twins for each sigma, and the section `diagnostics`."""
    E = len(library.names)
    rows, twin_overlaps = [], []
    for block, k in enumerate(variants.ranks, start=1):
        experts = cut(library, k)
        matrix = overlaps(replace(library, aligned=experts))
        key = "rank", str(k)
        rows += _rows(library, experts, matrix, variants.margins[block], key, outcomes)
    for block, (sigma, experts) in enumerate(noisy.items(), 1 + len(variants.ranks)):
        matrix = overlaps(replace(library, aligned=(*library.aligned, *experts)))
        twin_overlaps.append(rounded(matrix[:E, E:].diagonal().mean()))
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
    key: Key,
    outcomes: Outcomes,
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
                **{d: rounded(value) for d, value in zip(DIAGNOSTICS, values, strict=True)},
                "accuracy": dict(zip(METHODS, map(rounded, result[0]), strict=True)),
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
    return rounded(spearmanr(x, y).statistic)


def rounded(value: float) -> float | None:
    """To four digits; None stands for nan, which JSON does not have."""
    return None if np.isnan(value) else round(float(value), 4)
