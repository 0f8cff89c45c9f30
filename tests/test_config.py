"""What is decided once: where files go, what the environment says, which versions run."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectr_demo import config
from spectr_demo.config import MOST_SEED, TEMPERATURES, GenerationSettings, RouterConfig
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS


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


@pytest.mark.parametrize(("value", "is_on"), [("1", True), ("0", False), ("", False)])
def test_metrics_are_told_where_they_are_asked_for(
    value: str, is_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECTR_METRICS", raising=False)
    assert not config.has_metrics()
    monkeypatch.setenv("SPECTR_METRICS", value)
    assert config.has_metrics() is is_on


def test_every_variable_of_this_project_is_read_in_one_place() -> None:
    package = Path(config.__file__).parent
    readers = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if 'environ.get("S' in (text := file.read_text(encoding="utf-8")) or 'environ["S' in text
    }
    assert readers == {"config.py"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 1e-40}, r"temperature is 1e-40; it must be 0 \(greedy\) or from 0.0001"),
        ({"temperature": 1e300}, "temperature is 1e"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be a whole number from 0 to"),
        ({"seed": int(1e300)}, "seed is 1000"),
        ({"seed": 1e300}, "seed is 1e"),
        ({"seed": "x" * 5_000_000}, "seed is 'xxx"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_in_a_short_message(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GenerationSettings(**settings)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e300])
def test_a_routers_temperature_must_be_one_that_float32_can_divide_by(temperature: float) -> None:
    with pytest.raises(ValueError, match="router temperature is 1e"):
        RouterConfig(name="arrow", temperature=temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_ends_of_the_range_can_be_run(routed_model: SpectrModel, temperature: float) -> None:
    arrow = replace(ROUTERS["arrow"].preset, top_k=2, temperature=temperature)
    settings: dict[str, Any] = {"temperature": temperature, "seed": MOST_SEED}
    run = routed_model.compare("hello", [arrow], max_new_tokens=4, **settings)
    assert run.trace is not None
    weights = run.trace.column("arrow").weights
    assert np.isfinite(weights).all()
    assert run.columns[0].num_tokens == 4
