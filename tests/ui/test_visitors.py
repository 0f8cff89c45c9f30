"""Many visitors, some of whom leave, and some who send what nobody foresaw."""

import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import anyio
import gradio as gr
import httpx
import pytest
from gradio_client import Client
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from spectr_demo import ui
from spectr_demo.engine import batch
from spectr_demo.engine.model import SpectrModel
from spectr_demo.engine.run import ColumnOutput, Step
from spectr_demo.ui.line import PLACES_EACH

Serve = Callable[[gr.Blocks], str]
PATIENCE = 20.0
TOKEN = 0.2  # seconds: longer than it takes a server to learn that a client is gone
MARK = "zebra"  # of what must not come back, nor stand in the log


class Endless:
    """In the place of the model: runs that go on, a token every `TOKEN` seconds, and are
    counted."""

    def __init__(self) -> None:
        self.num_tokens: list[int] = []  # of each run
        self.running = self.most_running = 0
        self.pace = threading.Event()  # never set: waiting for it is the time a token takes

    def gpu(self, duration: Any) -> Callable[[Any], Any]:
        return lambda steps: self.steps

    def steps(self, prompt: str, routers: Any, settings: Any) -> Generator[Step, None, None]:
        run = len(self.num_tokens)
        self.num_tokens.append(0)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            while True:
                self.num_tokens[run] += 1
                column = ColumnOutput(
                    label="base",
                    text="x" * self.num_tokens[run],
                    num_settled=0,
                    num_tokens=self.num_tokens[run],
                    is_finished=False,
                    tokens_per_second=0.0,
                )
                yield Step(columns=(column,) * len(routers))
                self.pace.wait(TOKEN)
        finally:
            self.running -= 1

    def goes_on(self, num: int = 1) -> None:
        """Wait until so many runs have begun, and the last has made a token or two."""
        until(lambda: len(self.num_tokens) == num and self.num_tokens[-1] >= 2)

    def ends_within_two_tokens(self) -> None:
        """Of now, when the last client left."""
        num = self.num_tokens[-1]
        until(lambda: self.running == 0)
        assert self.num_tokens[-1] <= num + 2


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture
def endless() -> Endless:
    return Endless()


@pytest.fixture
def page(routed_model: SpectrModel, endless: Endless, monkeypatch: pytest.MonkeyPatch) -> gr.Blocks:
    monkeypatch.setattr(batch, "MOST_RUNS", 1)
    return ui.build(routed_model, gpu=endless.gpu)


@pytest.fixture
def url(page: gr.Blocks, serve: Serve) -> str:
    return serve(page) + "gradio_api/"


def pressed(page: gr.Blocks, session: str) -> dict[str, Any]:
    """What a browser sends when Run is pressed."""
    run = next(fn for fn in page.fns.values() if fn.name == "run")
    data = ["hello" if c.elem_id == "prompt" else c.value for c in run.inputs[1:]]  # type: ignore[attr-defined]
    return {"fn_index": run._id, "session_hash": session, "data": [None, *data]}


def events(url: str) -> Iterator[Any]:
    """What a server sends, until the reader has enough."""
    with httpx.stream("GET", url, timeout=PATIENCE) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def watch(url: str, page: gr.Blocks, session: str) -> Iterator[Any]:
    """Press Run, and read what comes."""
    httpx.post(f"{url}queue/join", json=pressed(page, session)).raise_for_status()
    return events(f"{url}queue/data?session_hash={session}")


def test_a_visitor_who_leaves_the_page_ends_the_run(
    page: gr.Blocks, url: str, endless: Endless
) -> None:
    sent = watch(url, page, "one")
    next(sent)
    endless.goes_on()
    sent.close()  # type: ignore[attr-defined]
    endless.ends_within_two_tokens()


def test_a_program_that_leaves_ends_its_run(url: str, endless: Endless) -> None:
    body = {"data": ["hello", ["base", "spectr"], 500, 0, 0]}
    event = httpx.post(f"{url}call/compare", json=body).json()["event_id"]
    sent = events(f"{url}call/compare/{event}")
    texts: list[str] = []
    while "xxx" not in texts:  # the answers grow as they come
        (answers,) = next(sent)
        texts = [answer["text"] for answer in answers]
    endless.goes_on()
    sent.close()  # type: ignore[attr-defined]
    endless.ends_within_two_tokens()


def test_a_program_that_cancels_ends_its_run(url: str, endless: Endless) -> None:
    client = Client(url.removesuffix("gradio_api/"), verbose=False)
    for num in range(1, 6):
        job = client.submit("hello", ["base"], 500, api_name="/compare")
        endless.goes_on(num)
        job.cancel()
        endless.ends_within_two_tokens()
    assert endless.most_running == 1


