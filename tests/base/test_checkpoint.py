"""The default's NF4 checkpoint: made once, made again where it is damaged, named by its makers."""

import errno
import json
import os
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from spectr_demo.base import checkpoint
from spectr_demo.base.checkpoint import MANIFEST, digests, embedded_checkpoint, is_whole
from spectr_demo.base.embedded import EMBEDDED_ID, EmbeddedBaseError
from spectr_demo.base.loading import load_base
from tests.base.conftest import quantized


class Converter:
    """Stands in for the conversion of the GGUF: a tiny checkpoint, and how often it was made."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.folder, self.tokenizer, self.num_made = folder, tokenizer, 0

    def __call__(self, target: Path, dtype: torch.dtype) -> None:
        self.num_made += 1
        shutil.rmtree(target, ignore_errors=True)
        quantized(self.folder).save_pretrained(target)
        self.tokenizer.save_pretrained(target)
        (target / MANIFEST).write_text(json.dumps(digests(target)))


@pytest.fixture
def converter(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Converter:
    return Converter(folder, tokenizer)


def test_the_default_is_converted_once(converter: Converter, tmp_path: Path) -> None:
    bases = [
        load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter) for _ in range(2)
    ]
    assert converter.num_made == 1
    assert bases[0].source == f"{EMBEDDED_ID} (embedded)"
    assert bases[0].model.config._name_or_path == EMBEDDED_ID
    assert bases[0].fingerprint.startswith("gguf-sha256:b179c9523d0e")
    for first, second in zip(*(base.model.parameters() for base in bases), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", MANIFEST])
@pytest.mark.parametrize("keep", [0, 100, None])
def test_a_damaged_checkpoint_of_the_default_is_made_again(
    converter: Converter, tmp_path: Path, name: str, keep: int | None
) -> None:
    made = embedded_checkpoint(tmp_path, torch.float32)
    converter(made, torch.float32)
    assert is_whole(made)
    assert is_whole(made, only="config.json")
    path = made / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    assert not is_whole(made)
    assert is_whole(made, only="config.json") == (name not in ("config.json", MANIFEST))


@pytest.mark.parametrize("place", [0.3, 0.5, 0.9, 1])
def test_a_damaged_default_is_converted_again(
    converter: Converter, tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    """... wherever one bit of it is another."""
    load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter)
    (weights,) = tmp_path.glob("cache/base/*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    weights.write_bytes(content)
    caplog.clear()
    load_base(device="cpu", dtype=torch.float32, make_checkpoint=converter)
    assert converter.num_made == 2
    assert f"{weights.parent} is damaged and is made again" in caplog.messages


def test_what_changes_the_checkpoint_changes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {embedded_checkpoint(Path(), dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(bnb, "__version__", "99.0")
    names.add(embedded_checkpoint(Path(), torch.float32))
    monkeypatch.setattr(checkpoint.transformers, "__version__", "99.1.2")
    names.add(embedded_checkpoint(Path(), torch.float32))
    assert len(names) == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # What safetensors and tokenizers say.
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError", "tokenizers"],
)
@pytest.mark.parametrize("writer", ["dense", "nf4"])
def test_a_disk_that_fills_up_while_converting_is_one_message(
    error: Exception, writer: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and nothing is left of it."""

    def convert(gguf: Path, scratch: Path, dtype: torch.dtype) -> None:
        (scratch / writer).mkdir()
        (scratch / writer / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "fetch_gguf", lambda cache: cache / "tiny.gguf")
    monkeypatch.setattr(checkpoint, "_convert", convert)
    with pytest.raises(EmbeddedBaseError) as caught:
        load_base(device="cpu", dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(cache_folder), "No space left on device", "720 MB", "SPECTR_CACHE"):
        assert part in message
    assert {path.name for path in cache_folder.iterdir()} <= {".lock"}


def test_other_errors_of_converting_keep_their_kind(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(*_: object) -> None:
        raise SafetensorError("a shape is wrong")

    monkeypatch.setattr(checkpoint, "fetch_gguf", lambda cache: cache / "tiny.gguf")
    monkeypatch.setattr(checkpoint, "_convert", convert)
    with pytest.raises(SafetensorError, match="a shape is wrong"):
        load_base(device="cpu", dtype=torch.float32)
