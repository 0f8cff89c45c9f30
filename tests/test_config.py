"""What is decided once: where files go, what the environment says, which versions run."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from spectr_demo import config


def test_versions_are_those_that_are_installed() -> None:
    versions = config.library_versions()
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    assert {name: versions[name] for name in libraries} == {n: version(n) for n in libraries}


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(name: str) -> str:
        if name == "spectr-demo":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(config, "version", some)
    versions = config.library_versions.__wrapped__()
    assert versions == dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "1.0")


@pytest.mark.parametrize(
    ("variable", "read"),
    [
        ("SPECTR_BASE_MODEL", config.base_from_environment),
        ("SPECTR_DEVICE_MAP", config.device_map_from_environment),
        ("SPECTR_PAPER_DATA", config.paper_data_from_environment),
    ],
)
def test_an_empty_variable_is_none_at_all(
    variable: str, read: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(read)
    monkeypatch.setenv(variable, "something")
    assert read() == "something"
    monkeypatch.setenv(variable, "")
    assert read() is None
    monkeypatch.delenv(variable)
    assert read() is None


def test_every_variable_of_this_project_is_read_in_one_place() -> None:
    package = Path(config.__file__).parent
    readers = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if 'environ.get("S' in (text := file.read_text(encoding="utf-8")) or 'environ["S' in text
    }
    assert readers == {"config.py"}
