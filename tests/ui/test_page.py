"""The page as a program sees it: its endpoint, its queue, and the entry point."""

import html
import re
from collections.abc import Callable
from typing import Any

import gradio as gr
import pytest

import app
import spectr_demo
from spectr_demo import charts, ui
from spectr_demo.config import DEFAULT_ROUTER, PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.ui import recorded, run
from spectr_demo.ui import runner as running
from spectr_demo.ui.line import PLACES
from spectr_demo.ui.page import MODEL_QUEUE
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.runner import Runner, Session
from tests.ui.conftest import FRANCE

Serve = Callable[[gr.Blocks], str]


def test_everything_that_uses_the_model_shares_one_place(routed_model: SpectrModel) -> None:
    page = ui.build(routed_model)
    names = ("run", "run_1", "again", "compare", "route")  # Run and Enter; an example; what if
    using = [fn for fn in page.fns.values() if fn.api_name in names]
    assert len(using) == len(names)
    queued = {(fn.concurrency_id, fn.concurrency_limit) for fn in using}
    assert queued == {(MODEL_QUEUE["concurrency_id"], MODEL_QUEUE["concurrency_limit"])}
    # So those who find no place in the line are told so, and others are not in their way.
    assert PLACES < MODEL_QUEUE["concurrency_limit"] < ui.launch_options()["max_threads"]
    assert not page.api_open  # a call there would not wait
    assert not page.analytics_enabled


def test_the_gpu_is_asked_for_once_a_run(routed_model: SpectrModel) -> None:
    asked = []

    def gpu(duration: Callable[..., float]) -> Callable[[Any], Any]:
        def decorate(steps: Any) -> Any:
            def lent(*args: Any) -> Any:
                asked.append(duration(*args))
                yield from steps(*args)

            return lent

        return decorate

    client_page = ui.build(routed_model, gpu=gpu)
    compare = next(fn for fn in client_page.fns.values() if fn.name == "compare").fn
    list(compare("hello", ["base", "spectr"], max_new_tokens=20))
    assert asked == [12.0]


def runner_of(page: gr.Blocks) -> Runner:
    handler = next(fn.fn for fn in page.fns.values() if fn.name == "run")
    return handler.__self__  # type: ignore[no-any-return, union-attr]


def choices(**changes: Any) -> dict[str, Any]:
    form = {
        "prompt": "hello",
        "columns": ["base", "spectr"],
        "expert": "red",
        "top_k": 0,
        "weighting": "",
        "composition": "",
        "router_temperature": 0,
        "temperature": 0.0,
        "max_new_tokens": 8,
        "seed": 0,
    }
    return form | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x" * 600}, "the context of tiny is 512"),
        ({"top_k": 7}, "only 3 experts"),
        ({"columns": []}, "2 to 6"),
        ({"seed": None}, "seed: no number is given"),
    ],
)
def test_an_error_changes_nothing_but_the_message(
    routed_model: SpectrModel, changes: dict[str, Any], message: str
) -> None:
    runner = runner_of(ui.build(routed_model))
    updates = list(runner.run(None, **choices(**changes)))
    at = runner.layout
    assert message in updates[-1][at.notice]["value"]
    assert set(updates[-1]) == {at.notice, at.run, at.stop}
    assert updates[-1][at.run]["interactive"]
    changed = {part for update in updates for part in update}
    assert not changed & {at.charts, at.column, at.routing, *at.form.values()}


def test_the_page_opens_on_the_defaults(routed_model: SpectrModel) -> None:
    runner = runner_of(ui.build(routed_model))
    at = runner.layout
    assert at.form["columns"].value == list(PAGE_COLUMNS)
    assert at.form["expert"].value == ""  # the one that fits
    assert at.form["max_new_tokens"].value == recorded.SETTINGS.max_new_tokens
    assert "is-ghost" in at.answers.value  # no recording is of this model
    assert not at.charts.visible


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["uniform", DEFAULT_ROUTER, "spectr", "base"], DEFAULT_ROUTER),
        (["base", "spectr", "uniform"], "spectr"),
        (["uniform", "lag", "spectr", "base"], "spectr"),
        (["uniform", "base"], "uniform"),
    ],
)
def test_charts_open_on_the_column_that_chooses(
    routed_model: SpectrModel, columns: list[str], chosen: str
) -> None:
    runner = runner_of(ui.build(routed_model))
    last = list(runner.run(None, **choices(columns=columns)))[-1]
    assert last[runner.layout.column]["value"] == chosen


def handler(page: gr.Blocks, name: str) -> Any:
    return next(fn.fn for fn in page.fns.values() if fn.name == name)


