"""Intervals by hand-computed values; scores by wording."""

import pytest

from spectr_demo.evaluation.scores import score_answers, summarize
from spectr_demo.evaluation.tasks import TASKS, Example


def test_wilson_interval_of_half() -> None:
    # 5 of 10: centre 0.5, half width 0.2634 (Wilson 1927).
    score = summarize([1.0] * 5 + [0.0] * 5)
    assert (score.mean, score.num) == (0.5, 10)
    assert score.low == pytest.approx(0.2366, abs=1e-3)
    assert score.high == pytest.approx(0.7634, abs=1e-3)


def test_all_wrong_still_has_an_interval() -> None:
    score = summarize([0.0] * 200)
    assert (score.mean, score.low) == (0.0, 0.0)
    assert score.high == pytest.approx(0.0188, abs=1e-3)


def test_graded_scores_are_bootstrapped() -> None:
    score = summarize([0.4, 0.5, 0.6, 0.7] * 25)
    assert score.mean == pytest.approx(0.55)
    # 1.96 standard errors of the mean: 1.96 * 0.1118 / 10 = 0.0219.
    assert score.low == pytest.approx(0.528, abs=4e-3)
    assert score.high == pytest.approx(0.572, abs=4e-3)
    assert summarize([0.4, 0.5, 0.6, 0.7] * 25) == score


def test_no_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="got none"):
        summarize([])


def test_scores_are_kept_apart_by_wording() -> None:
    examples = [
        Example(
            prompt="p",
            answer='{"intent": "TurnOn"}',
            text="t",
            key="k",
            wording="w",
            is_heldout_wording=bool(i % 2),
        )
        for i in range(4)
    ]
    right, wrong = '{"intent": "TurnOn"}', "no"
    scores = score_answers(TASKS["smart_home"], examples, [right, wrong, right, right])
    assert {group: score.mean for group, score in scores.items()} == {
        "all": 0.75,
        "seen wording": 1.0,
        "held-out wording": 0.5,
    }
