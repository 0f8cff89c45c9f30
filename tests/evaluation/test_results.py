"""Scores and their intervals, from the scores of single answers."""

import numpy as np
import pytest

from spectr_demo.evaluation.results import chat_shifts, decisions, task_scores


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


def test_decisions_are_those_of_routers_that_choose() -> None:
    readings = {
        "base": {"a": {"nll": [1.0, 2.0]}, "b": {"nll": [1.0]}},
        "spectr": {"a": {"nll": [1.0, 2.0], "right": [0.25, 0.75]}, "b": {"right": [1.0, 1.0]}},
    }
    found = decisions(readings)
    assert list(found) == ["spectr"]
    assert found["spectr"]["macro"]["mean"] == 0.75
    assert found["spectr"]["domains"]["a"]["mean"] == 0.5
    assert found["spectr"]["domains"]["a"]["low"] < 0.5 < found["spectr"]["domains"]["a"]["high"]
    assert decisions({"base": readings["base"]}) == {}


def test_how_far_chat_is_moved_has_an_interval() -> None:
    rows = {
        "base": {"kl": [0.0] * 20, "agreement": [1.0] * 20},
        "spectr": {"kl": [1.0, 3.0] * 10, "agreement": [0.5] * 20},
    }
    found = chat_shifts(rows)["spectr"]
    assert (found["kl"], found["agreement"]) == (2.0, 0.5)
    assert found["kl_interval"]["mean"] == 2.0
    assert 1 < found["kl_interval"]["low"] < 2 < found["kl_interval"]["high"] < 3
    assert chat_shifts(rows)["base"]["kl_interval"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
