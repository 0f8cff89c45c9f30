"""Files that are whole or not there: verified downloads, a lock, scratch folders, publishing.

Everything that is kept for a later start is written in a scratch folder on the same disk, and then
renamed into place. So no process ever reads half of a file, and a process that is killed leaves
only scratch behind. The marker of a verified file is the exception: half of one counts as none.
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

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
SCRATCH_PREFIX = ".unfinished-"
LEFTOVER_SECONDS = 24 * 3600


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_verified(path: Path, size: int, sha256: str) -> bool:
    """Whether the file has this size (bytes) and SHA-256 (hex).

    A file that passed gets a marker beside it, with its hash, size and modification time. It is
    hashed again only when one of these changes: a start then reads a few bytes instead of 98 MB.
    """
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if stat.st_size != size:
        return False
    marker = path.with_name(path.name + ".verified")
    state = json.dumps({"sha256": sha256, "size": size, "mtime_ns": stat.st_mtime_ns})
    with suppress(OSError, UnicodeDecodeError):
        if marker.read_text(encoding="utf-8") == state:
            return True
    if file_sha256(path) != sha256:
        logger.warning("%s has a wrong SHA-256 and is fetched again", path)
        return False
    with suppress(OSError):  # a read-only cache works too, and is hashed at each start
        marker.write_text(state, encoding="utf-8")
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
    """Rename a finished file, or a folder of files, into place in one step.

    made: on the disk of `target`, as in a `scratch_dir` of its folder. Its content is written out
    before it is renamed.
    """
    for path in [made] if made.is_file() else made.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not outlive the content when the power goes
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, target)


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """The path to write a file to, which becomes `target` when the block ends without an error.

    It is for results that are made again where they cannot be read: unlike `publish` it does not
    wait for the disk, which can take longer than making them. The folder of `target` is created if
    need be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_dir(target.parent) as scratch:
        yield scratch / target.name
        os.replace(scratch / target.name, target)
