"""The README's code is run as it stands: its Python blocks in order, and its commands."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from spectr_demo.__main__ import main

README = (Path(__file__).parent.parent / "README.md").read_text()
pytestmark = [pytest.mark.embedded, pytest.mark.slow]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[list[str]]:
    """Arguments of every `python -m spectr_demo`, but of those that take many minutes or never end
    by themselves."""
    lines = "".join(blocks("console")).splitlines()
    found = [shlex.split(line)[3:] for line in lines if line.startswith("python -m spectr_demo ")]
    return [command for command in found if command[0] not in ("train", "evaluate", "serve")]


def test_python_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    lines = capsys.readouterr().out.strip().splitlines()
    (shares,) = (number for number, line in enumerate(lines) if line.startswith("{"))
    assert "'cron'" in lines[shares]
    assert lines[:shares], "the answer"
    assert lines[shares + 1 :], "the one without the expert"
    assert "<svg" in (tmp_path / "routing.html").read_text()


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_commands(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")
def test_the_server_and_its_two_requests() -> None:
    (block,) = (block for block in blocks("console") if "spectr_demo serve" in block)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    serve, *requests = [shlex.split(line.replace("8000", port)) for line in block.splitlines()]
    command = [sys.executable, *serve[1:], "--port", port]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as server:
        try:
            patience = ["--silent", "--show-error", "--retry", "240", "--retry-delay", "1"]
            models, answer = (
                json.loads(
                    subprocess.check_output([*request, *patience, "--retry-connrefused"], text=True)
                )
                for request in requests
            )
        finally:
            server.terminate()
    assert {"spectr-context", "single:sql"} <= {model["id"] for model in models["data"]}
    assert answer["choices"][0]["message"]["content"] == "30 2 * * 1"


def test_the_two_commands_name_files_that_exist() -> None:
    install, test = blocks("console")[:2]
    for line in (install, test):
        for name in re.findall(r"-r (\S+)|(app\.py)", line):
            assert (Path(__file__).parent.parent / "".join(name)).is_file()
