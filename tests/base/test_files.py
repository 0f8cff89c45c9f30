"""Files that are whole or not there: verified, locked, written in scratch, renamed into place."""

import errno
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from spectr_demo.base import files
from spectr_demo.base.files import (
    SCRATCH_PREFIX,
    cache_lock,
    check_space,
    file_sha256,
    is_verified,
    publish,
    published,
    scratch_dir,
)

CONTENT = b"content"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_a_hash_is_that_of_the_content(file: Path) -> None:
    assert file_sha256(file) == SHA256


def test_a_file_is_verified_by_its_size_and_its_hash(file: Path) -> None:
    assert is_verified(file, len(CONTENT), SHA256)
    assert not is_verified(file, len(CONTENT) + 1, SHA256)
    assert not is_verified(file, len(CONTENT), hashlib.sha256(b"another").hexdigest())
    assert not is_verified(file.with_name("none"), len(CONTENT), SHA256)
    assert not is_verified(file / "below", len(CONTENT), SHA256)


def test_a_verified_file_is_hashed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_verified(file, len(CONTENT), SHA256)
    hashed: list[Path] = []
    monkeypatch.setattr(files, "file_sha256", lambda path: hashed.append(path) or SHA256)
    assert is_verified(file, len(CONTENT), SHA256)
    assert hashed == []
    os.utime(file, ns=(0, 0))
    assert is_verified(file, len(CONTENT), SHA256)
    assert hashed == [file]


def test_the_lock_drops_what_a_dead_process_left(tmp_path: Path) -> None:
    dead = tmp_path / "cache" / f"{SCRATCH_PREFIX}dead"
    dead.mkdir(parents=True)
    kept = tmp_path / "cache" / "kept"
    kept.mkdir()
    with cache_lock(tmp_path / "cache"):
        assert not dead.exists()
        assert kept.exists()


def test_scratch_is_on_the_folders_disk_and_goes(tmp_path: Path) -> None:
    with scratch_dir(tmp_path) as scratch:
        assert scratch.parent == tmp_path
        (scratch / "half").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_published_folder_takes_its_place(tmp_path: Path) -> None:
    with scratch_dir(tmp_path) as scratch:
        (scratch / "made").mkdir()
        (scratch / "made" / "file").write_bytes(CONTENT)
        publish(scratch / "made", tmp_path / "kept" / "folder")
    assert (tmp_path / "kept" / "folder" / "file").read_bytes() == CONTENT


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with published(target) as unfinished:
        unfinished.write_bytes(CONTENT)
        assert unfinished.name == target.name
        assert not target.exists()
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(file: Path) -> None:
    def interrupted() -> None:
        with published(file) as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_bytes() == CONTENT
    assert list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check_space(tmp_path, 1000)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        check_space(tmp_path, 1001)


def test_old_leftovers_are_deleted_and_new_ones_stay(tmp_path: Path) -> None:
    """A new one may belong to a process that is at work."""
    old, new = (tmp_path / f"{files.SCRATCH_PREFIX}{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir()
        (folder / "half").touch()
    long_ago = time.time() - 2 * files.LEFTOVER_SECONDS
    os.utime(old, (long_ago, long_ago))
    with files.scratch_dir(tmp_path):
        assert not old.exists() and new.exists()
