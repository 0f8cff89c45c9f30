"""The page in a real browser. Every wait is for a condition."""

import threading
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine import batch
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import FRAME_SECONDS
from tests.ui.conftest import FRANCE, PATIENCE, SECONDS, Open

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect

pytestmark = pytest.mark.browser

Serve = Callable[[gr.Blocks], str]
expect.set_options(timeout=PATIENCE)


def routing_is_drawn(page: Any) -> None:
    expect(page.locator("#routing .rv-kl")).not_to_have_count(0)
    expect(page.locator("#routing .rv-ribbon").first).to_be_visible()


class Endless:
    """Wraps the model's steps: a run that goes on, one step for each time it is let."""

    def __init__(self) -> None:
        self.was_closed = threading.Event()
        self.pace = threading.Event()  # never set: waiting for it is the time a token takes

    def gpu(self, duration: Any) -> Callable[[Any], Any]:
        return lambda steps: lambda *args: self._steps(steps, *args)

    def _steps(self, steps: Any, *args: Any) -> Generator[Step, None, None]:
        *_, last = steps(*args)
        num_tokens = 0
        try:
            while True:
                num_tokens += 1
                columns = tuple(
                    ColumnOutput(
                        label=column.label,
                        text="word " * num_tokens,
                        num_settled=0,
                        num_tokens=num_tokens,
                        is_finished=False,
                        tokens_per_second=20.0,
                    )
                    for column in last.columns
                )
                yield Step(columns=columns, trace=last.trace if num_tokens == 1 else None)
                self.pace.wait(0.05)
        finally:
            self.was_closed.set()


class Growing:
    """Wraps the model's steps: a run that waits after its first trace until it may go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def gpu(self, duration: Any) -> Callable[[Any], Any]:
        return lambda steps: lambda *args: self._steps(steps, *args)

    def _steps(self, steps: Any, *args: Any) -> Generator[Any, None, None]:
        for step in steps(*args):
            is_part = isinstance(step, Step) and step.trace is not None and not step.is_last
            if is_part:
                self.go_on.wait(2 * FRAME_SECONDS)  # so that this step is shown
            yield step
            if is_part:
                self.go_on.wait(PATIENCE / SECONDS)


def test_an_example_runs_and_its_routing_follows_the_column(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    expect(page.locator(".answer.is-ghost")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator("#charts")).to_be_hidden()

    page.locator("#examples button").first.click()
    expect(page.locator("#prompt textarea")).not_to_have_value("")
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    routing_is_drawn(page)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#column").get_by_label("SpectR in context")).to_be_checked()

    routing = page.locator("#routing")
    expect(page.locator(".answer .whom")).to_have_text("No expert stands out; the base answers")
    expect(routing).to_contain_text("left the answer to the base")
    single = page.locator("#column").get_by_label("Single expert")
    expect(single).not_to_be_checked()
    single.check()
    expect(routing).to_contain_text("served every token")
    name = page.locator(".answer h3").nth(1).inner_text().removeprefix("Single expert: ")
    expect(routing.locator("h3")).to_contain_text(name)

    with page.expect_download() as trace_file:
        page.locator("#get-trace").click()
    assert trace_file.value.suggested_filename == "routing-trace.npz"
    with page.expect_download() as views_file:
        page.locator("#get-views").click()
    assert views_file.value.suggested_filename == "routing.html"


def test_stop_keeps_the_answers_and_the_page_works_on(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(routed_model, gpu=endless.gpu)))
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator("#run")).to_be_disabled()
    for column in page.locator(".answer .text").all():
        expect(column).to_contain_text("word word word")
    first = page.locator(".answer .text").first
    short = first.inner_text()
    page.wait_for_function(
        "n => document.querySelector('.answer .text').innerText.length > n", arg=len(short) + 10
    )

    page.locator("#stop").click()
    expect(page.locator(".answer.is-stopped")).to_have_count(len(PAGE_COLUMNS))
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    assert len(first.inner_text()) > len(short)
    routing_is_drawn(page)  # from the trace so far
    expect(page.locator("#stop")).to_be_disabled()

    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    page.locator("#stop").click()
    expect(page.locator(".answer.is-stopped")).to_have_count(len(PAGE_COLUMNS))


def test_leaving_the_page_ends_its_run(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(routed_model, gpu=endless.gpu)))
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    page.close()
    assert endless.was_closed.wait(PATIENCE / SECONDS)


def test_the_page_opens_on_a_recorded_run_and_replays_it(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    expect(page.locator("#prompt textarea")).to_have_value(FRANCE.prompt)
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator(".about .recorded")).to_contain_text("Recorded on 1 December 2026")
    routing_is_drawn(page)
    expect(page.locator("#column").get_by_label("SpectR in context")).to_be_checked()

    reference = page.locator(".answer .grade ol").last
    expect(reference).to_be_hidden()
    page.locator(".answer .grade summary").last.focus()
    page.keyboard.press("Enter")
    expect(reference).to_be_visible()
    expect(reference).to_contain_text("Paris")
    tip = page.get_by_role("tooltip", include_hidden=True).first
    expect(tip).to_be_hidden()
    page.locator("button.chip").first.focus()
    expect(tip).to_be_visible()

    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".recorded")).to_have_count(0)
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator(".grade")).to_have_count(0)
    expect(page.locator("#run")).to_be_enabled()

    page.locator("#examples button").first.click()
    expect(page.locator("#prompt textarea")).to_have_value(FRANCE.prompt)
    expect(page.locator(".recorded")).to_have_count(1)
    expect(page.locator(".caption")).to_contain_text(FRANCE.prompt)


def test_a_recording_ends_the_run_that_goes_on(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(routed_model, gpu=endless.gpu)))
    routing_is_drawn(page)
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    page.locator("#examples button").first.click()
    expect(page.locator(".recorded")).to_have_count(1)
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))


def told(page: Any) -> Any:
    return page.locator("#routing .rv-told")


def readable(recording: Recording, label: str) -> list[int]:
    """The answer's tokens that a pointer can meet, by their number."""
    column = recording.trace.column(label)
    answer = column.tokens[column.num_prompt :]
    return [number for number, token in enumerate(answer) if token.isalnum() and number != 1]


