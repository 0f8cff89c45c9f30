"""The address that a server has, and `spectr-demo serve` as a process of its own."""

import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import openai
import pytest

from spectr_demo.__main__ import main
from spectr_demo.serving import bound

ROOT = Path(__file__).parents[2]


def test_an_address_is_had_before_anyone_can_connect() -> None:
    with bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        first.listen()
        with pytest.raises(ValueError, match=rf"cannot have \S+ port {port} .* --port"):
            bound("127.0.0.1", port)
    with pytest.raises(ValueError, match="port 70000"):
        bound("127.0.0.1", 70000)
    with pytest.raises(ValueError, match="nowhere"):
        bound("nowhere.invalid", 0)


def test_an_address_in_use_is_known_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--base", "/nowhere", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectr-demo serve: the server cannot have 127.0.0.1 port")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(
    base_folder: str, expert_folders: list[str]
) -> None:
    command = [sys.executable, "-m", "spectr_demo", "serve", "--port", "0", "--base", base_folder]
    # Shells have what they run in the background ignore the interrupt, and tests may run there.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*command, "--experts", *expert_folders],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed,
    ) as server:
        assert server.stderr is not None
        found = None
        while found is None:
            line = server.stderr.readline()
            assert line, "the server ended"
            found = re.search(r"API is at (http://127.0.0.1:\d+/v1)$", line.strip())
        client = openai.OpenAI(base_url=found[1], api_key="none", max_retries=5)
        assert "single:green" in [model.id for model in client.models.list()]
        chunks = client.chat.completions.create(
            model="single:green",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=4,
            stream=True,
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130
        assert server.stderr.read().strip() == "spectr-demo: stopped"
