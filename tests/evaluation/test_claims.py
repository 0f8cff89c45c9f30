"""Paired tests by hand-computed values; their figures are those of the tables."""

from typing import Any

import numpy as np
import pytest

from spectr_demo.evaluation.claims import (
    chat_claims,
    mean_of_domains,
    message_claims,
    paired,
    reading_claims,
    request_claims,
    score_claims,
)
from spectr_demo.evaluation.composition import SEGMENTS, SINGLE, Message
from spectr_demo.evaluation.composition_figures import composition_figures
from spectr_demo.evaluation.requests import METRICS, whom_figures
from spectr_demo.evaluation.results import likelihoods, task_scores
from spectr_demo.evaluation.tasks import Example

ANY = Example(prompt="", answer="", text="", key="", wording="{text}", is_heldout_wording=False)


def pair(*domains: list[float]) -> dict[str, Any]:
    """Of rows with these differences from one that has nothing."""
    values = [np.array(domain, dtype=float) for domain in domains]
    return paired(mean_of_domains(values), mean_of_domains([0 * domain for domain in values]))


def found(claims: list[dict[str, Any]], more: str, less: str) -> dict[str, Any]:
    (claim,) = [c for c in claims if (c["more"], c["less"]) == (more, less)]
    return claim


def test_p_counts_the_signs_that_differ_as_much() -> None:
    # All of 2^5 signs: 1 gives a sum of 5, and 1 of -5.
    assert pair([1, 1, 1, 1, 1])["p"] == pytest.approx(2 / 32)
    # 1 gives a sum of 5 and 5 one of 3; as many are as low.
    assert pair([1, 1, 1, 1, -1])["p"] == pytest.approx(12 / 32)
    assert pair([-1, -1, -1, -1, -1])["p"] == pytest.approx(2 / 32), "two-sided"
    assert pair([0, 0, 0]) == {
        "of_more": 0,
        "of_less": 0,
        "difference": {"mean": 0, "low": 0, "high": 0},
        "p": 1,
        "num": 3,
    }


def test_each_domain_counts_the_same() -> None:
    result = pair([1, 1], [0.5] * 8)
    assert result["of_more"] == result["difference"]["mean"] == 0.75
    assert result["num"] == 10


