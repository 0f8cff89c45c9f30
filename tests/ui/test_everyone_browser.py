"""The page for everyone: axe-core's findings, phones, keyboard, and nothing that jumps."""

import json
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest

from spectr_demo import ui
from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.recorded import Recording
from tests.ui.conftest import Open
from tests.ui.test_browser import Serve, routing_is_drawn

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect

pytestmark = pytest.mark.browser

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
SHIFT = """() => new Promise((done) => {
  let total = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) total += entry.value;
  }).observe({ type: 'layout-shift', buffered: true });
  setTimeout(() => done(total), 500);
})"""


def serious(page: Any) -> list[str]:
    """What axe-core finds that is serious or critical, each with an element.

    What waits for an answer is pale, and grows dark in a moment. So the answer is waited for, and
    what was pale is dark at once.
    """
    page.add_style_tag(content="* { transition: none !important; }")
    expect(page.locator(".generating:visible, .pending:visible")).to_have_count(0)
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [
        f"{each['id']}: {json.dumps(each['nodes'][0]['target'])} {each['nodes'][0]['html'][:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_state(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open, scheme: Any
) -> None:
    page = open_page(serve(ui.build(routed_model)), color_scheme=scheme)
    routing_is_drawn(page)
    assert serious(page) == []

    for name in ("Columns and settings", "What if", "Earlier runs"):
        page.get_by_role("button", name=name).click()
    for fold in (".rv-table summary", ".rv-prompt summary", ".grade summary"):
        page.locator(fold).first.click()
    page.locator("#routing .rv-plot").focus()
    for key in ("ArrowRight", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#routing .rv.is-pinned")).to_have_count(1)
    assert serious(page) == []

    page.locator("#what-if-run").click()
    expect(page.locator("#what-if-answer .changed > h3")).to_be_visible()
    page.locator("#prompt textarea").fill("")
    page.locator("#run").click()
    expect(page.locator(".notice")).to_be_visible()
    assert serious(page) == []

    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator(".answer.is-finished")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator("#runs li")).to_have_count(1)
    assert serious(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_tabs(
    routed_model: SpectrModel, serve: Serve, open_page: Open, scheme: Any
) -> None:
    page = open_page(serve(ui.build(routed_model)), color_scheme=scheme)
    for tab in ("Experts", "Evidence", "How it works"):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(".main-svg:visible").first).to_be_visible()
        assert serious(page) == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps_while_the_page_opens(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open, width: int
) -> None:
    page = open_page(serve(ui.build(routed_model)), viewport={"width": width, "height": 850})
    routing_is_drawn(page)
    assert page.evaluate(SHIFT) < 0.1


def test_a_phone_has_the_prompt_first_and_swipes(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(
        serve(ui.build(routed_model)),
        viewport={"width": 390, "height": 844},
        has_touch=True,
        is_mobile=True,
    )
    routing_is_drawn(page)
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").tap()
    expect(page.locator(".caption").first).to_contain_text("hello")
    expect(page.locator("#run")).to_be_enabled()
    size = page.evaluate(
        "[document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
    )
    assert size[0] < 2500
    assert size[1] == 390
    page.evaluate("window.scrollTo(0, 0)")
    assert page.locator("#prompt").bounding_box()["y"] < 400
    expect(page.locator(".masthead .chips")).to_be_hidden()
    answers = page.locator(".answers")
    assert answers.evaluate("each => each.scrollWidth > 2 * each.clientWidth")


def test_a_page_without_motion(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), reduced_motion="reduce")
    routing_is_drawn(page)
    page.evaluate(
        "document.querySelector('.answer .text').insertAdjacentHTML('beforeend', "
        "'<span class=\"caret\"></span>')"
    )
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.caret')).animationName") == "none"
    )


# Whether what has the focus looks otherwise without it: itself, or the box around it.
SHOWS_FOCUS = """() => {
  const each = document.activeElement;
  const look = () => [each, each.closest('label, .block, .container') ?? each]
    .map((of) => getComputedStyle(of))
    .map((style) => [style.outline, style.boxShadow, style.borderColor, style.color].join());
  const focused = look().join();
  each.blur();
  const blurred = look().join();
  each.focus({ focusVisible: true });
  return [each.outerHTML.slice(0, 160), each.checkVisibility(), focused !== blurred];
}"""


def test_every_control_shows_that_it_has_the_focus(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)), reduced_motion="reduce")
    routing_is_drawn(page)
    page.evaluate("document.activeElement.blur()")
    stops = []
    for _ in range(60):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(SHOWS_FOCUS))
        if 'class="settings' in stops[-1][0]:
            break
    assert len(stops) > 20
    assert [name for name, is_visible, _ in stops if not is_visible] == []
    assert [name for name, _, shows in stops if not shows] == []
