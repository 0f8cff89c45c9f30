"""Figures of an expert, and how they go with the accuracy."""

from typing import Any

import pytest

from spectr_demo.evaluation.robustness.decisions import METHODS
from spectr_demo.evaluation.robustness.stress import RANKS, SIGMAS


@pytest.mark.slow
def test_diagnostics(stressed: dict[str, Any]) -> None:
    result = stressed["diagnostics"]
    assert len(result["variants"]) == 3 * (len(RANKS) + len(SIGMAS))
    row = next(r for r in result["variants"] if r["variant"] == "rank 1")
    assert row["effective_rank"] == pytest.approx(1)
    assert row["leading_share"] == 1
    assert row["accuracy"].keys() == set(METHODS)
    assert all(
        rho is None or -1 <= rho <= 1
        for by_method in result["spearman"].values()
        for rho in by_method.values()
    )
