"""What the browser keeps: the address, earlier runs, copies, focus; and what-if by a click."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from spectr_demo import ui
from spectr_demo.config import PAGE_COLUMNS
from spectr_demo.engine.model import SpectrModel
from spectr_demo.ui.recorded import Recording
from tests.ui.conftest import FRANCE, PATIENCE, Open
from tests.ui.test_browser import Endless, Serve, routing_is_drawn

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect

pytestmark = pytest.mark.browser


def query_of(page: Any) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def run(page: Any, prompt: str) -> None:
    """Run it with Enter, and wait for its end."""
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#prompt textarea").press("Enter")
    expect(page.locator(".caption")).to_contain_text([prompt])
    expect(page.locator("#run")).to_be_enabled()
    page.wait_for_function("text => location.search.includes(text)", arg=prompt.split()[0])


def test_reload_back_and_a_list_bring_runs_back(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    routing_is_drawn(page)
    run(page, "red things")
    first = page.locator("#answers").inner_text()
    assert query_of(page)["prompt"] == "red things"
    run(page, "blue things")
    second = page.locator("#answers").inner_text()

    page.locator("#column").get_by_label("SpectR (paper)").check()
    page.wait_for_function("location.search.includes('column=spectr-paper')")
    page.reload()
    expect(page.locator("#prompt textarea")).to_have_value("blue things")
    answers_are = "text => document.querySelector('#answers').innerText === text"
    page.wait_for_function(answers_are, arg=second)  # once the page is shown
    expect(page.locator("#routing .rv")).to_have_attribute("data-column", "spectr-paper")

    page.go_back()
    expect(page.locator("#prompt textarea")).to_have_value("red things")
    page.wait_for_function(answers_are, arg=first)
    page.go_back()
    expect(page.locator("#prompt textarea")).to_have_value(FRANCE.prompt)
    expect(page.locator(".recorded")).to_have_count(1)
    assert not urlsplit(page.url).query, "going back writes no address"

    page.get_by_role("button", name="Earlier runs").click()
    runs = page.locator("#runs li")
    expect(runs).to_have_count(2)
    expect(runs.first).to_contain_text("blue things")
    both = page.locator("#compare-two")
    expect(both).to_be_disabled()
    for tick in runs.locator("input").all():
        tick.check()
    both.click()
    compared = page.locator("#compared")
    expect(compared.locator("del").first).to_have_text("red")
    expect(compared.locator("ins").first).to_have_text("blue")
    runs.first.locator("button").click()
    expect(page.locator("#prompt textarea")).to_have_value("blue things")
    expect(page.locator(".recorded")).to_have_count(0)

    page.locator("#forget-runs").click()
    expect(page.locator("#runs")).to_contain_text("No run is kept yet")
    page.reload()
    expect(page.locator("#prompt textarea")).to_have_value("blue things")
    expect(page.locator(".about")).to_contain_text("The link asks: “blue things”")


def test_a_link_brings_prompt_settings_column_and_token(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    column = recording.trace.column("spectr-paper")
    token = column.num_prompt + 1
    url = serve(ui.build(routed_model))
    prompt = FRANCE.prompt.replace(" ", "+")
    page = open_page(f"{url}?prompt={prompt}&column=spectr-paper&token={token}")
    expect(page.locator("#routing .rv")).to_have_attribute("data-column", "spectr-paper")
    expect(page.locator("#routing .rv-told")).to_contain_text(f"answer token {token}:")
    expect(page.locator("#routing .rv.is-pinned")).to_have_count(1)

    page = open_page(f"{url}?prompt=a+%3Cb%3E&columns=base,lag&seed=7&max_new_tokens=16")
    expect(page.locator("#prompt textarea")).to_have_value("a <b>")
    expect(page.locator(".about")).to_contain_text("“a <b>”")
    page.locator("#run").click()
    expect(page.locator(".answer h3")).to_have_text(["Base model", "LAG"])
    expect(page.locator("#run")).to_be_enabled()
    page.locator("#settings").get_by_role("button").first.click()
    expect(page.locator("#seed input")).to_have_value("7")


def test_copies(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(
        serve(ui.build(routed_model)), permissions=["clipboard-read", "clipboard-write"]
    )
    routing_is_drawn(page)

    def copied(button: Any) -> str:
        button.click()
        expect(button).to_have_text("Copied")
        return str(page.evaluate("navigator.clipboard.readText()"))

    copies = page.locator(".copies button")
    code = copied(copies.nth(0))
    compile(code, "copied", "exec")
    assert repr(FRANCE.prompt) in code
    assert copied(copies.nth(1)).startswith("spectr-demo compare 'What is the capital")
    link = copied(copies.nth(2))
    assert parse_qs(urlsplit(link).query)["prompt"] == [FRANCE.prompt]
    text = page.locator(".answer .text").first.inner_text()
    assert copied(page.locator(".answer .copy").first).strip() == text.strip()


def test_enter_runs_and_the_focus_follows(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    endless = Endless()
    page = open_page(serve(ui.build(routed_model, gpu=endless.gpu)))
    box = page.locator("#prompt textarea")
    box.fill("one")
    box.press("Shift+Enter")
    box.type("two")
    expect(box).to_have_value("one\ntwo")
    box.press("Enter")
    expect(page.locator(".answer.is-running")).to_have_count(len(PAGE_COLUMNS))
    expect(box).to_be_focused()
    page.locator("#stop").click()
    expect(page.locator(".answer.is-stopped")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator("#announce")).to_have_text(f"{len(PAGE_COLUMNS)} answers stopped")
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    expect(page.locator("#run")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".answer.is-stopped")).to_have_count(len(PAGE_COLUMNS))
    expect(page.locator("#run")).to_be_focused()
    assert endless.was_closed.wait(PATIENCE / 1000)


def test_a_click_on_an_expert_asks_what_if(
    routed_model: SpectrModel, recording: Recording, serve: Serve, open_page: Open
) -> None:
    page = open_page(serve(ui.build(routed_model)))
    routing_is_drawn(page)
    page.locator("#column").get_by_label("SpectR (paper)").check()
    expect(page.locator("#routing .rv")).to_have_attribute("data-column", "spectr-paper")
    page.locator("#routing .rv-plot").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_function("location.search.includes('token=')")
    page.locator('#routing .rv-legend [data-expert="green"]').click()
    panel = page.locator("#what-if")
    expect(panel.locator("#what-if-expert input")).to_have_value("green")
    expect(panel.locator("#what-if-token textarea, #what-if-token input")).to_have_value("1")
    panel.get_by_label("Only it").check()
    panel.locator("#what-if-run").click()
    told = page.locator("#what-if-answer .changed > h3")
    expect(told).to_contain_text("With green alone, from answer token 1 on")
    expect(page.locator("#what-if-answer .answer")).to_have_count(2)
    expect(page.locator("#what-if-run")).to_be_enabled()
    page.locator("#examples button").first.click()
    expect(page.locator("#what-if-answer .changed")).to_have_count(0)
