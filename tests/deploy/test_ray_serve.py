"""`deploy/ray_serve.py` as a process of its own, with the page and the API."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import openai
import pytest
from gradio_client import Client

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_serves_page_and_api_until_it_is_told_to_end(
    base_folder: str, expert_folders: list[str]
) -> None:
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    command = [sys.executable, "deploy/ray_serve.py", "--port", "0", "--base", base_folder]
    with subprocess.Popen(
        [*command, "--experts", *expert_folders, "--replicas", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        # Shells have what they run in the background ignore the interrupt, and tests may run there.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as server:
        try:
            assert server.stdout is not None
            said = ""
            while not (api := re.search(r"API is at (\S+)", said)):
                line = server.stdout.readline()
                assert line, "the server ended"
                said += line
            page = re.search(r"local URL: +(\S+)", said)
            assert page is not None
            client = openai.OpenAI(base_url=api[1], api_key="none")
            answer = client.chat.completions.create(
                model="single:green", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            assert answer.usage is not None and answer.usage.completion_tokens == 4
            compared = Client(page[1], verbose=False).predict(
                "Hello", ["base", "single:green"], 4, api_name="/compare"
            )
            assert [column["label"] for column in compared] == ["base", "single:green"]
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
        finally:
            server.kill()
