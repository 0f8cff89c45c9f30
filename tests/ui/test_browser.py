"""The page in a real browser. Every wait is for a condition."""

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step

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
    expect(page.locator(".answer.is-ghost")).to_have_count(4)
    expect(page.locator("#charts")).to_be_hidden()

    page.locator("#examples button").first.click()
    expect(page.locator("#prompt textarea")).not_to_have_value("")
    expect(page.locator(".answer.is-finished")).to_have_count(4)
    charts_are_drawn(page)
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#column").get_by_label("SpectR in context")).to_be_checked()

    strip = page.locator("#strip")
    expect(page.locator(".answer .whom")).to_have_text("No expert stands out; the base answers")
    expect(strip).to_contain_text("base model only")
    page.locator("#column").get_by_label("Single expert: red").check()
    expect(strip).not_to_contain_text("base model only")
    expect(strip).to_contain_text("red")

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
    expect(page.locator(".answer.is-stopped")).to_have_count(4)
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    assert len(first.inner_text()) > len(short)
    charts_are_drawn(page)  # from the trace so far
    expect(page.locator("#stop")).to_be_disabled()

    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(4)
    page.locator("#stop").click()
    expect(page.locator(".answer.is-stopped")).to_have_count(4)


def test_leaving_the_page_ends_its_run(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(routed_model, gpu=endless.gpu)))
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-running")).to_have_count(4)
    page.close()
    assert endless.was_closed.wait(PATIENCE / SECONDS)


def test_an_error_is_told_and_nothing_is_lost(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), viewport={"width": 390, "height": 844})
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-finished")).to_have_count(4)
    charts_are_drawn(page)

    page.locator("#prompt textarea").fill("")
    page.locator("#run").click()
    expect(page.get_by_role("alert")).to_contain_text("the prompt is empty")
    expect(page.locator(".answer.is-finished")).to_have_count(4)
    charts_are_drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    page.locator("#prompt textarea").fill("hello again")
    page.locator("#run").click()
    expect(page.locator(".caption")).to_contain_text("hello again")
    expect(page.get_by_role("alert")).to_have_count(0)
