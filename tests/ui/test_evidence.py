"""The pictures of evidence say what the results say; and which experts, which routers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from spectr_demo.config import DEFAULT_ROUTER
from spectr_demo.evaluation.report import load_results
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.ui import evidence, evidence_tab

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found = load_results()
    assert found is not None
    return found


def test_each_question_has_a_sorted_chart(results: dict[str, Any]) -> None:
    found = evidence.pictures(results)
    assert set(found) == set(evidence_tab.QUESTIONS)
    for key, is_less_better in {
        "right": False,
        "finds": False,
        "chat": True,
        "cost": False,
    }.items():
        picture = found[key]
        assert picture is not None
        values = list(picture.figure.data[0].x)
        assert values == sorted(values, reverse=not is_less_better), key
        assert len(picture.rows) == len(values) > 5
        assert any(picture.figure.data[0].error_x.array), "no interval"
        assert sum(name.startswith("<b>") for name in picture.figure.layout.yaxis.ticktext) == 1


def test_rows_have_names_for_people(results: dict[str, Any]) -> None:
    found = evidence.pictures(results)
    names = {name for key in ("right", "finds", "chat", "cost") for name, _ in found[key].rows}  # type: ignore[union-attr]
    assert not names & set(ROUTERS), "internal names"
    assert ROUTERS[DEFAULT_ROUTER].display_name in names
    assert not any("`" in name or "(outputs)" in name for name in names)


def test_titles_state_what_was_measured(results: dict[str, Any]) -> None:
    found = evidence.pictures(results)
    score = results["scores"][DEFAULT_ROUTER]["macro"]["mean"]
    share = results["decisions"][DEFAULT_ROUTER]["macro"]["mean"]
    assert f"SpectR in context scores {score:.2f};" in found["right"].title  # type: ignore[union-attr]
    assert f"{share:.0%} of its decisions" in found["finds"].title  # type: ignore[union-attr]
    assert "SpectR (paper) is best with 39%" in found["finds"].title  # type: ignore[union-attr]
    assert "by 0.00 nats a token" in found["chat"].title  # type: ignore[union-attr]

    other = copy.deepcopy(results)
    other["scores"][DEFAULT_ROUTER]["macro"]["mean"] = 0.12
    other["decisions"][DEFAULT_ROUTER]["macro"]["mean"] = 0.34
    changed = evidence.pictures(other)
    assert "scores 0.12;" in changed["right"].title  # type: ignore[union-attr]
    assert "34% of its decisions" in changed["finds"].title  # type: ignore[union-attr]


def test_a_domain_filters_answers_decisions_and_choices(results: dict[str, Any]) -> None:
    found = evidence.pictures(results, "sentiment")
    row = results["scores"]["spectr"]["domains"]["sentiment"]
    expected = f"{row['mean']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
    assert ("SpectR", expected) in found["right"].rows  # type: ignore[union-attr]
    assert "in sentiment" in found["finds"].title  # type: ignore[union-attr]
    assert found["confusion"].title.startswith("90 of 100 requests in sentiment")  # type: ignore[union-attr]
    assert [row[0] for row in found["confusion"].rows] == ["sentiment"]  # type: ignore[union-attr]
    assert "8 to the base" in found["confusion"].title  # type: ignore[union-attr]
    assert found["chat"].title == evidence.pictures(results)["chat"].title  # type: ignore[union-attr]
    assert ("all domains", "") in evidence.domains(results)
    assert ("Question to SQL", "sql") in evidence.domains(results)


def test_everybody_who_was_asked_went_somewhere(results: dict[str, Any]) -> None:
    picture = evidence.pictures(results)["confusion"]
    assert picture is not None
    totals = {row[0]: sum(map(int, row[1:])) for row in picture.rows}
    assert totals.pop("ordinary") == 300
    assert set(totals.values()) == {100}
    shown = [sum(cell or 0 for cell in row) for row in picture.figure.data[0].z]
    assert shown == pytest.approx([100] * len(shown))


def test_results_of_before_show_what_they_have(results: dict[str, Any]) -> None:
    old = {key: value for key, value in results.items() if key not in ("decisions", "ordinary")}
    found = evidence.pictures({**old, "offdomain": {}})
    assert found["right"] is not None
    assert found["finds"] is found["confusion"] is found["chat"] is None


def test_the_page_has_the_same_speeds_as_the_benchmark() -> None:
    ours = json.loads(evidence.DECODE.read_text())
    assert ours == json.loads((ROOT / "benchmarks" / "results" / "decode.json").read_text())


def test_each_router_is_explained_in_a_sentence() -> None:
    shown = evidence_tab._routers()
    for row in ROUTERS.values():
        assert row.sentence.endswith(".") and row.sentence.count(". ") == 0
        assert row.sentence.replace("'", "&#x27;") in shown
    assert "`" not in shown
