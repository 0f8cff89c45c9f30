"""Zip files of strangers: one adapter is read, whatever else is refused before it is written."""

import gc
import io
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectr_demo.config import ASSETS
from spectr_demo.experts import archives
from spectr_demo.experts.archives import MOST_ENTRIES, read_zipped
from spectr_demo.experts.library import align_adapter
from spectr_demo.experts.messages import AdapterError
from tests.conftest import SaveExpert

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEFLATED = zipfile.ZIP_DEFLATED
Packed = Callable[..., io.BytesIO]


@pytest.fixture
def folder(save_expert: SaveExpert) -> Path:
    return Path(save_expert("mine", seed=3))


@pytest.fixture(autouse=True)
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything is unpacked."""
    place = tmp_path / "unpacked"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def pack(folder: Path) -> Packed:
    """A function that packs the adapter, and more entries before it."""

    def packed(
        more: dict[str | zipfile.ZipInfo, bytes] | None = None,
        *,
        inside: str = "",
        leave_out: tuple[str, ...] = (),
    ) -> io.BytesIO:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", DEFLATED) as archive:
            for name, content in (more or {}).items():
                archive.writestr(name, content)
            for name in (CONFIG, WEIGHTS):
                if name not in leave_out:
                    archive.write(folder / name, f"{inside}{name}")
        return file

    return packed


def read(file: io.BytesIO, **options: Any) -> Any:
    return read_zipped(file, "mine", "mine.zip", **options)


@pytest.mark.parametrize("inside", ["", "mine/", "a/b/mine/"])
def test_an_adapter_is_read_from_its_root_or_one_folder(
    pack: Packed, folder: Path, inside: str, written: Path, cache_folder: Path
) -> None:
    more = {"notes.txt": b"x", "tokenizer.json": b"{}", "__MACOSX/adapter_config.json": b"{}"}
    adapter = read(pack(more, inside=inside))
    plain = archives.read_adapter(folder, "mine")
    assert (adapter.name, adapter.source, adapter.sha256) == ("mine", "mine.zip", plain.sha256)
    assert adapter.shapes == plain.shapes
    aligned = align_adapter(adapter)
    assert aligned.keys() == adapter.shapes.keys()
    assert not list(cache_folder.rglob("*.safetensors")), "a stranger's fills no disk"
    (place,) = written.iterdir()
    assert sorted(file.name for file in place.iterdir()) == [CONFIG, WEIGHTS]
    assert place.stat().st_mode & 0o077 == 0
    del adapter
    gc.collect()
    assert not list(written.iterdir()), "it is deleted with the adapter"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, DEFLATED])
def test_a_shipped_expert_is_read(method: int) -> None:
    """Whose files are of a usual size."""
    shipped, file = ASSETS / "experts" / "cron", io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for each in sorted(shipped.iterdir()):
            archive.write(each, f"cron/{each.name}")
    assert len(file.getvalue()) > 2_000_000
    assert read(file).sha256 == archives.read_adapter(shipped).sha256


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def backslash() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = "..\\x"
    return info


HOSTILE: dict[str, tuple[dict[str | zipfile.ZipInfo, bytes], str]] = {
    "up": ({"../adapter_config.json": b"{}"}, r"'\.\./adapter_config.json'.*lie outside"),
    "far up": ({"a/../../../etc/x": b""}, "lie outside"),
    "absolute": ({"/etc/passwd": b""}, r"'/etc/passwd'.*lie outside"),
    "drive": ({"C:/x": b""}, "lie outside"),
    "backslash": ({backslash(): b""}, "lie outside"),
    "newline": ({"a\nb": b""}, "lie outside"),
    "link": ({link(f"x/{CONFIG}"): b"/etc/passwd"}, "are links"),
    "bomb": ({"zeros": bytes(30_000_000)}, "unpack to more than 100 times their size"),
    "two": ({"other/adapter_config.json": b"{}"}, r"it holds 2 adapters \(\., other\), needed one"),
    "many": ({str(i): b"" for i in range(MOST_ENTRIES)}, "1,002 entries, at most 1,000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_adapter_has_is_refused_before_anything_is_written(
    pack: Packed, written: Path, name: str
) -> None:
    more, message = HOSTILE[name]
    with pytest.raises(AdapterError, match=message) as caught:
        read(pack(more))
    (problem,) = caught.value.problems
    assert problem.startswith("mine.zip: ") and len(problem) < 500
    assert not list(written.rglob("*.*"))


def test_a_name_that_is_there_twice_is_refused(pack: Packed) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        file = pack({WEIGHTS: b"x"})
    with pytest.raises(AdapterError, match=r"'adapter_model.safetensors'.*are there twice"):
        read(file)
    with pytest.raises(AdapterError, match="are there twice"):
        read(pack({WEIGHTS.upper(): b"x"}))


def test_a_hundred_thousand_entries_are_not_even_listed(written: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(100_000):
            archive.writestr(f"{i}", b"")
    with pytest.raises(AdapterError, match="its list of entries has more than 1,000,000 bytes"):
        read(file)


def test_a_nested_zip_is_not_opened(pack: Packed) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mine.zip", pack().getvalue())
    with pytest.raises(AdapterError, match=r"it holds no adapter_config.json; pack the folder"):
        read(file)


def test_a_pickle_is_no_adapter(pack: Packed) -> None:
    file = pack({"adapter_model.bin": b"x"}, leave_out=(WEIGHTS,))
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors .* safetensors alone"):
        read(file)


def changed(content: bytes, name: str, place: int, value: int, size: int = 4) -> io.BytesIO:
    """A zip file with another number in the list of entries, `place` bytes from where an entry
    begins."""
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
    data = bytearray(content)
    data[start + place : start + place + size] = value.to_bytes(size, "little")
    return io.BytesIO(bytes(data))


def size_of(content: bytes, name: str) -> int:
    return zipfile.ZipFile(io.BytesIO(content)).getinfo(name).file_size


@pytest.mark.parametrize("off", [-1000, 1000])
def test_sizes_that_lie_are_found_while_it_is_unpacked(pack: Packed, off: int) -> None:
    content = pack().getvalue()
    file = changed(content, WEIGHTS, 24, size_of(content, WEIGHTS) + off)
    with pytest.raises(AdapterError, match=r"mine.zip: it is no zip file that can be read \("):
        read(file)


def test_no_more_is_written_than_was_declared(
    pack: Packed, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Python's own reader would give more."""
    content = pack().getvalue()
    entry = zipfile.ZipFile(io.BytesIO(content)).getinfo(WEIGHTS)
    target = io.BytesIO()
    with pytest.raises(zipfile.BadZipFile, match="does not have the 1,000 bytes"):
        archives._copy(io.BytesIO(bytes(5_000_000)), target, 1000)
    assert len(target.getvalue()) <= 1000 < entry.file_size


