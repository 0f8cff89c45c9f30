"""The evaluation on a tiny model: complete, resumable, and its report is made of its numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from spectr_demo import __main__
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation import evaluate
from spectr_demo.evaluation.composition import SEGMENTS, SINGLE
from spectr_demo.evaluation.contenders import COMPOSED
from spectr_demo.evaluation.evaluate import CONTENDERS, QUICK, Evaluation, Settings
from spectr_demo.evaluation.report import to_markdown
from tests.conftest import BuildModel
from tests.evaluation.conftest import SETTINGS


@pytest.mark.slow
def test_every_contender_is_measured_everywhere(build_engine: BuildModel) -> None:
    results = Evaluation(build_engine(), replace(SETTINGS, stress_texts=1)).run()
    json.dumps(results, allow_nan=False)
    labels = {contender.label for contender in CONTENDERS}
    assert results["scores"].keys() == results["likelihood"].keys() == labels
    constant = {"base", "oracle", "uniform (outputs)", "uniform (parameters)"}
    merges = {c.label for c in CONTENDERS if c.is_merge}
    routing = labels - constant - merges
    assert results["accuracy"].keys() == routing
    assert results["offdomain"].keys() == labels - {"oracle"} - merges
    assert results["offdomain"]["base"]["kl"] == pytest.approx(0, abs=1e-6)
    assert results["offdomain"]["base"]["agreement"] == 1.0
    assert results["offdomain"]["spectr"]["kl"] > 0
    rows = results["composition"]["rows"]
    assert rows.keys() == {*COMPOSED, SEGMENTS, SINGLE} and rows["TIES"]["routing"] is None
    assert rows["spectr"]["routing"]["answer"].keys() == {"first", "second"}
    assert results["likelihood"]["base"]["way"] == 0
    assert results["likelihood"]["oracle"]["way"] == 1
    assert set(results["meta"]["experts"]) == {"sql", "chords", "other"}
    figures = {claim["figure"] for claim in results["claims"]}
    assert {"likelihood", "decisions", "chat"} <= figures, "random experts score nothing"
    for claim in results["claims"]:
        if claim["figure"] == "chat":
            row = results["offdomain"][claim["more"]]
            assert (claim["of_more"], claim["num"]) == (pytest.approx(row["kl"], abs=1e-4), 2)

    report = to_markdown(results)
    assert "spectr-context" in report
    accuracy = results["stress"]["number"]["1000"]["mean"]["spectr"]["decisions"]
    assert f"{accuracy:.1%}" in report
    assert "| `spectr` takes the right expert in more decisions than `arrow` |" in report
    assert f"{results['likelihood']['spectr']['macro']:.3f}" in report


def test_tests_of_no_prompts_are_left_out(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, num_pairs=0, num_triples=5, num_offdomain=0, labels=QUICK)
    results = Evaluation(build_engine(), settings).run()
    assert results["offdomain"] == {}
    assert results["composition"] is None, "two tasks make no triples"
    report = to_markdown(results)
    assert "## Routing accuracy" in report
    assert "## Ordinary chat" not in report
    assert "## Messages" not in report


def test_messages_can_be_measured_alone(build_engine: BuildModel) -> None:
    settings = replace(SETTINGS, labels=("base", "spectr", "TIES", "oracle"))
    alone = Evaluation(build_engine(), settings).with_composition(None)
    labels = {"base", "spectr", "TIES", SEGMENTS, SINGLE}
    assert set(alone) == {"meta", "composition"}
    assert alone["composition"]["rows"].keys() == labels
    assert alone["composition"]["meta"]["settings"]["num_pairs"] == 2
    assert "| segment oracle |" in to_markdown(alone)
    whole = Evaluation(build_engine(), settings).run()
    assert whole["composition"]["rows"] == alone["composition"]["rows"]
    both = Evaluation(build_engine(), settings).with_composition({**whole, "composition": None})
    assert both["composition"]["rows"] == alone["composition"]["rows"]
    assert both["scores"] == whole["scores"]
    none = replace(settings, num_pairs=0)
    with pytest.raises(ValueError, match="num_pairs is 0 and num_triples 60"):
        Evaluation(build_engine(), none).with_composition(None)


def test_the_command_puts_messages_into_the_results_that_are_there(
    build_engine: BuildModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(__main__, "_load", lambda arguments: build_engine())
    output = tmp_path / "results.json"
    few = ["--num-pairs", "3", "--num-triples", "0", "--routers", "base", "spectr"]
    command = ["evaluate", "--output", str(output), "--num-examples", "2", *few]
    settings = replace(SETTINGS, num_pairs=0, labels=("base", "oracle"))
    before = Evaluation(build_engine(), settings).run()
    output.write_text(json.dumps(before))
    assert __main__.main([*command, "--only", "composition"]) == 0
    after = json.loads(output.read_text())
    assert after["composition"]["num"] == {"two": 3, "three": 0}
    assert {**after, "composition": None} == json.loads(json.dumps(before))
    assert "3 messages with two held-out requests" in output.with_suffix(".md").read_text()


def test_an_interrupted_evaluation_goes_on(
    build_engine: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, labels=("base", "oracle", "spectr", "arrow"))
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
    figures = [claim["figure"] for claim in again["claims"]]
    assert figures == ["likelihood", "decisions"], "the parts hold what the tests need"


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
