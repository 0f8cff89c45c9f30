"""A model with a library on disk: the same texts and traces, and experts come and go."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from spectr_demo.__main__ import main
from spectr_demo.base import generic
from spectr_demo.base.loading import load_base
from spectr_demo.engine.model import SpectrModel, load
from spectr_demo.engine.packing import pack
from spectr_demo.engine.reading import Reader
from spectr_demo.experts.adapters import AdapterError
from spectr_demo.experts.library import load_experts
from spectr_demo.routing.detection import Detector
from tests.conftest import IN_CONTEXT, SaveExpert

PROMPT = "Paint it red"
ORDINARY = ["How are you?", "Tell me of a walk in the rain", "What is new?", "1, 2, 3"]
COLUMNS = [
    "spectr",
    "spectr-paper",
    "lag",
    "arrow",
    "norm",
    "uniform",
    "spectr-calibrated",
    IN_CONTEXT,
]


@pytest.fixture(autouse=True)
def few_prompts(base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = load_base(base_folder).fingerprint
    file = tmp_path / "generic_text.json"
    file.write_text(json.dumps({"bases": {fingerprint: ORDINARY}}))
    monkeypatch.setattr(generic, "GENERIC_TEXT", file)


@pytest.fixture(scope="module")
def folders(save_expert: SaveExpert) -> list[str]:
    return [
        save_expert("red", seed=0),
        save_expert("attention", seed=1, r=2, target_modules=["q_proj", "v_proj"]),
        save_expert("wide", seed=2, r=6),
    ]


@pytest.fixture
def disk(base_folder: str, folders: list[str], tmp_path: Path) -> Path:
    pack(base_folder, folders, tmp_path / "disk")
    return tmp_path / "disk"


def never(*_: object, **__: object) -> None:
    raise AssertionError("what is known is made again")


def assert_same_runs(one: SpectrModel, other: SpectrModel, atol: float = 0) -> None:
    names = one.library.names
    assert names == other.library.names
    columns = [*COLUMNS, *(f"single:{name}" for name in names)]
    runs = [model.compare(PROMPT, columns, max_new_tokens=6) for model in (one, other)]
    for a, b in zip(runs[0].columns, runs[1].columns, strict=True):
        assert a.text == b.text, a.label
    assert runs[0].trace is not None and runs[1].trace is not None
    assert runs[0].trace.meta["experts"] == runs[1].trace.meta["experts"]
    for x, y in zip(runs[0].trace.columns, runs[1].trace.columns, strict=True):
        for name in ("experts", "weights", "scores", "logprob"):
            arrays = getattr(x, name), getattr(y, name)
            np.testing.assert_allclose(*arrays, rtol=0, atol=atol, err_msg=name)


def test_texts_and_traces_are_the_same_and_nothing_is_measured_again(
    base_folder: str, folders: list[str], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(base_folder, folders)
    measured = expected.reader.ordinary
    found = load(base_folder, disk)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", never)
        patch.setattr("spectr_demo.routing.detection._whitening", never)
        ordinary = found.reader.ordinary
    assert torch.equal(ordinary.certainty, measured.certainty)
    pairs = zip(found.library.banks, expected.library.banks, strict=True)
    for detector, same in ((ordinary.detectors[a], measured.detectors[b]) for a, b in pairs):
        assert torch.equal(detector.whitening, same.whitening)
        assert torch.equal(detector.mean, same.mean) and torch.equal(detector.std, same.std)
    assert_same_runs(found, expected)


def test_experts_come_and_go(
    base_folder: str, folders: list[str], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base_folder, disk)
    before = model.library.banks
    _ = model.reader.ordinary
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", never)
        model.disable("attention")
        assert model.library.names == ("red", "wide")
        model.enable("attention")
        assert all(a is b for a, b in zip(model.library.banks, before, strict=True)), "mapped again"
        model.remove("red")
    assert_same_runs(model, load(base_folder, folders[1:]))
    model.add(f"again={disk}/experts/red")
    fresh = load(base_folder, [folders[1], folders[2], f"again={folders[0]}"])
    assert_same_runs(model, fresh)
    # A library of which some is unknown: only that is measured.
    other = load(base_folder, folders[0])
    _ = other.reader.ordinary
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", never)
        other.add([f"{disk}/experts/attention", f"{disk}/experts/wide"])
    # One expert measured alone, two measured with it: to rounding.
    assert_same_runs(other, load(base_folder, folders), atol=1e-5)


def test_a_damaged_measurement_is_made_again(
    base_folder: str, folders: list[str], disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = disk / "ordinary" / "0001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    model = load(base_folder, disk)
    with caplog.at_level(logging.WARNING):
        _ = model.reader.ordinary
    (line,) = [line for line in caplog.messages if "measured over ordinary text again" in line]
    assert "ordinary/0001.safetensors: it was changed" in line
    assert_same_runs(model, load(base_folder, folders))


def test_another_template_is_measured_anew(
    base_folder: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ordinary text tells depends on how requests are written."""
    base = load_base(base_folder)
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace("<|im_end|>", "<|im_end|> ")
    model = SpectrModel(base, load_experts(disk, base.model))
    read = []
    monkeypatch.setattr(
        Reader, "read", lambda *given, then=Reader.read: (read.append(1), then(*given))
    )
    _ = model.reader.ordinary
    assert read


def test_a_large_library_is_measured_in_parts(
    base_folder: str,
    folders: list[str],
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("spectr_demo.engine.reading._EXPERTS_AT_ONCE", 2)
    sizes = []
    monkeypatch.setattr(
        Detector,
        "standardised",
        lambda bank, *given, then=Detector.standardised: (
            sizes.append(bank.num_experts),
            then(bank, *given),
        )[1],
    )
    model = load(base_folder, folders)
    parts = model.reader.ordinary
    assert set(sizes) == {1, 2}
    whole = load(base_folder, disk).reader.ordinary
    torch.testing.assert_close(parts.certainty, whole.certainty, atol=1e-4, rtol=1e-4)


def test_the_command(
    base_folder: str, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made" / "library"
    options = ["--base", base_folder, "--experts", *folders]
    assert main(["pack", str(target), *options, "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["experts"] == ["red", "attention", "wide"]
    assert output["num_bytes"] == sum(
        file.stat().st_size for file in target.glob("*/*.safetensors")
    )
    texts = []
    for experts in (folders, [str(target)]):
        command = ["generate", PROMPT, "--base", base_folder, "--max-new-tokens", "6"]
        assert main([*command, "--router", "spectr", "--json", "--experts", *experts]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert main(["pack", str(target), "--verify"]) == 0
    assert "is whole: 3 experts" in " ".join(capsys.readouterr().out.split())
    assert main(["pack", str(target), *options]) == 2
    assert "is there already" in capsys.readouterr().err
    (target / "factors" / "0000.safetensors").write_bytes(b"")
    assert main(["pack", str(target), "--verify"]) == 2
    assert "not what was packed; pack it again" in capsys.readouterr().err


def test_a_library_is_made_whole_or_not_at_all(
    base_folder: str, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "to" / "library"
    monkeypatch.setattr("spectr_demo.engine.packing._measured", never)
    with pytest.raises(AssertionError):
        pack(base_folder, folders, target)
    assert list(target.parent.iterdir()) == []
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(AdapterError, match="empty has no adapter_config"):
        pack(base_folder, str(empty), target)
    with pytest.raises(AdapterError, match="no expert to pack"):
        pack(base_folder, [], target)
