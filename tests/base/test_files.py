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
    keep_json,
    keeping,
    kept,
    kept_json,
    publish,
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


def test_a_file_that_was_changed_in_place_is_not_verified(file: Path) -> None:
    """... though its size and its times are the same."""
    stat = file.stat()
    assert is_verified(file, len(CONTENT), SHA256)
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not is_verified(file, len(CONTENT), SHA256)


def test_values_are_kept_with_their_digest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "kept" / "values.json"
    assert kept_json(target) is None
    keep_json(["é", 1.5, None], target)
    assert kept_json(target) == ["é", 1.5, None]
    (file,) = target.parent.iterdir()
    sound = file.read_bytes()
    changed = [sound[:i] + bytes([sound[i] ^ 2]) + sound[i + 1 :] for i in range(len(sound))]
    for content in [*changed, b"", sound[:-1], sound + b" ", b'["another"]']:
        file.write_bytes(content)
        caplog.clear()
        assert kept_json(target) is None
        assert caplog.messages == [f"{file} is damaged and is made again"]
        assert not file.exists()
    keep_json("again", target)
    keep_json("other", target.with_name("values-2.json"))
    assert kept_json(target) == "again"


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
    with keeping(target) as unfinished:
        unfinished.write_bytes(CONTENT)
        assert unfinished.name == target.name
        assert kept(target) is None
    file = kept(target)
    assert file is not None
    assert file.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [file]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with keeping(target) as unfinished:
        unfinished.write_bytes(CONTENT)

    def interrupted() -> None:
        with keeping(target) as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    file = kept(target)
    assert file is not None
    assert file.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [file]


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
