"""A page that is being served, and a Chromium to look at it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui import recorded
from spectr_demo.ui.examples import EXAMPLES
from spectr_demo.ui.recorded import Recording
from spectr_demo.ui.run import Form


@pytest.fixture
def serve() -> Iterator[Callable[[gr.Blocks], str]]:
    """A function that serves a page on a free port of this machine, and returns its address."""
    served: list[gr.Blocks] = []

    def launch(page: gr.Blocks) -> str:
        _, url, _ = page.launch(
            **ui.launch_options(), server_name="127.0.0.1", prevent_thread_lock=True, quiet=True
        )
        served.append(page)
        return url

    yield launch
    for page in served:
        page.close()


# The one example that fits experts of any name.
FRANCE = next(e for e in EXAMPLES if not e.experts)


@pytest.fixture
def recording(
    routed_model: SpectrModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Recording:
    """That of the tiny model, in the place of the shipped ones."""
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    path = tmp_path / f"{FRANCE.key}.npz"
    recorded.record(FRANCE, routed_model, date="2026-12-01", commit="abc1234").save(path)
    return recorded.load(path)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium: `CHROMIUM`, else one on PATH."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        if os.environ.get("SPECTR_REQUIRE_BROWSER"):
            pytest.fail("no Chromium on PATH, and SPECTR_REQUIRE_BROWSER is set")
        pytest.skip("no Chromium on PATH; install one, or name it in CHROMIUM")
    return path


# A form as the page opens, without a prompt.
OPENING: dict[str, Any] = {
    "prompt": "",
    "columns": ["base", "spectr"],
    "expert": "",
    "top_k": 0,
    "weighting": "",
    "composition": "",
    "router_temperature": 0,
    "temperature": 0,
    "max_new_tokens": 64,
    "seed": 0,
}


def form_of(**changes: Any) -> Form:
    """A form with some changes."""
    return Form(**OPENING | changes)


Open = Callable[..., Any]
SECONDS = 1000.0
PATIENCE = 90 * SECONDS  # two busy cores are slow, and a passing test does not wait


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """A Chromium, driven by playwright."""
    playwright_api = pytest.importorskip("playwright.sync_api")
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
        page.locator("#run").wait_for(state="visible")
        return page

    yield open_
    for context in browser.contexts:
        context.close()
    assert requests
    assert {urlsplit(url).hostname for url in requests if "//" in url} == {"127.0.0.1"}
    assert errors == []
