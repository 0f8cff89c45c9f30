"""The evaluation on a tiny model: complete, resumable, and its report is made of its numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation import evaluate
from spectr_demo.evaluation.compositional import LAYOUTS, make_pairs
from spectr_demo.evaluation.evaluate import CONTENDERS, QUICK, Evaluation, Settings, summarise
from spectr_demo.evaluation.report import scores_table, to_markdown
from spectr_demo.evaluation.tasks import TASKS, Split
from tests.conftest import BuildModel, SaveExpert

SETTINGS = Settings(num_examples=2, num_pairs=2, num_offdomain=2, stress_texts=0)


@pytest.fixture
def build_engine(
    build_model: BuildModel, save_expert: SaveExpert, monkeypatch: pytest.MonkeyPatch
) -> BuildModel:
    """Random experts under the names of two tasks, of which few examples are left."""
    for name in ("sql", "chords"):
        split = TASKS[name].build(0)
        few = Split(train=split.train[:4], heldout=split.heldout[:12])
        task = replace(TASKS[name], build=lambda seed, few=few: few, max_new_tokens=4)
        monkeypatch.setitem(TASKS, name, task)
    folders = [save_expert(name, seed=seed) for seed, name in enumerate(["sql", "chords", "other"])]
    return lambda: build_model(folders)


def test_every_contender_is_measured_everywhere(build_engine: BuildModel) -> None:
    results = Evaluation(build_engine(), replace(SETTINGS, stress_texts=1)).run()
    json.dumps(results, allow_nan=False)
    labels = {contender.label for contender in CONTENDERS}
    assert results["scores"].keys() == results["likelihood"].keys() == labels
    constant = {"base", "oracle", "uniform (outputs)", "uniform (parameters)"}
    routing = labels - constant - {c.label for c in CONTENDERS if c.is_merge}
    assert results["accuracy"].keys() == routing
    assert results["offdomain"].keys() == results["compositional"].keys()
    assert results["offdomain"]["base"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["offdomain"]["base"]["agreement"] == 1.0
    assert results["offdomain"]["spectr"]["kl"] > 0
    assert set(results["compositional"]["spectr"]) == set(LAYOUTS)
    assert results["likelihood"]["base"]["way"] == 0
    assert results["likelihood"]["oracle"]["way"] == 1
    assert set(results["meta"]["experts"]) == {"sql", "chords", "other"}

    report = to_markdown(results)
    assert "spectr-context" in report
    accuracy = results["stress"]["number"]["1000"]["mean"]["spectr"]["decisions"]
    assert f"{accuracy:.1%}" in report
    assert f"{results['likelihood']['spectr']['macro']:.3f}" in report


def test_tests_of_no_prompts_are_left_out(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, num_pairs=0, num_offdomain=0, labels=QUICK)
    results = Evaluation(build_engine(), settings).run()
    assert results["offdomain"] == {}
    assert not any(results["compositional"].values())
    report = to_markdown(results)
    assert "## Routing accuracy" in report
    assert "## Ordinary chat" not in report
    assert "## Two requests" not in report


def test_an_interrupted_evaluation_goes_on(
    build_engine: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, labels=("base", "oracle", "spectr"))
    read, calls = evaluate.read, 0

    def interrupted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return read(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Evaluation(build_engine(), settings).run()
        calls = 100
        results = Evaluation(build_engine(), settings).run()
        measured = calls - 100
        again = Evaluation(build_engine(), settings).run()
        assert calls - 100 == measured, "a finished evaluation measures nothing again"
    assert {**again, "meta": 0} == {**results, "meta": 0}


def test_more_examples_leave_what_is_measured(
    build_engine: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "EXAMPLES_AT_ONCE", 2)
    few = replace(SETTINGS, labels=("base", "oracle", "spectr"))
    more = replace(few, num_examples=5)
    Evaluation(build_engine(), few).run()
    lengths = []
    read = evaluate.read
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read", lambda *a, **k: lengths.append(len(a[2])) or read(*a, **k))
        in_parts = Evaluation(build_engine(), more).run()
    assert lengths == [2, 1] * 2 * 3  # of two domains and three rows; not the first two texts
    monkeypatch.setattr(evaluate, "EXAMPLES_AT_ONCE", 5)
    whole = Evaluation(build_engine(), more).run()
    assert in_parts["scores"] == whole["scores"]
    for name, groups in whole["accuracy"]["spectr"].items():
        for group, row in groups.items():
            for key, value in row.items():
                assert in_parts["accuracy"]["spectr"][name][group][key] == pytest.approx(value)


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


def test_experts_without_tasks_are_refused(routed_model: SpectrModel) -> None:
    with pytest.raises(ValueError, match=r"red, green, blue.*NAME=SOURCE"):
        Evaluation(routed_model, SETTINGS)


def test_an_unknown_row_is_refused(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, labels=("base", "spektr"))
    with pytest.raises(ValueError, match=r"unknown row 'spektr'.*Did you mean 'spectr'"):
        Evaluation(build_engine(), settings)


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="num_examples is 0; at least 2"):
        Settings(num_examples=0)


def test_quick_takes_known_labels() -> None:
    assert set(QUICK) <= {contender.label for contender in CONTENDERS}


def test_scores_are_divided_by_the_oracles_of_each_domain() -> None:
    answers = {
        "oracle": {"a": [1.0] * 10, "b": [0.5] * 10, "c": [0.0] * 10},
        "other": {"a": [0.5] * 10, "b": [0.5] * 10, "c": [0.0] * 10},
    }
    summary = summarise(answers)
    assert summary["other"]["macro"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert summary["other"]["of_oracle"]["mean"] == 0.75
    assert summary["oracle"]["of_oracle"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_an_interval_holds_its_mean_and_narrows_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for num in (10, 100):
        scores = rng.integers(0, 2, num).astype(float).tolist()
        interval = summarise({"x": {"a": scores}})["x"]["macro"]
        assert interval["low"] <= interval["mean"] <= interval["high"]
        widths.append(interval["high"] - interval["low"])
    assert widths[1] < widths[0] / 2


def test_pairs_are_of_two_domains_and_use_other_examples_than_the_single_requests() -> None:
    held = {name: [object() for _ in range(100)] for name in "abc"}
    pairs = make_pairs(held, 12)  # type: ignore[arg-type]
    assert all(pair.names[0] != pair.names[1] for pair in pairs)
    assert {pair.names[0] for pair in pairs} == {pair.names[1] for pair in pairs} == set("abc")
    used = {id(example) for pair in pairs for example in pair.examples}
    assert len(used) == 24
    assert not used & {id(example) for row in held.values() for example in row[:32]}


def test_a_table_has_one_row_for_each_router(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, labels=("base", "oracle"))
    table = scores_table(Evaluation(build_engine(), settings).run())
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 4