def test_the_interval_is_of_prompts_drawn_within_their_domains() -> None:
    # Domains differ, their prompts do not: nothing is left to chance.
    assert pair([1] * 4, [0] * 4)["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    # 1.96 standard errors of a mean of 400 signs: 0.098.
    interval = pair([1.0, -1.0] * 200)["difference"]
    assert interval["low"] == pytest.approx(-0.098, abs=0.01)
    assert interval["high"] == pytest.approx(0.098, abs=0.01)


def test_prompts_are_compared_one_by_one() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(100)
    less, shuffled = 0.9 * hard, rng.permutation(0.9 * hard)
    assert paired([hard / 100], [less / 100])["p"] == pytest.approx(2e-4)
    assert paired([hard / 100], [shuffled / 100])["p"] > 0.05


def test_scores_have_the_figures_of_the_table() -> None:
    answers = {
        "oracle": {"a": [1.0, 1.0, 0.0], "b": [0.5, 0.5], "c": [0.0, 0.0]},
        "spectr": {"a": [1.0, 0.0, 0.0], "b": [0.5, 0.25], "c": [1.0, 1.0]},
        "arrow": {"a": [0.0, 0.0, 1.0], "b": [0.0, 0.0], "c": [0.0, 0.0]},
    }
    claim = found(score_claims(answers), "spectr", "arrow")
    scores = task_scores(answers)
    # a: 0.5 and 0.5, b: 0.75 and 0; c, where the oracle never scores, is left out.
    assert claim["of_more"] == scores["spectr"]["of_oracle"]["mean"] == 0.625
    assert claim["of_less"] == scores["arrow"]["of_oracle"]["mean"] == 0.25
    assert (claim["difference"]["mean"], claim["num"]) == (0.375, 5)
    assert score_claims({"spectr": answers["spectr"], "arrow": answers["arrow"]}) == []
    single = {label: {"a": row["a"][:1]} for label, row in answers.items()}
    assert score_claims(single) == [], "one prompt"


def test_readings_have_the_figures_of_the_tables() -> None:
    def row(nll: list[float], right: list[float] | None = None) -> dict[str, Any]:
        part = {"nll": nll} if right is None else {"nll": nll, "right": right}
        return {"a": part, "b": {**part, "nll": [2 * x for x in nll]}}

    readings = {
        "base": row([4.0, 6.0]),
        "oracle": row([1.0, 1.0]),
        "spectr": row([2.0, 3.0], [0.5, 0.25]),
        "arrow": row([3.0, 3.0], [0.25, 0.0]),
    }
    likelihood, decisions = (
        found([c for c in reading_claims(readings) if c["figure"] == figure], "spectr", "arrow")
        for figure in ("likelihood", "decisions")
    )
    ways = likelihoods(readings)
    assert likelihood["of_more"] == ways["spectr"]["way"] == 0.625
    assert likelihood["of_less"] == ways["arrow"]["way"] == 0.5
    assert (decisions["of_more"], decisions["of_less"]) == (0.375, 0.125)


def test_chat_and_requests() -> None:
    chat = {"spectr": {"kl": [2.0, 3.0]}, "spectr-context": {"kl": [0.0, 1.0]}}
    (claim,) = chat_claims(chat)
    assert (claim["more"], claim["of_more"], claim["of_less"]) == ("spectr", 2.5, 0.5)
    own, raw = METRICS
    named = {
        name: {
            own: {"one": [1.0, 1.0], "vote": [1.0, 1.0], "layers": [0.5, 0.25]},
            raw: {"one": [1.0, 0.0], "vote": [1.0, 1.0], "layers": [0.5, 0.5]},
        }
        for name in ("a", "b")
    }
    figures = whom_figures(named, {name: [True, False] for name in named})
    layers, metric = request_claims(named)
    assert layers["of_more"] == figures[own]["all"]["one"] == 1
    assert layers["of_less"] == figures[own]["all"]["layers"] == 0.375
    assert metric["of_less"] == figures[raw]["all"]["one"] == 0.5
    assert layers["num"] == metric["num"] == 4


def test_messages_are_compared_whole() -> None:
    orders = [("a", "b"), ("b", "a"), ("a", "b", "c"), ("b", "a", "c")]
    messages = [Message(names=n, examples=(ANY,) * len(n), format="lines") for n in orders]
    scores = {
        "spectr-context": [[0.5, 0.5], [1.0, 0.25], [0.5, 1.0, 1.0], [1.0, 0.0, 0.0]],
        "spectr": [[0.5, 0.0], [0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.25, 0.0]],
        SEGMENTS: [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5, 0.0], [1.0, 0.5, 0.0]],
        SINGLE: [[0.5, 1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, 0.5, 0.0]],
    }
    rows = composition_figures(messages, scores, {})["rows"]
    claims = message_claims(messages, scores)
    own = rows["spectr-context"]["of_single"]
    claim = found(claims, "spectr-context", "spectr")
    assert claim["of_more"] == own["all"]["mean"]
    assert claim["of_less"] == rows["spectr"]["of_single"]["all"]["mean"]
    assert claim["num"] == 4, "messages, not parts"
    # All four messages are in favour: of 2^4 signs, 1 gives as much.
    assert claim["p"] == pytest.approx(2 / 16)
    assert found(claims, SEGMENTS, "spectr-context")["of_less"] == own["all"]["mean"]
    places = found(claims, "first", "second")
    assert (places["figure"], places["of_more"]) == ("places", own["first"]["mean"])
    assert places["of_less"] == own["second"]["mean"]
    assert places["difference"]["mean"] == rows["spectr-context"]["gap"]["mean"]


def test_what_no_expert_can_answer_has_no_claims() -> None:
    message = Message(names=("a", "b"), examples=(ANY, ANY), format="lines")
    nothing = [[0.0, 0.0]] * 2
    scores = {"spectr-context": [[1.0, 0.0]] * 2, SEGMENTS: nothing, SINGLE: nothing}
    assert message_claims([message, message], scores) == []
