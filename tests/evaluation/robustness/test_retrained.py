"""Experts trained again: a copy cannot be told from the expert, a stranger can."""

from dataclasses import replace

import pytest

from spectr_demo.evaluation.evaluate import Evaluation
from spectr_demo.evaluation.report import to_markdown
from tests.conftest import BuildModel, SaveExpert
from tests.evaluation.conftest import SETTINGS


@pytest.mark.slow
def test_retrained_experts_are_put_in_place_and_beside(
    build_engine: BuildModel, save_expert: SaveExpert
) -> None:
    """A copy cannot be told from the expert, a stranger can."""
    copy = save_expert("again/sql", seed=0)
    other = save_expert("other/sql", seed=7)
    settings = replace(SETTINGS, labels=("base", "oracle"))
    engine = build_engine()
    before = Evaluation(engine, settings).run()
    again = replace(settings, retrained=(f"sql={copy}", f"sql={other}"))
    results = Evaluation(engine, again).run()
    assert results["scores"] == before["scores"]
    same, stranger = results["retrained"]
    assert (same["expert"], same["retrained"]) == ("sql", "again/sql")
    assert same["instead"] == same["before"], "the library is the same one"
    assert same["overlap"] == pytest.approx(1, abs=1e-3)
    assert same["update_norm"] == pytest.approx(1, abs=1e-3)
    assert same["nll"]["own"] == same["nll"]["other"]
    assert "respond to the same inputs" in same["warnings"][0]
    assert stranger["before"] == same["before"], "the library is whole again"
    assert stranger["overlap"] < 0.9 and stranger["warnings"] == []
    for shares in stranger["beside"].values():
        assert 0 <= shares["own"] + shares["other"] <= 1
    report = to_markdown(results)
    assert f"{stranger['instead']['spectr']:.1%}" in report
    assert engine.library.names == ("sql", "chords", "other")


def test_a_retrained_expert_must_say_which(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, retrained=("cron=somewhere",))
    with pytest.raises(ValueError, match=r"'cron=somewhere'.*NAME=FOLDER with one of sql, chords"):
        Evaluation(build_engine(), settings)
