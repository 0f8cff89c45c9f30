"""The page in a real browser. Every wait is for a condition."""

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.ui.recorded import Recording
from tests.ui.conftest import FRANCE

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect

pytestmark = pytest.mark.browser

Serve = Callable[[gr.Blocks], str]
Open = Callable[..., Any]
SECONDS = 1000.0
PATIENCE = 90 * SECONDS  # two busy cores are slow, and a passing test does not wait
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """A function that opens an address; at the end, no other host may have been asked."""
    requests: list[str] = []
    errors: list[str] = []

    def open_(url: str, **context: Any) -> Any:
        page = browser.new_context(**context).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator("#run")).to_be_visible()
        return page

    yield open_
    for context in browser.contexts:
        context.close()
    assert requests
    assert {urlsplit(url).hostname for url in requests if "//" in url} == {"127.0.0.1"}
    assert errors == []


def charts_are_drawn(page: Any) -> None:
    for chart in ("strip", "map", "shares", "layers", "along"):
        svg = page.locator(f"#{chart} .js-plotly-plot svg").first
        expect(svg).to_be_visible()


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


def test_an_example_runs_and_its_charts_follow_the_column(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    expect(page.locator(".answer.is-ghost")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator("#charts")).to_be_hidden()

    page.locator("#examples button").first.click()
    expect(page.locator("#prompt textarea")).not_to_have_value("")
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    charts_are_drawn(page)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#column").get_by_label("SpectR in context")).to_be_checked()

    strip = page.locator("#strip")
    expect(page.locator(".answer .whom")).to_have_text("No expert stands out; the base answers")
    expect(strip).to_contain_text("base model only")
    single = page.locator("#column").get_by_label("Single expert")
    expect(single).not_to_be_checked()
    single.check()
    expect(strip).not_to_contain_text("base model only")
    name = page.locator(".answer h3").nth(1).inner_text().removeprefix("Single expert: ")
    expect(strip).to_contain_text(name)

    with page.expect_download() as trace_file:
        page.locator("#get-trace").click()
    assert trace_file.value.suggested_filename == "routing-trace.npz"
    with page.expect_download() as charts_file:
        page.locator("#get-charts").click()
    assert charts_file.value.suggested_filename == "routing-charts.html"


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
    charts_are_drawn(page)  # from the trace so far
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
    charts_are_drawn(page)
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
    charts_are_drawn(page)
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    page.locator("#examples button").first.click()
    expect(page.locator(".recorded")).to_have_count(1)
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))


def test_charts_follow_the_theme_and_the_width(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), color_scheme="light")
    charts_are_drawn(page)
    ink = "getComputedStyle(document.querySelector('#along .ytick text')).fill"
    light = page.evaluate(ink)
    page.evaluate("document.body.classList.toggle('dark')")  # as Gradio's settings do
    page.wait_for_function(f"light => {ink} !== light", arg=light)
    page.evaluate("document.body.classList.toggle('dark')")
    page.wait_for_function(f"light => {ink} === light", arg=light)

    strip = "document.querySelector('#strip .js-plotly-plot').offsetHeight"
    wide = page.evaluate(strip)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(f"wide => {strip} > wide", arg=wide)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


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
    charts_are_drawn(page)

    page.locator("#prompt textarea").fill("")
    page.locator("#run").click()
    expect(page.locator(".notice")).to_contain_text("the prompt is empty")
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    charts_are_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.locator("#prompt textarea").fill("hello again")
    page.locator("#run").click()
    expect(page.locator(".caption")).to_contain_text("hello again")
    expect(page.get_by_role("alert")).to_have_count(0)
