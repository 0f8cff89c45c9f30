"""Figures of messages with several requests, from scores that are known."""

import json
from typing import Any

import pytest

from spectr_demo.evaluation.composition import SEGMENTS, SINGLE, Message
from spectr_demo.evaluation.composition_figures import composition_figures, is_right
from spectr_demo.evaluation.findings import in_words
from spectr_demo.evaluation.report import composition_tables
from spectr_demo.evaluation.tasks import Example

ANY = Example(prompt="", answer="", text="", key="", wording="{text}", is_heldout_wording=False)


def message(*names: str, format_: str = "lines") -> Message:
    return Message(names=names, examples=(ANY,) * len(names), format=format_)


def figures(**rows: list[list[float]]) -> dict[str, Any]:
    messages = [message("a", "b"), message("b", "a", format_="then"), message("a", "b", "c")]
    single = [[0.5, 1.0], [1.0, 0.5], [0.5, 1.0, 0.0]]
    segments = [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5, 0.0]]
    routing: dict[str, list[float]] = {
        "prompt": [1.0, 0.5],
        "answer": [1.0, 0.0],
        "switch": [0, 3],
        "switched": [1, 0],
    }
    longer = {key: [*values, values[-1]] for key, values in routing.items()}
    scores = {**rows, SEGMENTS: segments, SINGLE: single}
    result = composition_figures(messages, scores, {"router": [routing, routing, longer]})
    json.dumps(result, allow_nan=False)
    return result


@pytest.fixture
def composition() -> dict[str, Any]:
    return figures(
        router=[[0.5, 0.0], [1.0, 0.25], [0.25, 1.0, 0.0]],
        base=[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0, 0.0]],
    )


def test_shares_are_of_each_domains_score_alone(composition: dict[str, Any]) -> None:
    row = composition["rows"]["router"]
    # a: (0.5 + 0.25 + 0.25) / 1.5, b: (0 + 1 + 1) / 3; c never scores alone and is left out.
    assert row["of_single"]["all"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
    assert row["of_single"]["first"]["mean"] == pytest.approx((0.75 / 1 + 1) / 2, abs=1e-4)
    assert row["of_single"]["second"]["mean"] == pytest.approx((0.5 + 1 / 2) / 2, abs=1e-4)
    assert row["gap"]["mean"] == pytest.approx(0.875 - 0.5, abs=1e-4)
    assert row["of_single"]["then"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert row["of_single"]["three"]["mean"] == pytest.approx((0.5 + 1) / 2)
    assert "third" not in row["of_single"], "nothing to divide by"
    assert "numbered" not in row["of_single"], "not asked"
    # a: 1 / 1.5, b: 2 / 1.5
    assert row["of_segments"]["mean"] == 1
    assert row["of_segments"]["low"] <= 1 <= row["of_segments"]["high"]
    assert composition["rows"][SINGLE]["of_single"]["all"] == {"mean": 1, "low": 1, "high": 1}
    assert composition["rows"]["base"]["of_single"]["all"] == {"mean": 0, "low": 0, "high": 0}
    assert row["domains"] == {"a": 0.3333, "b": 0.6667, "c": 0}
    assert composition["num"] == {"two": 2, "three": 1}


def test_a_message_is_right_if_all_its_parts_are() -> None:
    almost = [[0.45, 0.9], [1.0, 0.44], [1.0, 1.0, 1.0]]
    whole = figures(router=almost)["rows"]["router"]["whole"]
    assert whole["two"]["mean"] == 0.5 and whole["two"]["num"] == 2
    assert whole["three"]["mean"] == 1
    assert is_right(0.9, 1.0) and not is_right(0.89, 1.0)
    assert is_right(1.0, 0.0) and not is_right(0.9, 0.0)


def test_choices_by_segment(composition: dict[str, Any]) -> None:
    routing = composition["rows"]["router"]["routing"]
    assert routing["prompt"] == {"first": 1, "second": 0.5, "third": 0.5}
    assert routing["answer"] == {"first": 1, "second": 0, "third": 0}
    assert routing["switch"] == 3 and routing["switched"] == 0
    assert composition["rows"][SEGMENTS]["routing"] is None


def test_what_nobody_can_answer_has_no_shares() -> None:
    nothing = [[0.0, 0.0]]
    scores = {"router": [[1.0, 0.0]], SEGMENTS: nothing, SINGLE: nothing}
    rows = composition_figures([message("a", "b")], scores, {})["rows"]
    assert rows["router"]["of_single"] == {} and "of_segments" not in rows["router"]
    assert "gap" not in rows["router"]
    tables = composition_tables({"num": {"two": 1, "three": 0}, "rows": rows})
    assert "| router | - | - |" in tables


def test_tables_show_figures_and_targets() -> None:
    rows = {"spectr-context": [[0.5, 0.5], [0.5, 0.5], [0.5, 0.0, 0.0]]}
    composition = figures(**rows)
    tables = composition_tables(composition)
    # a: 1.5 / 1.5, b: 1.0 / 3
    assert "| spectr-context | 0.667 (" in tables
    assert "| the segment oracle's share of the single-request oracle | >= 0.85 | 0.750 (" in tables
    assert "2 messages with two held-out requests" in tables
    line = next(line for line in tables.splitlines() if "share of the segment oracle" in line)
    # a: 1.5 / 1.5, b: 1.0 / 1.5
    assert "| >= 0.90 | 0.833 (" in line and line.endswith("| no |")


@pytest.mark.parametrize(("share", "helps"), [(0.91, True), (0.89, False)])
def test_a_finding_stands_where_its_target_puts_it(share: float, helps: bool) -> None:
    interval = {"low": 0.0, "high": 1.0}
    every = {"all": 0.8, "first": 0.85, "second": 0.75}
    row = {
        "of_single": {group: {"mean": mean, **interval} for group, mean in every.items()},
        "of_segments": {"mean": share, **interval},
    }
    own = {"of_oracle": {"mean": 1.0}, "domains": {"sql": {"mean": 1.0}}}
    results = {
        "scores": {"oracle": own, "spectr-context": own},
        "accuracy": {},
        "offdomain": {},
        "composition": {"rows": {"spectr-context": row, SEGMENTS: row}},
    }
    text = in_words(results)
    assert "reaches 0.80 of the score" in text
    assert "alone: 0.85 in the first place, 0.75 in the second place." in text
    finding, falls_short = (text.index(t) for t in ("**Messages with", "Where it falls short"))
    assert (finding < falls_short) == helps
