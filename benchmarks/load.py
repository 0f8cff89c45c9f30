"""Many clients at once, at `spectr-demo serve` and at the page's endpoint, on the embedded default.

    python benchmarks/load.py [--quick] [--json FILE]

Each client sends a request as soon as it has the answer to the one before: at most 32 tokens by
`spectr-context`, streamed. The server is a process of its own. Runs go one at a time, so more
clients wait longer, and get no more tokens a second. `first_p50_s` and `first_p99_s`: from sending
a request to its first text, time in line included. `answer_p50_s`: to its end. `refused`: requests
that found no place in the line; a client sends such a one again after a second.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.common import PROMPT, arguments, report
from spectr_demo.base.loading import load_base
from spectr_demo.config import DEFAULT_ROUTER

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = 32
PATIENCE = 600  # seconds

# The texts of an answer as they come, and its number of tokens at the end.
Answer = AsyncGenerator[tuple[str, int], None]
Ask = Callable[[httpx.AsyncClient, str], Answer]  # of a client with a session of its own


class RefusedError(Exception):
    """There is no place in the line."""


@dataclass
class Measured:
    """Seconds of each answer, and tokens of all."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_refused: int = 0


async def from_serve(client: httpx.AsyncClient, session: str) -> Answer:
    body = {
        "model": DEFAULT_ROUTER,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": NUM_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code == 429:
            raise RefusedError
        response.raise_for_status()
        async for data in _events(response):
            chunk = json.loads(data) if data != "[DONE]" else {"choices": []}
            text = "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            yield text, (chunk.get("usage") or {}).get("completion_tokens", 0)


async def from_page(client: httpx.AsyncClient, session: str) -> Answer:
    asked = [PROMPT, [DEFAULT_ROUTER], NUM_TOKENS, 0, 0]
    body = {"data": asked, "session_hash": session}
    joined = await client.post("/gradio_api/call/compare", json=body)
    if joined.status_code == 503:
        raise RefusedError
    joined.raise_for_status()
    path = f"/gradio_api/call/compare/{joined.json()['event_id']}"
    num_tokens = 0
    async with client.stream("GET", path) as response:
        async for data in _events(response):
            if isinstance(found := json.loads(data), dict):  # an error, which says why
                if "wait for the model" in found["error"]:
                    raise RefusedError
                raise RuntimeError(found["error"])
            if found:
                (answer,) = found[0]
                num_tokens = answer["num_tokens"]
                yield answer["text"], 0
    yield "", num_tokens


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def visit(
    client: httpx.AsyncClient, ask: Ask, session: str, num_requests: int, measured: Measured
) -> None:
    """One client's requests, one after the other."""
    for _ in range(num_requests):
        began, first = time.perf_counter(), 0.0
        while not first:
            try:
                async with aclosing(ask(client, session)) as answer:
                    async for text, num_tokens in answer:
                        first = first or (time.perf_counter() if text else 0.0)
                        measured.num_tokens += num_tokens
            except RefusedError:
                measured.num_refused += 1
                await asyncio.sleep(1)
        measured.first.append(first - began)
        measured.whole.append(time.perf_counter() - began)


async def load(address: str, ask: Ask, num_clients: int, num_requests: int) -> dict[str, Any]:
    measured = Measured()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for number in range(num_clients):
                clients.create_task(visit(client, ask, f"client-{number}", num_requests, measured))
        seconds = time.perf_counter() - began
    return {
        "clients": num_clients,
        "requests": len(measured.whole),
        "requests_per_s": len(measured.whole) / seconds,
        "tokens_per_s": measured.num_tokens / seconds,
        "first_p50_s": float(np.percentile(measured.first, 50)),
        "first_p99_s": float(np.percentile(measured.first, 99)),
        "answer_p50_s": float(np.percentile(measured.whole, 50)),
        "refused": measured.num_refused,
    }


@asynccontextmanager
async def served(*command: str) -> AsyncIterator[str]:
    """The address of a server that runs while this is open, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, *(part.replace("PORT", port) for part in command)],
        cwd=ROOT,
        env={**os.environ, "GRADIO_SERVER_PORT": port},
        stdout=subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
            while True:
                if server.poll() is not None:
                    raise RuntimeError(f"{command} ended with exit code {server.returncode}")
                try:
                    await client.get("/")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait()


DOORS = {
    "serve": (from_serve, ("-m", "spectr_demo", "serve", "--port", "PORT")),
    "page": (from_page, ("app.py",)),
}


async def measure(is_quick: bool) -> list[dict[str, Any]]:
    num_requests = 2 if is_quick else 4
    rows = []
    for door, (ask, command) in DOORS.items():
        async with served(*command) as address:
            await load(address, ask, 1, 1)  # what a first run compiles and measures
            for num_clients in (1, 4) if is_quick else (1, 10, 50):
                num = 4 * num_requests if num_clients == 1 else num_requests
                rows.append({"door": door, **await load(address, ask, num_clients, num)})
    return rows


def main() -> None:
    options = arguments(__doc__)
    rows = asyncio.run(measure(options.quick))
    report("python benchmarks/load.py", rows, options.json, load_base(None))


if __name__ == "__main__":
    main()