def test_an_mcp_client_that_leaves_ends_its_run(url: str, endless: Endless) -> None:
    async def use() -> None:
        async with (
            streamable_http_client(f"{url}mcp/") as (read, write, *_),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            arguments = {"prompt": "hello", "columns": ["base"], "max_new_tokens": 500}
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(session.call_tool, "compare", arguments)
                await anyio.to_thread.run_sync(endless.goes_on)
                tasks.cancel_scope.cancel()
        # The connection is closed with the session.

    anyio.run(use)
    endless.ends_within_two_tokens()


def test_who_waits_sees_the_place_and_can_leave_it(
    page: gr.Blocks, url: str, endless: Endless
) -> None:
    first = watch(url, page, "one")
    next(first)
    endless.goes_on()
    second, third = (watch(url, page, session) for session in ("two", "three"))
    for sent, place in ((second, 2), (third, 3)):
        assert any(f"number {place} in line" in json.dumps(message) for message in sent)
    second.close()  # type: ignore[attr-defined]
    assert any("number 2 in line" in json.dumps(message) for message in third)
    first.close()  # type: ignore[attr-defined]
    endless.goes_on(2)
    third.close()  # type: ignore[attr-defined]
    until(lambda: endless.running == 0)
    assert len(endless.num_tokens) == 2  # the second never ran
    assert endless.most_running == 1


def test_one_visitor_cannot_hold_all_places(url: str, endless: Endless) -> None:
    src = url.removesuffix("gradio_api/")
    greedy, other = (Client(src, verbose=False) for _ in range(2))
    jobs = [greedy.submit("hello", ["base"], 500, api_name="/compare") for _ in range(25)]
    endless.goes_on()
    until(lambda: sum(job.done() for job in jobs) == 25 - PLACES_EACH)
    for job in jobs:
        if job.done():
            assert "3 runs of yours wait or go on" in str(job.exception())
    job = other.submit("hello", ["base"], 500, api_name="/compare")
    for each in jobs:
        each.cancel()
    endless.goes_on(2)
    assert not job.done()
    job.cancel()
    until(lambda: endless.running == 0)


def test_without_a_session_a_visitor_is_an_address(url: str, endless: Endless) -> None:
    """The proxy's of a Space is that of all; it says whose request it hands on."""

    def call(address: str) -> str:
        headers = {"x-forwarded-for": f"{address}, 10.0.0.1"}
        body = {"data": ["hello", ["base"], 500, 0, 0]}
        posted = httpx.post(f"{url}call/compare", json=body, headers=headers)
        return f"{url}call/compare/{posted.json()['event_id']}"

    held = [events(call("1.2.3.4")) for _ in range(PLACES_EACH)]
    for sent in held:
        next(sent)
    assert "3 runs of yours" in list(events(call("1.2.3.4")))[-1]["error"]
    other = events(call("5.6.7.8"))
    assert isinstance(next(other), list)
    for sent in (*held, other):
        sent.close()  # type: ignore[attr-defined]
    until(lambda: endless.running == 0)


# Requests that are wrong


def answer(url: str, name: str, data: list[Any]) -> str:
    """The last event of a call, over plain HTTP."""
    event = httpx.post(f"{url}call/{name}", json={"data": data}).json()["event_id"]
    response = httpx.get(f"{url}call/{name}/{event}", timeout=PATIENCE)
    return response.text.strip().rpartition("\n\n")[2]


FORGED = f"{MARK}\n\x1b[31mERROR: forged" * 20
LONG = MARK * 200_000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([5, ["base"], 8, 0, 0], "prompt is 5: Input should be a valid string"),
        ([FORGED, ["base"], "8", 0, 0], "max_new_tokens is '8': Input should be a valid integer"),
        ([FORGED, ["base"], True, 0, 0], "max_new_tokens is True"),
        ([FORGED, ["base"], 8, "hot", 0], "temperature is 'hot': Input should be a valid number"),
        ([FORGED, ["base"], 8, 1e-40, 0], "temperature is 1e-40; it must be 0 (greedy) or from"),
        ([FORGED, ["base"], 8, 0, 2**64], "seed is 18446744073709551616; it must be a whole"),
        ([FORGED, ["base"], 8, 0, 1e300], "seed is 1e+300: Input should be a valid integer"),
        ([FORGED, FORGED, 8, 0, 0], "Input should be a valid list"),
        ([FORGED, [7], 8, 0, 0], "columns.0 is 7: Input should be a valid string"),
        ([FORGED, [LONG], 8, 0, 0], "unknown router"),
        ([FORGED, ["base"], LONG, 0, 0], "max_new_tokens is"),
        ([LONG, ["base"], 8, 0, 0], "the prompt has 1,000,000 characters"),
        ([{"path": LONG}, ["base"], 8, 0, 0], "Input should be a valid string"),
        ([], "compare takes 5 values, in order; it was given 0"),
        ([FORGED], "compare takes 5 values, in order; it was given 1"),
        ([None] * 5, "prompt is None: Input should be a valid string; columns is None"),
    ],
)
def test_what_is_wrong_with_a_call_is_one_short_message(
    url: str, endless: Endless, data: list[Any], message: str, capfd: Any, caplog: Any
) -> None:
    said = answer(url, "compare", data)
    assert said.startswith("event: error")
    error = json.loads(said.partition("data: ")[2])["error"]
    assert message in error
    assert "\n" not in error
    assert len(error) < 2500
    assert not endless.num_tokens
    assert_log_is_clean(capfd, caplog)