def test_the_page_opens_on_a_recorded_run(
    routed_model: SpectrModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was asked")

    for method in ("stream", "lanes", "lanes_of", "encode"):
        monkeypatch.setattr(routed_model, method, no_model)
    page = ui.build(routed_model)
    at = runner_of(page).layout
    assert at.form["prompt"].value == FRANCE.prompt
    assert "answered five ways" in at.about.value
    assert "Recorded" in at.about.value
    for fact in ("1 December 2026", "tiny", "float32", "greedy", "commit abc1234"):
        assert fact in at.about.value
    for column in recording.frame.columns:
        assert html.escape(column.text) in re.sub(r"</?(mark|i)\b[^>]*>", "", at.answers.value)
    assert at.answers.value.count('<details class="grade') == len(PAGE_COLUMNS)

    # So is its routing.
    assert at.charts.visible
    assert at.column.value == DEFAULT_ROUTER
    assert at.routing.value == charts.routing_view(recording.trace, DEFAULT_ROUTER).html
    redraw = handler(page, "redraw")
    base = redraw(None, "base")
    assert 'data-column="base"' in base[at.routing]
    session = base[runner_of(page).session]
    assert (session.trace, session.label) == (recording.trace, "base")

    # A click on an example shows its run, and leaves the form as it is.
    shown = handler(page, "replay")(session, [FRANCE.prompt])
    assert shown[at.form["prompt"]] == FRANCE.prompt
    assert shown[at.answers] == at.answers.value
    assert shown[at.about] == at.about.value
    assert shown[at.routing] == base[at.routing], "the column stays the one that was chosen"
    assert session.stop.is_set()


def test_routing_is_drawn_while_the_answers_are_written(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(page := ui.build(routed_model))
    at = runner.layout
    monkeypatch.setattr(run, "FRAME_SECONDS", 0.0)  # each step is a frame
    monkeypatch.setattr(running, "REST", 0)
    drawn: list[str] = []
    session = None
    for update in runner.run(None, **choices(max_new_tokens=40)):
        session = update.get(runner.session, session)
        if at.routing not in update:
            continue
        drawn.append(update[at.routing])
        if len(drawn) == 1:
            assert update[at.column]["value"] == "spectr"
            assert handler(page, "redraw")(session, "base")[runner.session] is session
    assert len(drawn) > 2
    columns = [re.search('data-column="(.*?)"', each)[1] for each in drawn]  # type: ignore[index]
    assert columns == ["spectr"] + ["base"] * (len(drawn) - 1)
    tokens = [each.count("<tr data-t") for each in drawn]
    assert tokens == sorted(set(tokens))
    assert "measured at the end" in drawn[0]
    assert "measured at the end" not in drawn[-1]


def test_drawing_rests_in_proportion_to_what_it_took(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FRAME_SECONDS", 0.0)
    monkeypatch.setattr(running, "REST", 1e6)
    runner = runner_of(ui.build(routed_model))
    updates = list(runner.run(None, **choices(max_new_tokens=64)))
    drawn = [update for update in updates if runner.layout.routing in update]
    assert len(drawn) == 2  # the first and the last


def test_a_run_that_was_left_shows_nothing_more(
    routed_model: SpectrModel, recording: Recording
) -> None:
    page = ui.build(routed_model)
    runner = runner_of(page)
    updates = runner.run(None, **choices(max_new_tokens=64))
    session = next(updates)[runner.session]
    assert runner.layout.answers in next(updates)
    handler(page, "replay")(session, [FRANCE.prompt])
    assert [set(update) for update in updates] == [{runner.session}]


def test_a_live_run_of_an_example_is_graded_and_not_marked_as_recorded(
    routed_model: SpectrModel, recording: Recording
) -> None:
    runner = runner_of(ui.build(routed_model))
    at = runner.layout
    last = list(runner.run(None, **choices(prompt=FRANCE.prompt)))[-1]
    assert last[at.answers].count('<details class="grade') == 2
    assert "Recorded" not in last[at.about]


def test_a_column_too_many_is_refused_when_it_is_ticked(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(gr, "Warning", told.append)
    at_most = handler(ui.build(routed_model), "at_most")
    keys = list(ROUTERS)
    assert at_most(keys[:7]) == keys[:6]
    assert "Up to 6 columns" in told[0]
    assert at_most(keys[:6]) not in (keys[:6], [])
    assert len(told) == 1


def test_a_broken_model_is_a_message_too(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(routed_model, "stream", broken)
    runner = runner_of(ui.build(routed_model))
    last = list(runner.run(None, **choices()))[-1]
    assert "RuntimeError: out of &lt;memory&gt;" in last[runner.layout.notice]["value"]
    assert last[runner.layout.run]["interactive"]


def test_two_visitors_share_nothing(routed_model: SpectrModel) -> None:
    runner = runner_of(ui.build(routed_model))
    mine = runner.run(None, **choices(prompt="mine"))
    yours = runner.run(None, **choices(prompt="yours"))
    my_session, your_session = next(mine)[runner.session], next(yours)[runner.session]
    my_session.stop.set()
    assert not your_session.stop.is_set()
    last = list(mine)[-1], list(yours)[-1]
    assert "■ stopped" in last[0][runner.layout.answers]
    assert "■ stopped" not in last[1][runner.layout.answers]
    kept: Session = last[1][runner.session]
    assert kept.prompt == "yours"
    assert "yours" in kept.trace.column("spectr").text
    # The stopped run had no trace yet: its visitor's session is not touched again.
    assert runner.session not in last[0]


def test_the_entry_point_builds_the_page(
    expert_folders: list[str], routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def load(base: str | None, experts: list[str] | None) -> SpectrModel:
        asked.update(base=base, experts=experts)
        return routed_model

    monkeypatch.setattr(spectr_demo, "load", load)
    assert isinstance(app.build(["--base", "b", "--experts", "x", "y=z"]), gr.Blocks)
    assert asked == {"base": "b", "experts": ["x", "y=z"]}
    app.build([])
    assert asked == {"base": None, "experts": None}


def test_the_entry_point_says_what_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(base: str | None, experts: list[str] | None) -> SpectrModel:
        raise ValueError("expert 'x': there is no folder x")

    monkeypatch.setattr(spectr_demo, "load", load)
    with pytest.raises(SystemExit, match="there is no folder x"):
        app.build([])