@pytest.mark.parametrize(
    ("place", "value", "size", "message"),
    [
        (8, 1, 2, "are encrypted"),
        (10, 12, 2, "packed in another way than deflate"),  # bzip2
        (10, 99, 2, "packed in another way than deflate"),
        (16, 0, 4, "no zip file that can be read .*CRC"),
        (42, 5, 4, "no zip file that can be read"),  # where the entry begins
    ],
)
def test_damage_and_other_kinds_are_refused(
    pack: Packed, place: int, value: int, size: int, message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        read(changed(pack().getvalue(), WEIGHTS, place, value, size))


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip at all" * 100])
def test_what_is_no_zip_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterError, match=r"mine.zip: it is no zip file that can be read"):
        read(io.BytesIO(content))


def test_a_cut_zip_is_refused(pack: Packed) -> None:
    content = pack().getvalue()
    for length in (10, len(content) // 2, len(content) - 30):
        with pytest.raises(AdapterError, match=r"mine.zip: "):
            read(io.BytesIO(content[:length]))


def test_a_file_that_is_too_large_is_not_looked_into(
    pack: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pack()
    with monkeypatch.context() as small:
        small.setattr(archives, "MOST_ZIP_BYTES", len(file.getvalue()) - 1)
        with pytest.raises(AdapterError, match="bytes, at most"):
            read(file)
    monkeypatch.setattr(archives, "MOST_UNPACKED", 1000)
    with pytest.raises(AdapterError, match=r"its adapter_model.safetensors unpacks to [\d,]+ by"):
        read(file)


def test_what_is_wrong_with_the_adapter_names_no_folder_of_the_server(
    folder: Path, pack: Packed, written: Path
) -> None:
    (folder / CONFIG).write_text("[")
    with pytest.raises(AdapterError) as caught:
        read(pack())
    assert "expert 'mine': adapter_config.json is not a JSON object" in str(caught.value)
    (folder / WEIGHTS).write_bytes(b"x" * 100)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    with pytest.raises(AdapterError) as caught:
        read(pack())
    assert "adapter_model.safetensors is corrupt" in str(caught.value)
    assert str(written) not in str(caught.value)
    assert not list(written.rglob("*.*"))
