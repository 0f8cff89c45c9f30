"""The words at the beginning of docs/results.md follow from the figures."""

import copy
from typing import Any

import pytest

from spectr_demo.evaluation.claims import PAIRS
from spectr_demo.evaluation.findings import in_words
from spectr_demo.evaluation.report import CLAIMS, claims_table


def shared(**shares: float) -> dict[str, Any]:
    return {"of_single": {group: {"mean": share} for group, share in shares.items()}}


@pytest.fixture
def results() -> dict[str, Any]:
    def scored(share: float, sql: float, cron: float) -> dict[str, Any]:
        domains = {"sql": {"mean": sql}, "cron": {"mean": cron}}
        return {"of_oracle": {"mean": share}, "domains": domains}

    def right(sql: float, cron: float) -> dict[str, Any]:
        return {"sql": {"all": {"answer": sql}}, "cron": {"all": {"answer": cron}}}

    return {
        "scores": {
            "base": scored(0.1, 0.0, 0.1),
            "oracle": scored(1.0, 0.9, 0.8),
            "spectr": scored(0.42, 0.3, 0.4),
            "spectr-context": scored(0.77, 0.85, 0.5),
        },
        "accuracy": {"spectr": right(0.2, 0.4), "spectr-context": right(1.0, 0.8)},
        "offdomain": {
            "base": {"kl": 0.0},
            "spectr": {"kl": 2.5},
            "spectr-context": {"kl": 0.25, "unrouted": 0.75},
        },
        "ordinary": {
            "ordinary": {"lengths": {"short": {"mean": 0.25}, "longer": {"mean": 0.2}}},
            "requests": {"all": {"base": 0.01, "wrong": 0.02}},
        },
        "composition": {
            "rows": {
                "base": shared(all=0.05),
                "spectr-context": shared(all=0.5, first=0.65, second=0.35),
                "segment oracle": shared(all=0.95),
            }
        },
    }


def test_each_finding_has_its_figures(results: dict[str, Any]) -> None:
    text = in_words(results)
    assert "reaches 0.77 of the score" in text
    assert "(`spectr`): 0.42. The base without experts (`base`): 0.10." in text
    assert "finds it in 90.0% of the decisions" in text
    assert "SpectR with K = 1 (`spectr`): 30.0%." in text
    assert "**The weakest domain** is `cron`. Its score is 0.50" in text
    assert "and 0.80 with its own expert alone" in text
    assert "by 0.25 nats a token (KL). It uses no expert in 75%" in text
    assert "(`spectr`): 2.50." in text
    assert "gives an expert to 25% of the short ones and 20% of the longer ones" in text
    assert "3.0% of the domains' own single requests do not get theirs (1.0% are left" in text
    assert "The targets of 5% and 1% are not reached." in text
    assert "reaches 0.50 of the score that each request's own expert reaches alone" in text
    assert "0.65 in the first place, 0.35 in the second place." in text
    assert "by hand, it is 0.95. The base without experts (`base`): 0.05." in text


def test_what_was_not_measured_is_not_mentioned(results: dict[str, Any]) -> None:
    few = copy.deepcopy(results)
    few |= {"accuracy": {}, "offdomain": {}, "composition": None, "ordinary": None}
    text = in_words(few)
    assert "right expert" not in text
    assert "chat" not in text
    assert "rdinary" not in text
    assert "three requests" not in text
    del few["scores"]["spectr-context"]
    assert in_words(few) == ""


def claim(more: str, less: str, p: float, difference: float = 0.1, **figure: str) -> dict[str, Any]:
    return {
        "figure": "scores",
        **figure,
        "more": more,
        "less": less,
        "of_more": 0.5,
        "of_less": 0.5 - difference,
        "difference": {"mean": difference, "low": difference - 0.25, "high": difference + 0.25},
        "p": p,
        "num": 32,
    }


def test_words_say_more_only_where_a_test_does(results: dict[str, Any]) -> None:
    results["claims"] = [
        claim("spectr-context", "base", 0.001),
        claim("spectr-context", "spectr", 0.02),  # times the five claims it is 0.1
        claim("oracle", "spectr-context", 0.001),
        claim("spectr", "arrow", 0.001, difference=-0.1),
    ]
    results["composition"]["claims"] = [claim("first", "second", 0.9, figure="places")]
    text = in_words(results)
    told = "more than `base`; less than `oracle`; not told apart from `spectr`."
    assert f"By paired tests that is {told}" in text
    assert "`spectr` reaches 0.42. By paired tests that is less than `arrow`;" in text
    assert "By a paired test the first place is not told apart from the second." in text
    one, spectr, falls_short = (
        text.index(part) for part in ("**A message", "**SpectR itself", "Where it falls short")
    )
    assert one < falls_short < spectr

    results["claims"][0]["p"] = 0.02
    results["claims"][3]["difference"]["mean"] = 0.1
    text = in_words(results)
    one, spectr, falls_short = (
        text.index(part) for part in ("**A message", "**SpectR itself", "Where it falls short")
    )
    assert spectr < falls_short < one


def test_the_table_of_claims_has_each_test(results: dict[str, Any]) -> None:
    results["claims"] = [claim("spectr", "arrow", 0.0202), claim("spectr", "TIES", 0.0003)]
    results["composition"]["claims"] = [claim("first", "second", 0.001, -0.1, figure="places")]
    lines = claims_table(results).splitlines()
    assert lines[2:5] == [
        "| One request: `spectr` scores more than `arrow` | 0.500 | 0.400 "
        "| 0.100 (-0.150 to 0.350) | 0.0202 | 32 | no |",
        "| One request: `spectr` scores more than `TIES` | 0.500 | 0.400 "
        "| 0.100 (-0.150 to 0.350) | 0.0003 | 32 | yes |",
        "| Two and three requests, `spectr-context`: the first scores more than the second "
        "| 0.500 | 0.600 | -0.100 (-0.350 to 0.150) | 0.0010 | 32 | the opposite |",
    ]
    assert "times the number of claims (3), is below 0.05" in lines[-1]


def test_every_claim_has_its_words() -> None:
    assert CLAIMS.keys() == PAIRS.keys()