def assert_log_is_clean(capfd: Any, caplog: Any, num_requests: int = 1) -> None:
    said = "".join([*capfd.readouterr(), caplog.text])
    assert MARK not in said
    assert "Traceback" not in said
    assert len(said) < 5000 * num_requests


def test_a_form_that_no_page_sends_is_one_short_message(
    page: gr.Blocks, url: str, capfd: Any, caplog: Any
) -> None:
    good, num = pressed(page, "")["data"], 0
    for number in range(2, len(good)):
        for bad in ({"a": FORGED}, FORGED, LONG, [FORGED]):
            session = f"{number}-{len(str(bad))}"
            body = pressed(page, session) | {"data": [*good[:number], bad, *good[number + 1 :]]}
            httpx.post(f"{url}queue/join", json=body).raise_for_status()
            sent = list(events(f"{url}queue/data?session_hash={session}"))
            assert len(json.dumps(sent)) < 20_000
            (ended,) = [m for m in sent if m["msg"] == "process_completed"]
            is_told = "notice" in json.dumps(ended["output"]) or ended["output"].get("error")
            assert is_told, (number, bad)
            num += 1
    assert_log_is_clean(capfd, caplog, num)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", "call/compare", {"json": {"data": LONG}}, 422, "valid list"),
        ("POST", "call/compare", {"json": {"dat": FORGED}}, 422, "Field required"),
        ("POST", "call/compare", {"content": "{" + FORGED}, 422, "valid dictionary"),
        ("POST", "call/compare", {"content": "[" * 100_000}, 422, "valid dictionary"),
        ("POST", "call/compare", {"json": {"data": ["x" * 50_000_000]}}, 413, "more than"),
        ("POST", "call/" + MARK, {"json": {"data": []}}, 400, "cannot be read"),
        ("POST", "call/v2/" + MARK, {"json": {}}, 400, "cannot be read"),
        ("POST", "call/v2/compare", {"json": {"prompt": FORGED}}, 400, "columns"),
        ("POST", "call/v2/compare", {"json": {MARK: 1}}, 400, "cannot be read"),
        ("POST", "queue/join", {"json": {"fn_index": 9999, "data": [FORGED]}}, 400, "Session"),
        ("POST", "run/compare", {"json": {"data": [MARK, ["base"], 8, 0, 0]}}, 404, "queue"),
        ("POST", "upload", {"files": {"files": ("a.txt", MARK.encode())}}, 404, "nothing is"),
        ("POST", "upload/", {"files": {"files": ("a.txt", MARK.encode())}}, 404, "nothing is"),
        ("POST", "process_recording", {"files": {"video": ("a", b"")}}, 404, "nothing is"),
        ("GET", "../monitoring", {}, 404, "nothing is"),
        ("GET", "../monitoring/summary", {}, 404, "nothing is"),
        ("GET", "../monitoring/key", {}, 403, "not enabled"),
    ],
)
def test_what_is_no_call_is_answered_in_short(
    url: str,
    method: str,
    path: str,
    body: dict[str, Any],
    status: int,
    message: str,
    capfd: Any,
    caplog: Any,
) -> None:
    response = httpx.request(method, url + path, **body)
    assert response.status_code == status, response.text[:200]
    assert message in response.text
    assert len(response.text) < 1000
    assert "/tmp" not in response.text
    assert_log_is_clean(capfd, caplog)


def test_a_body_without_a_length_is_bounded_too(url: str) -> None:
    pieces = (b"x" * 1_000_000 for _ in range(ui.page.MAX_BODY // 1_000_000 + 2))
    response = httpx.post(f"{url}call/compare", content=pieces)
    assert response.status_code == 413
    assert f"more than {ui.page.MAX_BODY:,} bytes" in response.text


def test_a_fault_of_a_run_is_logged_without_its_words(
    page: gr.Blocks, url: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError(FORGED)

    monkeypatch.setattr("spectr_demo.ui.endpoint.frames", broken)
    said = answer(url, "compare", ["hello", ["base"], 8, 0, 0])
    assert "the run broke off (RuntimeError: zebra" in said
    assert "a call of an endpoint failed: RuntimeError" in caplog.text
    assert "in broken" in caplog.text
    assert MARK not in caplog.text
    with caplog.at_level(logging.DEBUG, logger="spectr_demo.ui.endpoint"):
        answer(url, "compare", ["hello", ["base"], 8, 0, 0])
    assert MARK in caplog.text
    assert "\x1b" not in caplog.text
