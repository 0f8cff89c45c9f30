"""The documents agree with the JSON files their tables are of, and name paths that exist."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from spectr_demo.evaluation.claims import EACH_LAYER, ONE_CHOICE, RAW_METRIC
from spectr_demo.evaluation.findings import SUBJECT, judged_claims
from spectr_demo.evaluation.report import load_results, to_markdown

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PAGES += [ROOT / "notebooks" / "README.md"]
PAGES += [ROOT / "benchmarks" / name / "README.md" for name in ("second_edition", "distractors")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)|<img src=\"([^\"]+)\"")
CODE_PATH = re.compile(
    r"`((?:spectr_demo|tests|benchmarks|docs|scripts|notebooks|assets)/[\w./*-]+)`"
)
MODULE = re.compile(r"`(spectr_demo(?:\.\w+)+)`")
# Pages that tell what was: a path in them may be gone.
HISTORY = {"CHANGELOG.md", "log.md"}
# What README.md says of two rows, and the claims (figure, more, less) that must be shown for it.
SAID = {
    "**The request says what one token cannot.**": [
        ("scores", SUBJECT, other) for other in ("base", "arrow", "spectr-paper", "spectr")
    ],
    "**SpectR beats Arrow and merging, by little.**": [
        ("scores", "spectr", other) for other in ("arrow", "TIES", "uniform (outputs)")
    ],
    "**Messages with two and three requests.**": [("messages", SUBJECT, "spectr")],
    "**A choice for each layer does not help.**": [
        ("requests", ONE_CHOICE, EACH_LAYER),
        ("requests", ONE_CHOICE, RAW_METRIC),
    ],
}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def exists(path: str) -> bool:
    return any(ROOT.glob(path.rstrip("/")))


def test_tables_are_those_of_the_json_files(tables: ModuleType) -> None:
    names = []
    for page in tables.PAGES:
        names += [name for _, name, *_ in tables.MARKED.findall(text(page))]
        assert tables.written(text(page)) == text(page), "run python benchmarks/tables.py"
    assert sorted(names) == sorted(tables.TABLES), "every table stands in one page"


def test_a_changed_table_is_written_anew(tables: ModuleType) -> None:
    page = text(ROOT / "README.md")
    changed = page.replace("| `spectr-context` | 0.", "| `spectr-context` | 1.")
    assert changed != page
    assert tables.written(changed) == page


def test_the_report_is_that_of_the_shipped_results() -> None:
    results = load_results()
    assert results is not None
    report = to_markdown(results)
    assert text(ROOT / "docs" / "results.md") == report, "run python -m spectr_demo evaluate"


@pytest.mark.parametrize("said", SAID)
def test_the_readme_says_what_paired_tests_show(said: str) -> None:
    assert said in text(ROOT / "README.md"), "other words: name them in SAID, with their claims"
    shown = {
        (c["figure"], c["more"], c["less"]): c["shown"] for c in judged_claims(load_results() or {})
    }
    if not shown:
        pytest.skip("the shipped results were made before there were tests")
    assert {claim: shown.get(claim) for claim in SAID[said]} == dict.fromkeys(SAID[said], "yes")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    found = [a or b for a, b in LINK.findall(text(page))]
    missing = [link for link in found if not (page.parent / link).exists()]
    if page.name not in HISTORY:
        missing += [path for path in CODE_PATH.findall(text(page)) if not exists(path)]
        missing += [name for name in MODULE.findall(text(page)) if not is_module(name)]
    assert missing == []


def is_module(name: str) -> bool:
    """A module of the package, or a public name in one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    parent = path.parent
    file = parent / "__init__.py" if parent.is_dir() else parent.with_suffix(".py")
    return file.is_file() and re.search(rf"\b{path.name}\b", text(file)) is not None