def test_a_token_is_marked_in_the_card_the_view_and_the_list(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), viewport={"width": 1280, "height": 900})
    routing_is_drawn(page)
    expect(told(page)).to_contain_text("The whole answer")
    card = page.locator('.answer[data-column="spectr-context"] .text i')
    marked, mark = page.locator(".answer .is-marked"), page.locator("#routing .rv-mark:visible")
    first = recording.trace.column("spectr-context").num_prompt
    some, other = readable(recording, "spectr-context")[:2]

    card.nth(some).hover()
    expect(told(page)).to_contain_text(f"answer token {first + some}:")
    expect(marked).to_have_count(1)
    expect(mark).to_have_count(1)
    page.locator("#prompt textarea").hover()
    expect(told(page)).to_contain_text("The whole answer")
    expect(marked).to_have_count(0)
    expect(mark).to_have_count(0)

    plot = page.locator("#routing .rv-plot")
    plot.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    expect(told(page)).to_contain_text(f"answer token {first + 1}:")
    expect(told(page)).to_contain_text("Layer 1: ")
    page.keyboard.press("Enter")
    expect(told(page)).to_contain_text("Pinned")
    card.nth(other).hover()
    expect(told(page)).to_contain_text(f"answer token {first + 1}:")

    # A tap in another column's answer shows that column, with the token pinned.
    some = readable(recording, "spectr-paper")[0]
    page.locator('.answer[data-column="spectr-paper"] .text i').nth(some).click()
    expect(page.locator("#routing .rv")).to_have_attribute("data-column", "spectr-paper")
    expect(told(page)).to_contain_text(f"answer token {first + some}:")
    expect(marked).to_have_count(1)
    plot.focus()
    page.keyboard.press("Escape")
    expect(marked).to_have_count(0)
    page.keyboard.press("Home")
    expect(told(page)).to_contain_text(f"answer token {first}:")
    page.locator(".rv-prompt summary").click()
    plot.focus()
    page.keyboard.press("Home")
    expect(told(page)).to_contain_text("prompt token 0")

    page.locator("#routing .rv-map").first.hover(position={"x": 2, "y": 2})
    expect(told(page)).to_contain_text(f"answer token {first}:")
    expect(told(page)).to_contain_text("Layer 1: first ")


