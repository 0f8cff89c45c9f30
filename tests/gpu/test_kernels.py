"""The kernels, as a compiler reads them; what they compute is in `test_operators.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux alone")
def test_they_compile_without_a_gpu(tmp_path: Path) -> None:
    """In a process of its own: here, Triton interprets."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-m", "tests.gpu.compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} == {"add_chosen", "weigh", "project_kept"}
    # Of three layers, too, B is read 16 bytes at a time.
    assert "v4" in next(line for line in lines if line[:2] == ["add_chosen", "bfloat16"])
