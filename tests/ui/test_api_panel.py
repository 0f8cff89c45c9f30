"""The panel that describes the endpoints, in a real browser."""

from collections.abc import Callable
from urllib.parse import urlsplit

import gradio as gr
import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect
pytestmark = pytest.mark.browser
PATIENCE = 90_000.0


def test_its_address_opens_it_and_its_python_runs(
    routed_model: SpectrModel,
    serve: Callable[[gr.Blocks], str],
    chromium: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = serve(ui.build(routed_model))
    hosts: set[str | None] = set()
    with playwright_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(f"{url}?view=api")
        panel = page.locator(".api-docs-wrap")
        expect(panel).to_contain_text("3 MCP Tools", timeout=PATIENCE)
        panel.get_by_text("Python", exact=True).click()
        expect(panel).to_contain_text("API name: /experts", timeout=PATIENCE)
        expect(panel).to_contain_text("It may hold several requests.")
        calls = [text for text in panel.locator("pre").all_inner_texts() if "Client(" in text]
        browser.close()
    assert hosts - {None} == {"127.0.0.1"}
    assert len(calls) == 3
    capsys.readouterr()
    for call in calls:
        exec(compile(call, "panel", "exec"), {})
    printed = capsys.readouterr().out
    for found in ("'label': 'spectr-context'", "'threshold': ", "'name': 'green'"):
        assert found in printed
