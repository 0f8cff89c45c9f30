"""What ordinary text told is kept for the next start."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectr_demo.engine import kept
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.ordinary import Ordinary
from spectr_demo.engine.reading import Reader
from spectr_demo.routing.routers import calibrated_scores
from tests.conftest import BuildModel


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts, each time that they are read."""
    found: list[int] = []
    hear = Reader._hear

    def spy(self: Reader, prompts: Any) -> Any:
        found.append(len(prompts))
        return hear(self, prompts)

    monkeypatch.setattr(Reader, "_hear", spy)
    return found


def assert_same(one: SpectrModel, other: SpectrModel) -> None:
    a, b = one.reader.ordinary, other.reader.ordinary
    assert torch.equal(a.certainty, b.certainty)
    for first, second in zip(one.library.banks, other.library.banks, strict=True):
        x, y = a.detectors[first], b.detectors[second]
        for name in ("whitening", "mean", "std"):
            assert torch.equal(getattr(x, name), getattr(y, name))
        for name in ("mean", "directions", "damping", "scale"):
            assert torch.equal(getattr(x.metric, name), getattr(y.metric, name))
        for score in calibrated_scores():
            for old, new in zip(
                a.calibration.of(first, score), b.calibration.of(second, score), strict=True
            ):
                assert torch.equal(old, new)


def test_the_next_start_reads_no_ordinary_text(
    build_model: BuildModel, expert_folders: list[str], measured: list[int]
) -> None:
    first, second = (build_model(expert_folders) for _ in range(2))
    assert_same(first, second)
    assert len(measured) == 1
    fewer = build_model(expert_folders[:2])
    _ = fewer.reader.ordinary
    assert len(measured) == 2, "other experts are measured"


def test_an_expert_that_is_added_is_measured_alone(
    build_model: BuildModel, expert_folders: list[str], measured: list[int]
) -> None:
    _ = build_model(expert_folders[:2]).reader.ordinary
    model = build_model(expert_folders[:2])
    _ = model.reader.ordinary
    assert len(measured) == 1
    model.add(expert_folders[2])
    assert isinstance(model.reader.ordinary, Ordinary)
    assert len(measured) == 2


@pytest.mark.parametrize("what", ["dtype", "template", "fingerprint"])
def test_another_base_has_its_own(
    what: str, build_model: BuildModel, expert_folders: list[str]
) -> None:
    first = build_model(expert_folders)
    base = first.base
    file = kept._file(base, first.library, ["hello"])
    tokenizer = type(base.tokenizer)(tokenizer_object=base.tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    other = replace(
        base,
        **{
            "dtype": {"compute_dtype": torch.bfloat16},
            "template": {"tokenizer": tokenizer},
            "fingerprint": {"fingerprint": "another"},
        }[what],  # type: ignore[arg-type]
    )
    assert kept._file(other, first.library, ["hello"]) != file
    assert kept._file(base, first.library, ["hello", "you"]) != file


def test_a_damaged_file_is_measured_again(
    build_model: BuildModel,
    expert_folders: list[str],
    measured: list[int],
    cache_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = build_model(expert_folders)
    _ = first.reader.ordinary
    (file,) = (cache_folder / "ordinary").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert_same(first, build_model(expert_folders))
    assert len(measured) == 2
    assert "is damaged and is made again" in caplog.text


def test_what_a_visitor_sent_is_not_kept(
    build_model: BuildModel, expert_folders: list[str], cache_folder: Path
) -> None:
    model = build_model(expert_folders)
    passing = replace(
        model.library,
        adapters=tuple(replace(a, is_lasting=False) for a in model.library.adapters),
    )
    model.detach()
    _ = SpectrModel(model.base, passing).reader.ordinary
    assert not (cache_folder / "ordinary").exists()


def test_a_cache_that_cannot_be_written_is_said(
    build_model: BuildModel,
    expert_folders: list[str],
    cache_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache_folder.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_model(expert_folders).reader.ordinary, Ordinary)
    (line,) = [line for line in caplog.messages if "ordinary text" in line]
    assert "SPECTR_CACHE" in line
