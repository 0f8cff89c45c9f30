"""Parts are kept until a file changes that decides a number."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from spectr_demo.base import generic
from spectr_demo.config import RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.evaluation import parts
from spectr_demo.evaluation.parts import Parts, code_files, fingerprint

PACKAGE = Path(parts.__file__).parents[1]
BASE = RouterConfig(name="base")


def module_files(name: str) -> list[Path]:
    """The file of one of our modules and those of the packages it is in; none for other names."""
    names = name.split(".")
    if names[0] != PACKAGE.name:
        return []
    files = []
    for depth in range(2, len(names) + 1):  # the package itself only hands names on
        path = PACKAGE.joinpath(*names[1:depth])
        files += [f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()]
    return files


def imported_by(file: Path) -> set[Path]:
    """Our files that a file imports anywhere, in functions too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "this project names packages fully"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {found for name in names for found in module_files(name)}


def test_all_that_an_evaluation_imports_is_in_the_fingerprint() -> None:
    todo, found = [PACKAGE / "evaluation" / "evaluate.py"], set[Path]()
    while todo:
        file = todo.pop()
        found.add(file)
        todo += imported_by(file) - found
    names = {str(file.relative_to(PACKAGE)) for file in found}
    assert {"engine/tracing.py", "cpu/attention.py", "base/loading.py", "config.py"} <= names
    kept = {str(file.relative_to(PACKAGE)) for file in code_files()}
    assert names - kept == {"evaluation/claims.py"}, "made of the parts, and makes none"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's files where they can be changed."""
    path = tmp_path / "package"
    shutil.copytree(PACKAGE, path, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    monkeypatch.setattr(parts, "_PACKAGE", path)
    return path


def is_told(file: Path, engine: SpectrModel) -> bool:
    """Whether a change of the file changes the fingerprint."""
    before, content = fingerprint(engine), file.read_bytes()
    file.write_bytes(content + b"\n# changed\n")
    after = fingerprint(engine)
    file.write_bytes(content)
    return before != after


def test_a_change_of_any_of_these_files_starts_anew(copy: Path, routed_model: SpectrModel) -> None:
    files = code_files()
    assert len(files) > 50 and all(file.is_relative_to(copy) for file in files)
    assert [file for file in files if not is_told(file, routed_model)] == []


def test_so_does_a_change_of_the_prompts(
    routed_model: SpectrModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = {fingerprint(routed_model)}
    for file, module, name in (("a", parts, "ORDINARY"), ("b", generic, "GENERIC_TEXT")):
        (tmp_path / file).write_text('{"bases": {"tiny": ["Hello"]}}')
        monkeypatch.setattr(module, name, tmp_path / file)
        fingerprints.add(fingerprint(routed_model))
    assert len(fingerprints) == 3


def test_an_edit_of_the_page_of_charts_and_of_words_does_not(
    copy: Path, routed_model: SpectrModel
) -> None:
    files = [file for room in ("ui", "charts", "training") for file in (copy / room).glob("*.py")]
    files += [copy / "__main__.py"]
    files += [copy / "evaluation" / name for name in ("report.py", "claims.py", "findings.py")]
    assert [file for file in files if is_told(file, routed_model)] == []


def test_a_part_is_computed_once_and_kept_whole(routed_model: SpectrModel) -> None:
    kept = Parts(routed_model)
    assert kept.get("nll", BASE, lambda config: [config.name, 1.5], "sql", 2) == ["base", 1.5]
    again = Parts(routed_model).get("nll", BASE, lambda config: pytest.fail("again"), "sql", 2)
    assert again == ["base", 1.5]
    (file,) = kept.folder.iterdir()
    assert json.loads(file.read_text()) == ["base", 1.5]


@pytest.mark.parametrize(
    ("kind", "config", "of"),
    [
        ("answers", BASE, ("sql", 2)),
        ("nll", RouterConfig(name="uniform"), ("sql", 2)),
        ("nll", BASE, ("sql", 3)),
    ],
)
def test_another_part_is_computed(
    routed_model: SpectrModel, kind: str, config: RouterConfig, of: tuple[str | int, ...]
) -> None:
    kept = Parts(routed_model)
    assert kept.get("nll", BASE, lambda config: 1, "sql", 2) == 1
    assert kept.get(kind, config, lambda config: 2, *of) == 2


def test_half_a_file_is_computed_again(routed_model: SpectrModel) -> None:
    kept = Parts(routed_model)
    kept.get("nll", BASE, lambda config: 1)
    (file,) = kept.folder.iterdir()
    file.write_text("{")
    assert kept.get("nll", BASE, lambda config: 2) == 2


def test_a_write_that_fails_leaves_nothing(
    routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Parts(routed_model)

    def write_half(path: Path, text: str, **options: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="disk full"):
        kept.get("nll", BASE, lambda config: [1, 2, 3])
    assert list(kept.folder.iterdir()) == []