def test_the_view_follows_the_theme_and_the_width(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), color_scheme="light")
    routing_is_drawn(page)
    page.locator("#column").get_by_label("SpectR (paper)").check()
    expect(page.locator("#routing .rv")).to_have_attribute("data-column", "spectr-paper")
    ink, fill = (
        f"getComputedStyle(document.querySelector('{where}')).{what}"
        for where, what in (("#routing h3", "color"), ("#routing .rv-map path", "fill"))
    )
    light = page.evaluate(ink), page.evaluate(fill)
    page.evaluate("document.body.classList.toggle('dark')")  # as Gradio's settings do
    dark = page.evaluate(ink), page.evaluate(fill)
    assert light[0] != dark[0]
    assert light[1] != dark[1]

    page.locator(".rv-prompt summary").click()
    page.locator(".rv-table summary").click()
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.querySelector('#routing').offsetWidth < 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.locator("#routing .rv-table td").first).to_be_visible()


def test_what_is_marked_and_unfolded_stays_while_answers_are_written(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    growing = Growing()
    page = open_page(serve(ui.build(routed_model, gpu=growing.gpu)))
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    routing_is_drawn(page)  # before the end
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    page.locator(".rv-prompt summary").click()
    plot = page.locator("#routing .rv-plot")
    plot.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    text = told(page).locator(".rv-head").inner_text()
    page.evaluate("document.querySelector('#routing .rv').dataset.old = 'yes'")
    growing.go_on.set()
    expect(page.locator("#routing .rv[data-old]")).to_have_count(0)
    expect(told(page).locator(".rv-head")).to_have_text(text)
    expect(page.locator("#routing .rv.is-pinned")).to_have_count(1)
    expect(page.locator(".rv-prompt")).to_have_attribute("open", "")
    expect(plot).to_be_focused()
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator(".answer .is-marked")).to_have_count(1)


def test_a_wrong_setting_is_told_at_once(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    page.locator("#settings").get_by_role("button").first.click()
    columns = page.locator("#columns")
    for name in ("Arrow", "LAG", "Norm"):
        columns.get_by_label(name, exact=True).click()
    told = page.get_by_test_id("toast-text").first
    expect(told).to_contain_text("Up to 6 columns run side by side")
    expect(columns.locator("input:checked")).to_have_count(6)

    page.locator("#prompt textarea").fill("hello")
    page.locator("#seed input").fill("3.7")
    page.locator("#run").click()
    expect(page.locator(".notice")).to_contain_text("seed is 3.7; it must be a whole number")
    page.locator("#seed input").fill("")
    page.locator("#run").click()
    expect(page.locator(".notice")).to_contain_text("seed: no number is given")


def test_an_error_is_told_and_nothing_is_lost(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), viewport={"width": 390, "height": 844})
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    routing_is_drawn(page)

    page.locator("#prompt textarea").fill("")
    page.locator("#run").click()
    expect(page.locator(".notice")).to_contain_text("the prompt is empty")
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    routing_is_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.locator("#prompt textarea").fill("hello again")
    page.locator("#run").click()
    expect(page.locator(".caption")).to_contain_text("hello again")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_who_waits_sees_the_place_in_line_and_stop_leaves_it(
    routed_model: SpectrModel, serve: Serve, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_RUNS", 1)
    endless = Endless()
    url = serve(ui.build(routed_model, gpu=endless.gpu))
    first, second = open_page(url), open_page(url)
    for page in (first, second):
        page.locator("#prompt textarea").fill("hello")
    first.locator("#run").click()
    expect(first.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    second.locator("#run").click()
    expect(second.locator(".answer .state").first).to_have_text("number 2 in line")
    second.locator("#stop").click()
    expect(second.locator(".answer.is-stopped")).to_have_count(len(PAGE_COLUMNS))
    expect(second.locator("#run")).to_be_enabled()

    second.locator("#run").click()
    expect(second.locator(".answer .state").first).to_have_text("number 2 in line")
    first.close()
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    expect(second.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
