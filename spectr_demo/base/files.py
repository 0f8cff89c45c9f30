"""Files that are whole or not there: verified downloads, a lock, scratch folders, publishing.

Everything that is kept for a later start is written in a scratch folder on the same disk, and then
renamed into place. So no process ever reads half of a file, and a process that is killed leaves
only scratch behind. What is kept has its SHA-256 with it, which is checked when it is read: what a
disk or a person changed is made again, and the log says so.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
SCRATCH_PREFIX = ".unfinished-"
LEFTOVER_SECONDS = 24 * 3600


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_verified(path: Path, size: int, sha256: str) -> bool:
    """Whether the file has this size (bytes) and SHA-256 (hex)."""
    try:
        if path.stat().st_size != size:
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    if file_sha256(path) != sha256:
        logger.warning("%s has a wrong SHA-256 and is fetched again", path)
        return False
    return True


@contextmanager
def cache_lock(cache: Path) -> Iterator[None]:
    """Hold the cache folder for one process at a time.

    The folder is created if need be. Scratch folders of processes that died are deleted.
    """
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"Waiting for another process that prepares the base in {cache}", file=sys.stderr)
        lock.acquire()
    try:
        # Whoever holds the lock knows that these belong to a process that died.
        for leftover in cache.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise the error of a full disk before half of the work is done rather than after."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextmanager
def scratch_dir(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, so on its disk; gone at the end, with all that is still in it.

    What a killed process left in `folder` is deleted when it is a day old.
    """
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(OSError):  # its own process, or another one, has just deleted it
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=SCRATCH_PREFIX, dir=folder, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def publish(made: Path, target: Path) -> None:
    """Rename a finished file, or a folder, into place in one step.

    made: on the disk of `target`, as in a `scratch_dir` of its folder. Its content is written out
    before it is renamed.
    """
    for path in [made] if made.is_file() else filter(Path.is_file, made.rglob("*")):
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not outlive the content when the power goes
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, target)


def named_for(facts: Any, folder: Path, suffix: str) -> Path:
    """A file whose name covers plain values that decide what is in it."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"{name}{suffix}"


@contextmanager
def keeping(target: Path) -> Iterator[Path]:
    """The path to write a file to, which is kept when the block ends without an error: under the
    name of `target` with the file's SHA-256 in it, where `kept` finds it.

    It is for results that are made again where they cannot be read: unlike `publish` it does not
    wait for the disk, which can take longer than making them. The folder of `target` is created if
    need be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_dir(target.parent) as scratch:
        made = scratch / target.name
        yield made
        os.replace(made, target.with_suffix(f".{file_sha256(made)}{target.suffix}"))


def kept(target: Path) -> Path | None:
    """The file that was kept for `target`; None where there is none, or it was changed since."""
    for file in sorted(target.parent.glob(f"{target.stem}.*{target.suffix}")):
        with suppress(OSError):
            if file.name.split(".")[-2] == file_sha256(file):
                return file
        logger.warning("%s is damaged and is made again", file)
        with suppress(OSError):  # of another user
            file.unlink()
    return None


def keep_json(value: Any, target: Path) -> None:
    """Keep plain values, to be read by `kept_json`. Raises OSError where they cannot be written."""
    with keeping(target) as unfinished:
        unfinished.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def kept_json(target: Path) -> Any | None:
    """What `keep_json` kept; None where there is nothing, or it was changed since."""
    file = kept(target)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))
