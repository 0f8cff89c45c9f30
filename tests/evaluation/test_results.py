"""Scores and their intervals, from the scores of single answers."""

import numpy as np
import pytest

from spectr_demo.evaluation.results import task_scores


def test_scores_are_divided_by_the_oracles_of_each_domain() -> None:
    answers = {
        "oracle": {"a": [1.0] * 10, "b": [0.5] * 10, "c": [0.0] * 10},
        "other": {"a": [0.5] * 10, "b": [0.5] * 10, "c": [0.0] * 10},
    }
    summary = task_scores(answers)
    assert summary["other"]["macro"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["other"]["of_oracle"]["mean"] == 0.75
    assert summary["oracle"]["of_oracle"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_an_interval_holds_its_mean_and_narrows_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for num in (10, 100):
        scores = rng.integers(0, 2, num).astype(float).tolist()
        interval = task_scores({"x": {"a": scores}})["x"]["macro"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        widths.append(interval["high"] - interval["low"])
    assert widths[1] < widths[0] / 2
