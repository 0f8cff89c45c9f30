"""Ordinary prompts and requests: which get an expert, as they are served, at each confidence."""

from dataclasses import replace

import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation.evaluate import Evaluation
from spectr_demo.evaluation.ordinary import (
    Asked,
    chosen_experts,
    levels,
    ordinary_figures,
    outcome,
)
from spectr_demo.evaluation.report import to_markdown
from spectr_demo.routing.routers import parse_router
from tests.conftest import IN_CONTEXT, BuildModel
from tests.evaluation.conftest import SETTINGS

PROMPTS = [
    "What is red?",
    "Say red, then green.\nAnd blue? I do not know. Tell me about ships",
    "ok",
    "1. green\n2. red ships\n3. the blue one",
]


def test_one_reading_gives_the_lanes_of_each_confidence(routed_model: SpectrModel) -> None:
    names = routed_model.library.names
    router = parse_router(replace(IN_CONTEXT, confidence=0.3), names)
    found = chosen_experts(routed_model, router, PROMPTS)
    assert list(found) == [str(level) for level in levels(router)]
    assert levels(router)[0] == 0.3 and len(found) == 7
    for level, rows in found.items():
        config = replace(router, confidence=float(level))
        for prompt, lanes in zip(PROMPTS, rows, strict=True):
            served = routed_model.lanes(config, routed_model.encode(prompt))
            assert lanes == [None if lane.expert is None else names[lane.expert] for lane in served]
    assert any(len(lanes) > 1 for lanes in found["0.3"])


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        (["sql"], "right"),
        (["cron"], "wrong"),
        ([None], "base"),
        ([None, None], "base"),
        (["sql", "cron"], "wrong"),
        (["sql", None], "wrong"),
    ],
)
def test_a_request_is_right_if_it_is_one_lane_for_its_own_expert(
    lanes: list[str | None], expected: str
) -> None:
    assert outcome(lanes, "sql") == expected


def test_figures_by_hand() -> None:
    entries = {
        "short": [
            {"kind": "near miss", "language": "en", "prompt": "a"},
            {"kind": "code", "language": "en", "prompt": "b"},
        ],
        "longer": [{"kind": "code", "language": "fr", "prompt": "c"}],
    }
    ordinary = {
        "short": {"0.5": [["sql"], ["sql"]], "0.9": [["sql"], [None]]},
        "longer": {"0.5": [[None, "cron"]], "0.9": [[None]]},
    }
    asked = {
        "sql": Asked(
            chosen={"0.5": [["sql"], ["cron"]], "0.9": [["sql"], [None]]},
            is_heldout=[False, True],
        )
    }
    figures = ordinary_figures(entries, ordinary, asked, 0.9)
    assert figures["curve"]["0.5"] == {"short": 1, "longer": 1, "num": 2, "base": 0, "wrong": 0.5}
    assert figures["curve"]["0.9"] == {"short": 0.5, "longer": 0, "num": 2, "base": 0.5, "wrong": 0}
    taken = figures["ordinary"]
    assert {group: row["mean"] for group, row in taken["kinds"].items()} == {
        "near miss": 1,
        "code": 0,
    }
    assert taken["languages"]["en"]["num"] == 2 and taken["lengths"]["short"]["mean"] == 0.5
    assert figures["requests"]["seen wording"] == {"num": 1, "base": 0, "wrong": 0}
    assert figures["requests"]["held-out wording"] == {"num": 1, "base": 1, "wrong": 0}
    assert figures["domains"] == {"sql": {"num": 2, "base": 0.5, "wrong": 0}}
    assert figures["chosen"] == {
        "sql": {"base": 1, "sql": 1},
        "ordinary": {"base": 2, "sql": 1},
    }
    halves = ordinary_figures(entries, ordinary, asked, 0.5)["chosen"]
    assert halves["ordinary"] == {"several": 1, "sql": 2}


def test_they_are_part_of_an_evaluation(build_engine: BuildModel) -> None:
    labels = ("base", "oracle", "spectr-context")
    settings = replace(SETTINGS, num_pairs=0, num_ordinary=3, num_requests=4, labels=labels)
    results = Evaluation(build_engine(), settings).run()
    lengths = results["ordinary"]["ordinary"]["lengths"]
    assert [row["num"] for row in lengths.values()] == [3, 3]
    assert results["ordinary"]["requests"]["all"]["num"] == 8
    assert set(results["ordinary"]["domains"]) == {"sql", "chords"}
    report = to_markdown(results)
    share = results["ordinary"]["curve"]["0.9"]["short"]
    assert f"| short ordinary prompts with an expert | 3 | {share:.1%} | <= 5% |" in report
    assert "## Whom a request is for" in report
    none = replace(settings, labels=("base", "oracle"))
    assert "ordinary" not in Evaluation(build_engine(), none).run()
