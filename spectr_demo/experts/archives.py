"""A zip file of a stranger that should hold one adapter: looked through before anything is written.

Only the two files that are an adapter are taken out, under names of our own. So no entry can be
written elsewhere. One that would want to makes the whole file suspect, and it is refused.
"""

import io
import shutil
import stat
import tempfile
import weakref
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from spectr_demo.experts.adapters import Adapter, LoraFactors, Misfits, read_adapter
from spectr_demo.experts.hub import CONFIG_FILE, MOST_CONFIG_BYTES, WEIGHTS_FILE
from spectr_demo.experts.messages import AdapterError, first, shown

MOST_ZIP_BYTES = 200_000_000
MOST_UNPACKED = 400_000_000  # bytes of the weights
MOST_ENTRIES = 1000
MOST_RATIO = 100  # of unpacked to packed; weights have less than 3, configurations less than 20
_MOST_DIRECTORY = 1_000_000  # bytes of the list of entries, which Python reads whole
_BYTES_AT_ONCE = _MOST_DIRECTORY // 4
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_NOT_CONTENT = "__MACOSX"  # what a Mac adds
_CORRUPT = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)
_IS_ENCRYPTED = 1


class _Unpacked:
    """A folder of its own, which is deleted with this."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="spectr-"))
        self.delete = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def read_zipped(file: IO[bytes], name: str, label: str, misfits: Misfits = lambda a: ()) -> Adapter:
    """Read the adapter in a zip file, in its root or in one folder of it.

    name: of the expert. label: what messages and people call the file. misfits: see `read_adapter`.
    What was unpacked is deleted with the adapter and all that is made of it. Raises AdapterError,
    in which no path of this machine is told.
    """
    unpacked = _Unpacked()
    try:
        adapter = _read(file, unpacked.path, name, label, misfits)
    except BaseException:
        unpacked.delete()
        raise
    return replace(
        adapter,
        source=label,
        read=partial(_read_keeping, unpacked, adapter.read),
        is_lasting=False,
    )


def _read(file: IO[bytes], folder: Path, name: str, label: str, misfits: Misfits) -> Adapter:
    try:
        _unpack(file, folder)
    except _CORRUPT as error:
        problems = error.problems if isinstance(error, AdapterError) else [_corrupt(error)]
        raise AdapterError([f"{shown(label)}: {problem}" for problem in problems]) from None
    try:
        return read_adapter(folder, name, misfits)
    except AdapterError as error:
        problems = [problem.replace(f"{folder}/", "") for problem in error.problems]
        raise AdapterError([each.replace(f"{folder}", shown(label)) for each in problems]) from None


def _read_keeping(
    unpacked: _Unpacked, read: Callable[[], Mapping[str, LoraFactors]]
) -> Mapping[str, LoraFactors]:
    """unpacked: held for as long as someone may read."""
    return read()


def _corrupt(error: Exception) -> str:
    if isinstance(error, OSError):  # its words may hold a path
        return f"it cannot be unpacked ({error.strerror})"
    what = shown(error) or type(error).__name__
    return f"it is no zip file that can be read ({what}); pack it again"


class _Bounded:
    """A file of which no more is read at once than a list of entries may have: Python reads that
    list whole, of whatever size the file says."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.size = file.seek(0, io.SEEK_END)

    def read(self, size: int = -1) -> bytes:
        rest = self.size - self.tell()
        if min(rest, rest if size < 0 else size) > _MOST_DIRECTORY:
            raise AdapterError(
                [
                    f"its list of entries has more than {_MOST_DIRECTORY:,} bytes; pack the "
                    f"adapter's {CONFIG_FILE} and {WEIGHTS_FILE} alone"
                ]
            )
        return self._file.read(size)


def _unpack(file: IO[bytes], folder: Path) -> None:
    """Raises AdapterError, or one of `_CORRUPT`."""
    bounded: Any = _Bounded(file)
    if bounded.size > MOST_ZIP_BYTES:
        raise AdapterError([f"it has {bounded.size:,} bytes, at most {MOST_ZIP_BYTES:,} are read"])
    with zipfile.ZipFile(bounded) as archive:
        entries = archive.infolist()
        if problems := _faults(entries):
            raise AdapterError(problems)
        for name, entry in _adapter(entries).items():
            with archive.open(entry) as source, (folder / name).open("wb") as target:
                _copy(source, target, entry.file_size)


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """No more than was declared, and no less; Python checks the sum at the end."""
    num = 0
    while data := source.read(_BYTES_AT_ONCE):
        num += len(data)
        if num > size:
            break
        target.write(data)
    if num != size:
        raise zipfile.BadZipFile(f"an entry does not have the {size:,} bytes that it says")


def _faults(entries: Sequence[zipfile.ZipInfo]) -> list[str]:
    """What no zip file of an adapter has."""
    if len(entries) > MOST_ENTRIES:
        return [
            f"it has {len(entries):,} entries, at most {MOST_ENTRIES:,} are looked through; pack "
            f"the adapter's {CONFIG_FILE} and {WEIGHTS_FILE} alone"
        ]
    times = Counter(entry.orig_filename.casefold() for entry in entries)
    found = {
        "lie outside of it": [e for e in entries if _is_outside(e.orig_filename)],
        "are links or devices": [e for e in entries if not _is_plain(e)],
        "are encrypted": [e for e in entries if e.flag_bits & _IS_ENCRYPTED],
        "are packed in another way than deflate": [
            e for e in entries if e.compress_type not in _METHODS
        ],
        "are there twice": [e for e in entries if times[e.orig_filename.casefold()] > 1],
        f"unpack to more than {MOST_RATIO} times their size": [
            e for e in entries if e.file_size > MOST_RATIO * max(e.compress_size, 1)
        ],
    }
    return [
        f"{first([shown(repr(e.orig_filename)) for e in wrong], 'entries')}: entries that {what} "
        f"are refused; pack the adapter's folder again"
        for what, wrong in found.items()
        if wrong
    ]


def _is_outside(name: str) -> bool:
    """Whether some unpacker would put it elsewhere."""
    parts = name.replace("\\", "/").split("/")
    return name.startswith(("/", "\\")) or ".." in parts or ":" in name or not name.isprintable()


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return kind in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG)


def _adapter(entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The two files of the one adapter. Raises AdapterError where there is another number."""
    by_path = {
        path: entry
        for entry in entries
        if not entry.is_dir()
        and _NOT_CONTENT not in (path := PurePosixPath(entry.orig_filename)).parts
    }
    folders = [path.parent for path in by_path if path.name == CONFIG_FILE]
    if len(folders) != 1:
        listed = ", ".join(sorted(map(str, folders[:8])))
        raise AdapterError(
            [
                f"it holds {len(folders)} adapters ({shown(listed)}), needed one; pack the folder "
                "of one"
                if folders
                else f"it holds no {CONFIG_FILE}; pack the folder that PEFT saved"
            ]
        )
    (folder,) = folders
    found = {}
    for name, most in ((CONFIG_FILE, MOST_CONFIG_BYTES), (WEIGHTS_FILE, MOST_UNPACKED)):
        entry = by_path.get(folder / name)
        if entry is None:
            raise AdapterError(
                [
                    f"it holds no {name} beside {CONFIG_FILE}; weights are read from safetensors "
                    "alone: save the adapter again with safetensors"
                ]
            )
        if entry.file_size > most:
            raise AdapterError(
                [f"its {name} unpacks to {entry.file_size:,} bytes, at most {most:,} are taken"]
            )
        found[name] = entry
    return found
