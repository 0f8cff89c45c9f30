"""The tabs beside the comparison in a real browser: drawn when opened, by keyboard, on a phone."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.config import ASSETS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.recorded import Recording
from tests.conftest import BuildModel, SaveExpert
from tests.ui.conftest import PATIENCE, SECONDS, Open
from tests.ui.test_browser import Endless

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect
pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE)

Serve = Callable[[gr.Blocks], str]
INK = {"light": "rgb(31, 35, 40)", "dark": "rgb(230, 232, 235)"}


@pytest.fixture
def known(
    build_model: BuildModel, expert_folders: list[str], save_expert: SaveExpert, tmp_path: Path
) -> SpectrModel:
    """Experts of which one has the shipped record of `cron`, and one is another's twin."""
    cron = save_expert("cron", seed=5)
    for name in ("scores.json", "README.md"):
        shutil.copy(ASSETS / "experts" / "cron" / name, cron)
    return build_model([cron, *expert_folders, save_expert("twin", seed=0)])


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def is_drawn(page: Any, where: str) -> None:
    expect(page.locator(f"{where} .main-svg").first).to_be_visible()


def width(page: Any) -> int:
    found: int = page.evaluate("document.documentElement.scrollWidth")
    return found


def test_all_tabs(known: SpectrModel, recording: Recording, serve: Serve, open_page: Open) -> None:
    page = open_page(serve(ui.build(known)), viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))

    # Nothing of a tab is there before it is opened; Plotly is not even fetched.
    loaded = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert not any("Plotly" in url for url in loaded)
    expect(page.locator(".plotly-chart")).to_have_count(0)

    # By keyboard: arrows and Enter open a tab.
    page.get_by_role("tab", name="Compare").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab", name="Experts")).to_have_attribute("aria-selected", "true")
    is_drawn(page, "#expert-scores")
    assert any("Plotly" in url for url in asked)
    experts(page)
    evidence(page)
    how(page)
    everywhere(page)


def experts(page: Any) -> None:
    facts = page.locator("#expert-facts")
    expect(facts).to_contain_text("apache-2.0")
    expect(page.locator("#expert-scores h3")).to_contain_text("It beats")
    for chart in ("nearest", "layers", "spectrum"):
        is_drawn(page, f"#expert-{chart}")

    # A part of a name finds an expert.
    field = page.locator("#expert-shown input")
    field.click()
    field.fill("twi")
    page.keyboard.press("Enter")
    expect(page.locator("#expert-nearest h3")).to_contain_text("twin and red cannot be told apart")
    expect(facts).not_to_contain_text("apache-2.0")
    expect(page.locator("#expert-scores")).to_be_hidden()

    table = page.locator("#expert-layers .twin")
    expect(table.locator("table")).to_be_hidden()
    table.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(table.locator("table")).to_be_visible()


def evidence(page: Any) -> None:
    open_tab(page, "Evidence")
    for chart in ("right", "finds", "chat", "cost", "confusion"):
        is_drawn(page, f"#evidence-{chart}")
    title = page.locator("#evidence-right h3")
    before = title.inner_text()
    field = page.locator("#evidence-domain input")
    field.click()
    field.fill("SQL")
    page.keyboard.press("Enter")
    expect(title).to_contain_text("in sql")
    assert title.inner_text() != before
    expect(page.locator(".routers tbody tr")).to_have_count(10)

    page.locator("#trial-run").click()
    expect(page.locator(".trial.is-finished")).to_have_count(1)
    expect(page.locator(".trial tbody tr")).to_have_count(1)
    expect(page.locator(".trial .tallies li")).to_have_count(3)
    expect(page.locator("#trial-run")).to_be_enabled()


def how(page: Any) -> None:
    open_tab(page, "How it works")
    for chart in ("z", "scores", "mix", "output", "votes"):
        is_drawn(page, f"#how-{chart}")
    step = page.locator("#how-x h3")
    expect(step).to_contain_text("q_proj of layer 1")
    before = step.inner_text()
    page.locator("#how-prompt textarea").fill("Something else")
    page.keyboard.press("Enter")
    expect(step).to_contain_text("“e”")
    assert step.inner_text() != before
    field = page.locator("#how-projection input")
    field.click()
    field.fill("down")
    page.keyboard.press("Enter")
    expect(step).to_contain_text("down_proj of layer 1 as 128 numbers")
    page.locator("#how-prompt textarea").fill("")
    page.locator("#how-run").click()
    expect(page.locator("#how-notice .notice")).to_contain_text("the prompt is empty")
    expect(page.locator("#how-steps")).to_be_visible()


def everywhere(page: Any) -> None:
    """Each tab in both themes, and on a phone."""
    for name, chart in (("Experts", "layers"), ("Evidence", "right"), ("How it works", "votes")):
        open_tab(page, name)
        text = f"#{ {'Experts': 'expert', 'Evidence': 'evidence'}.get(name, 'how') }-{chart}"
        is_drawn(page, text)
        seen = {}
        for theme in ("light", "dark"):
            page.evaluate(f"document.body.classList.toggle('dark', {json.dumps(theme == 'dark')})")
            seen[theme] = page.evaluate(
                "s => getComputedStyle(document.querySelector(s + ' .xtick text')).fill", text
            )
        assert seen == INK, name
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_function(
            "s => document.querySelector(s + ' .main-svg').clientWidth < 390", arg=text
        )
        assert width(page) <= 390, name
        page.set_viewport_size({"width": 1280, "height": 900})


def test_an_evaluation_can_be_cancelled_and_left(
    known: SpectrModel, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(known, gpu=endless.gpu)))
    open_tab(page, "Evidence")
    expect(page.locator("#trial-cancel")).to_be_disabled()
    page.locator("#trial-run").click()
    expect(page.locator(".trial.is-running td").first).to_contain_text("word word")
    page.locator("#trial-cancel").click()
    expect(page.locator(".trial.is-stopped .state")).to_contain_text("stopped after 0 of 1")
    assert endless.was_closed.wait(PATIENCE / SECONDS)
    expect(page.locator("#trial-run")).to_be_enabled()

    endless.was_closed = threading.Event()
    page.locator("#trial-run").click()
    expect(page.locator(".trial.is-running td").first).to_contain_text("word word")
    page.close()
    assert endless.was_closed.wait(PATIENCE / SECONDS)
