"""A visitor adds an expert in a real browser, uses it, and removes it; nobody else sees it."""

import zipfile
from pathlib import Path
from typing import Any

import pytest

from spectr_demo import ui
from spectr_demo.engine.model import SpectrModel
from spectr_demo.experts.hub import CONFIG_FILE, WEIGHTS_FILE
from tests.conftest import SaveExpert
from tests.ui.conftest import PATIENCE, Open
from tests.ui.test_browser import Serve
from tests.ui.test_everyone_browser import serious
from tests.ui.test_visitors import until

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect
pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPECTR_UPLOADS", "SPECTR_OWNER_TOKEN", "SPECTR_HUB_ALLOW", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def theirs(save_expert: SaveExpert, tmp_path: Path) -> str:
    """A zip file of an adapter."""
    folder, file = Path(save_expert("theirs", seed=7)), tmp_path / "theirs.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            archive.write(folder / name, f"theirs/{name}")
    return str(file)


def open_changes(page: Any) -> None:
    page.get_by_role("tab", name="Experts").click()
    page.get_by_role("button", name="Add or change experts").click()
    expect(page.locator("#changes-look")).to_be_visible()


def choose(page: Any, field: str, name: str) -> None:
    page.locator(f"{field} input").click()
    page.get_by_role("option", name=name).click()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_an_expert_comes_is_used_and_goes(
    routed_model: SpectrModel, serve: Serve, open_page: Open, theirs: str, scheme: Any, width: int
) -> None:
    url = serve(ui.build(routed_model))
    page = open_page(url, color_scheme=scheme, viewport={"width": width, "height": 900})
    open_changes(page)
    expect(page.locator("#changes-add")).to_be_disabled()
    assert serious(page) == []

    page.locator("#changes-look").click()
    expect(page.locator("#changes-added")).to_contain_text("no file was sent: choose a zip file")
    page.locator("#zip").set_input_files(theirs)
    page.locator("#changes-name textarea, #changes-name input").fill("mine")
    page.locator("#changes-look").click()
    report = page.locator("#changes-report")
    expect(report).to_contain_text("mine fits this base: it can be added")
    for fact in ("Rank", "Scaling", "Nearest", "mine.zip"):
        expect(report).to_contain_text(fact)
    expect(page.locator("#changes-added")).to_be_hidden()
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.locator("#changes-add").click()
    expect(page.locator("#changes-added")).to_contain_text("mine was added for this page")
    expect(page.locator("#changes-whose")).to_contain_text("added: mine")
    expect(page.locator("#expert-shown")).to_contain_text("one of 4")
    assert serious(page) == []

    page.get_by_role("tab", name="Compare").click()
    expect(page.locator(".masthead summary")).to_contain_text("4 experts loaded")
    page.get_by_role("button", name="Columns and settings").click()
    choose(page, "#expert", "mine")
    page.locator("#prompt textarea").fill("hello")
    page.locator("#run").click()
    expect(page.locator("#run")).to_be_enabled()
    expect(page.locator(".answer.is-finished h3", has_text="Single expert: mine")).to_be_visible()

    other = open_page(url)
    expect(other.locator(".masthead summary")).to_contain_text("3 experts loaded")

    page.get_by_role("tab", name="Experts").click()
    choose(page, "#changes-expert", "mine")
    page.locator("#changes-remove").click()
    expect(page.locator("#changes-notice")).to_contain_text("mine was removed for this page")
    expect(page.locator("#expert-shown")).to_contain_text("one of 3")
    page.get_by_role("tab", name="Compare").click()
    expect(page.locator(".masthead summary")).to_contain_text("3 experts loaded")


def test_the_owner_changes_the_experts_of_all(
    routed_model: SpectrModel,
    serve: Serve,
    open_page: Open,
    theirs: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPECTR_OWNER_TOKEN", "s3cret ✓")
    monkeypatch.setenv("SPECTR_UPLOADS", "0")
    url = serve(ui.build(routed_model))
    page, other = open_page(url), open_page(url)
    open_changes(page)
    page.locator("#zip").set_input_files(theirs)
    page.locator("#changes-look").click()
    expect(page.locator("#changes-added")).to_contain_text("only the owner")
    page.locator("#changes-token input").fill("s3cret ✓")
    page.locator("#changes-look").click()
    expect(page.locator("#changes-report")).to_contain_text("theirs fits this base")
    page.locator("#changes-add").click()
    expect(page.locator("#changes-added")).to_contain_text("theirs was added for all visitors")

    expect(other.locator(".masthead summary")).to_contain_text("3 experts loaded")
    other.locator("#prompt textarea").fill("hello")
    other.locator("#run").click()
    expect(other.locator(".masthead summary")).to_contain_text("4 experts loaded")
    expect(other.locator("#run")).to_be_enabled()
    late = open_page(url)
    expect(late.locator(".masthead summary")).to_contain_text("4 experts loaded")


def test_what_a_page_had_is_freed_when_it_is_closed(
    routed_model: SpectrModel, serve: Serve, open_page: Open
) -> None:
    built = ui.build(routed_model)
    looking: Any = next(fn.fn for fn in built.fns.values() if fn.name == "looking")
    own = looking.__self__._libraries._own
    page = open_page(serve(built))
    open_changes(page)
    page.locator("#changes-disable").click()
    expect(page.locator("#changes-notice")).to_contain_text("red was disabled")
    assert len(own) == 1
    page.close()
    until(lambda: not own)
