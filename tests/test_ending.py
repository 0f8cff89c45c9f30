"""How the app ends: SIGTERM ends it also where it is a container's first process."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.space_check import is_served

ROOT = Path(__file__).parent.parent
UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def first_process() -> list[str]:
    """What starts a command as process 1; skipped where that is not allowed."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"]).returncode:
        pytest.skip("no process namespace can be made here")
    return UNSHARE


def child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(children.read_text().split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("is_early", [False, True])
def test_process_1_ends_at_sigterm(
    first_process: list[str], base_folder: str, expert_folders: list[str], is_early: bool
) -> None:
    port = free_port()
    app = [sys.executable, "app.py", "--base", base_folder, "--experts", expert_folders[0]]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
    with subprocess.Popen(
        [*first_process, *app], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 240
        while not (is_early or is_served(port)) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.2)
        while is_early and not handles(process.pid, signal.SIGTERM):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(child_of(process.pid), signal.SIGTERM)
        begin = time.monotonic()
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 0, complaint
    assert time.monotonic() - begin < 15
    assert "Traceback" not in complaint


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether the child of a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{child_of(pid)}/status").read_text()
    except (OSError, IndexError):
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
