"""What the browser keeps and hands back, without a browser."""

import base64
import json
from typing import Any

import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import parse_router
from spectr_demo.ui import history
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import Frame
from spectr_demo.ui.runner import Runner, Session
from spectr_demo.ui.saved import SavedRun
from tests.ui.conftest import FRANCE, form_of
from tests.ui.test_page import choices, runner_of


@pytest.fixture
def runner(routed_model: SpectrModel) -> Runner:
    return runner_of(ui.build(routed_model))


def kept(runner: Runner, **changes: Any) -> dict[str, Any]:
    """A run, as the browser is told to keep it."""
    *_, last = runner.run(None, **choices(**changes))
    told: dict[str, Any] = json.loads(last[runner.layout.history.kept])
    return told


def test_a_run_is_kept_and_comes_back(runner: Runner) -> None:
    at = runner.layout
    *_, last = runner.run(None, **choices(prompt="paint <it>", seed=3, columns=["spectr", "lag"]))
    told = json.loads(last[at.history.kept])
    assert told["title"] == "paint <it>"
    assert told["columns"] == 2
    assert "prompt=paint+%3Cit%3E" in told["query"]
    assert "seed=3" in told["query"]
    before = Session()
    asked = json.dumps({"query": told["query"], "column": "lag", "file": told["file"]})
    shown = runner.restore(before, asked)
    assert before.stop.is_set() and before.is_left.is_set()
    assert shown[at.form["prompt"]] == "paint <it>"
    assert shown[at.form["seed"]] == 3
    assert shown[at.form["columns"]] == ["spectr", "lag"]
    assert shown[at.answers] == last[at.answers]
    assert shown[at.column]["value"] == "lag"
    assert 'data-column="lag"' in shown[at.routing]
    session = shown[runner.session]
    assert session.prompt == "paint <it>"
    assert session.trace.labels == ("spectr", "lag")


def test_an_address_fills_the_form(runner: Runner) -> None:
    at = runner.layout
    query = (
        "prompt=hello%20%3Cb%3E&columns=base,lag,nonsense&expert=grey&weighting=x&seed=7&token=3"
    )
    shown = runner.restore(None, json.dumps({"query": query, "file": None}))
    assert shown[at.form["prompt"]] == "hello <b>"
    assert shown[at.form["columns"]] == ["base", "lag"]
    assert shown[at.form["expert"]] == at.opening["expert"]
    assert shown[at.form["weighting"]] == ""
    assert shown[at.form["seed"]] == 7
    assert "hello &lt;b&gt;" in shown[at.about]
    assert at.answers not in shown, "nothing runs because somebody opened a link"


def test_an_address_without_a_prompt_says_nothing(runner: Runner) -> None:
    shown = runner.restore(None, json.dumps({"query": "", "file": None}))
    assert shown[runner.layout.form["prompt"]] == ""
    assert runner.layout.about not in shown


def test_the_address_of_an_example_shows_its_recording(
    routed_model: SpectrModel, recording: Recording
) -> None:
    runner = runner_of(ui.build(routed_model))
    at = runner.layout
    for query in ("prompt=" + FRANCE.prompt.replace(" ", "+"), ""):
        asked = json.dumps({"query": query, "column": "base", "file": None})
        shown = runner.restore(None, asked)
        assert shown[at.form["prompt"]] == FRANCE.prompt
        assert "Recorded" in shown[at.about]
        assert 'data-column="base"' in shown[at.routing]
    changed = json.dumps({"query": f"prompt={FRANCE.prompt}&seed=3", "file": None})
    assert "Recorded" not in runner.restore(None, changed)[at.about]


@pytest.mark.parametrize("file", ["no base64", base64.b64encode(b"no run").decode()])
def test_what_is_no_run_is_a_message(runner: Runner, file: str) -> None:
    shown = runner.restore(None, json.dumps({"query": "", "file": file}))
    assert "cannot be read" in shown[runner.layout.notice]["value"]
    assert shown[runner.layout.run]["interactive"]


def test_a_kept_form_that_cannot_be_run_is_a_message(runner: Runner) -> None:
    form = form_of(prompt="hi", seed=-1)
    *_, step = runner.model.stream("hi", ["base", "spectr"], record=True)
    routers = tuple(parse_router(each, runner.model.library.names) for each in ("base", "spectr"))
    frame = Frame(columns=step.columns, routers=routers, status="finished", trace=step.trace)
    data = SavedRun(form=form, frame=frame).to_bytes()
    asked = json.dumps({"query": "", "file": base64.b64encode(data).decode()})
    shown = runner.restore(None, asked)
    assert "seed is -1" in shown[runner.layout.notice]["value"]


def test_two_runs_are_compared_word_by_word(runner: Runner) -> None:
    first = kept(runner, prompt="paint it red", columns=["base", "spectr"])
    second = kept(runner, prompt="paint it blue", columns=["base", "uniform"])
    told = history.comparison(json.dumps([first["file"], second["file"]]))
    assert "paint it <del>red</del>" in told
    assert "paint it <ins>blue</ins>" in told
    assert told.count("has no such column") == 2
    assert "of 3 answer alike" in told
    same = history.comparison(json.dumps([first["file"], first["file"]]))
    assert "2 columns of 2 answer alike" in same
    assert "<del>" not in same


def test_a_run_that_was_stopped_before_its_first_token_is_not_kept(runner: Runner) -> None:
    updates = runner.run(None, **choices())
    session = next(updates)[runner.session]
    session.stop.set()
    *_, last = updates
    assert runner.layout.history.kept not in last or last[runner.layout.history.kept]


def test_a_long_title_is_cut(runner: Runner) -> None:
    assert len(kept(runner, prompt="word " * 60)["title"]) == 80


def test_a_run_that_is_too_large_keeps_its_address(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_BYTES", 100)
    assert kept(runner, prompt="hi there") == {
        "query": "prompt=hi+there&columns=base%2Cspectr&expert=red&max_new_tokens=8"
    }
