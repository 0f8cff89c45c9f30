"""The API as OpenAI's own client sees it."""

import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from spectr_demo import serving
from spectr_demo.engine import batch
from spectr_demo.engine import run as engine_run
from spectr_demo.engine.model import SpectrModel
from spectr_demo.routing.routers import ROUTERS
from spectr_demo.web import MAX_BODY
from tests.conftest import wait_until
from tests.serving.conftest import ServeModel
from tests.test_metrics import scraped

HELLO = [{"role": "user", "content": "hello"}]


def answer(client: openai.OpenAI, **settings: Any) -> Any:
    settings = {"model": "single:red", "messages": HELLO, "max_tokens": 12} | settings
    return client.chat.completions.create(**settings)


def test_the_models_are_the_routers(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [*(key for key in ROUTERS if key != "single"), *EXPERTS]
    assert client.models.retrieve("single:red").owned_by == "spectr-demo"
    for name in names:
        assert answer(client, model=name, max_tokens=2).model == name
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-4o'"):
        client.models.retrieve("gpt-4o")


EXPERTS = ["single:red", "single:green", "single:blue"]


def test_what_the_default_router_needs_is_read_before_the_first_request(
    client: openai.OpenAI, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_late(reader: object) -> None:
        raise RuntimeError("ordinary text is read while a client waits")

    monkeypatch.setattr(type(routed_model.reader), "_measure", measured_late)
    assert answer(client, model="spectr-context").choices[0].message.content


def test_a_base_alone_is_the_one_model(serve_model: ServeModel, build_model: Any) -> None:
    client = serve_model(build_model([]))
    assert [model.id for model in client.models.list()] == ["base"]
    assert answer(client, model="base").choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError, match="load at least one"):
        answer(client, model="spectr")


def test_the_answer_is_the_engines(client: openai.OpenAI, routed_model: SpectrModel) -> None:
    for name in ("spectr", "single:red", "spectr-context"):
        expected = routed_model.compare("hello", [name], record=False, max_new_tokens=12).columns[0]
        got = answer(client, model=name)
        assert got.object == "chat.completion"
        assert got.choices[0].message.role == "assistant"
        assert got.choices[0].message.content == expected.text
        assert got.usage.completion_tokens == expected.num_tokens
        assert got.usage.prompt_tokens == len(routed_model.encode("hello"))
        assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_a_chat_of_several_turns(client: openai.OpenAI, routed_model: SpectrModel) -> None:
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    expected = routed_model.generate(chat, "spectr", max_new_tokens=12)
    assert answer(client, model="spectr", messages=chat).choices[0].message.content == expected
    chat[0] |= {"role": "developer"}
    chat[1] |= {"content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}
    got = answer(client, model="spectr", messages=chat)
    chat[0] |= {"role": "system"}
    chat[1] |= {"content": "hel\nlo"}
    assert got.choices[0].message.content == routed_model.generate(
        chat, "spectr", max_new_tokens=12
    )


def test_a_stream_is_the_same_answer_token_by_token(client: openai.OpenAI) -> None:
    whole = answer(client, model="spectr")
    chunks = list(answer(client, model="spectr", stream=True, stream_options=WITH_USAGE))
    *written, usage = chunks
    assert written[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in written if chunk.choices[0].delta.content]
    assert len(texts) > 3
    assert "".join(texts) == whole.choices[0].message.content
    endings = [chunk.choices[0].finish_reason for chunk in written]
    assert endings == [None] * (len(written) - 1) + ["length"]
    assert usage.choices == []
    assert usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"spectr"}
    assert all(chunk.usage is None for chunk in answer(client, stream=True))


WITH_USAGE = {"include_usage": True}


def test_settings_are_the_engines(client: openai.OpenAI, routed_model: SpectrModel) -> None:
    def text(**settings: Any) -> str:
        return str(answer(client, **settings).choices[0].message.content)

    settings: dict[str, Any] = {"temperature": 1.3, "top_p": 0.6, "seed": 4}
    expected = routed_model.generate("hello", "single:red", max_new_tokens=12, **settings)
    assert text(**settings) == expected
    assert text(**settings | {"seed": 5}) != expected
    assert text(**settings | {"top_p": 1}) != expected
    assert text(temperature=1) != text(temperature=1)  # without a seed, each has its own
    assert text() == text(temperature=0, n=1, user="me", tools=[], logprobs=False)
    more = text(max_tokens=None, max_completion_tokens=20)
    assert more == routed_model.generate("hello", "single:red", max_new_tokens=20)


def test_a_stop_text_ends_the_answer(client: openai.OpenAI) -> None:
    whole = answer(client).choices[0].message.content
    stop = whole[4:7]
    assert stop not in whole[:6]
    got = answer(client, stop=stop)
    assert got.choices[0].message.content == whole[:4]
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens < 12
    streamed = list(answer(client, stop=["never", stop], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole[:4]
    assert streamed[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "message", "param"),
    [
        ({"model": "spektr"}, "Did you mean 'spectr'", "model"),
        ({"model": "single:rad"}, "Did you mean 'red'", "model"),
        ({"model": "single"}, "write 'single:NAME'", "model"),
        ({"messages": []}, "the prompt is empty", "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts of type image_url; only text is read",
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "takes 511 together", "messages"),
        ({"max_tokens": 500}, "max_tokens is 500; tiny takes 511 together", "messages"),
        ({"max_tokens": 0}, "max_tokens is 0", None),
        ({"max_tokens": 3.5}, "max_tokens", "max_tokens"),
        ({"max_completion_tokens": 3}, "give one of them", "max_tokens"),
        ({"temperature": -1}, "temperature is -1.0", None),
        ({"temperature": "hot"}, "temperature", "temperature"),
        ({"seed": -1}, "seed is -1", None),
        ({"top_p": 0}, "top_p is 0", None),
        ({"stop": ["a"] * 5}, "stop: ", "stop"),
        ({"stop": ""}, "stop.0: ", "stop"),
        ({"n": 2}, "cannot follow n;", "n"),
        (
            {"logprobs": True, "top_logprobs": 3},
            "cannot follow logprobs, top_logprobs;",
            "logprobs",
        ),
        ({"extra_body": {"top_k": 3, "min_p": 0.1}}, "unknown parameters: top_k, min_p;", "top_k"),
        ({"stream": "maybe"}, "stream: ", "stream"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_one_error_in_openais_form(
    client: openai.OpenAI,
    settings: dict[str, Any],
    message: str,
    param: str | None,
    stream: bool,
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        answer(client, **{"stream": stream} | settings)
    error = caught.value
    assert error.status_code == (404 if param == "model" else 400)
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    assert message in error.body["message"]  # type: ignore[index]
    assert "\n" not in error.body["message"]  # type: ignore[index]
    assert error.type == "invalid_request_error"
    assert error.param == param


def body(more: bytes = b'"max_tokens": 2', content: bytes = b"hello") -> bytes:
    messages = b'"messages": [{"role": "user", "content": "' + content + b'"}]'
    return b'{"model": "base", ' + messages + b", " + more + b"}"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "chat/completions", b"{", 400, "JSON decode error"),
        ("POST", "chat/completions", b"[]", 400, "valid dictionary"),
        ("POST", "chat/completions", b"{}", 400, "model: Field required; messages: Field"),
        (
            "POST",
            "chat/completions",
            b'{"model": "\\ud800", "messages": []}',
            404,
            "unknown router",
        ),
        ("POST", "chat/completions", body(b'"\\ud800": 1'), 400, "unicode"),
        ("POST", "chat/completions", body(b'"stop": "\\ud800"'), 400, "stop.0: "),
        ("POST", "chat/completions", body(content=b"\\ud800"), 400, "half a character"),
        ("GET", "chat/completions", b"", 405, "Method Not Allowed; there is POST"),
        ("POST", "embeddings", b"{}", 404, "/v1/embeddings: Not Found; there is POST"),
        ("GET", "models/%ED%A0%80", b"", 404, "unknown model"),
        ("POST", "chat/completions", b"x" * (MAX_BODY + 1), 413, "more than 2,097,152 bytes; send"),
        ("POST", "chat/completions", b"[" * 100_000, 400, ""),
        ("POST", "chat/completions", body(b'"seed": 18446744073709551616'), 400, "seed is 184467"),
        ("POST", "chat/completions", body(b'"temperature": 1e-40'), 400, "temperature is 1e-40"),
        ("POST", "chat/completions", body(b'"' + b"z" * 1_000_000 + b'": 1'), 400, "unknown param"),
        ("POST", "chat/completions", body(content=b"z" * 1_000_000), 400, "1,000,000 characters"),
    ],
)
def test_what_is_no_request_is_an_error_in_the_same_form(
    client: openai.OpenAI, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.request(method, f"{client.base_url}{path}", content=content, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert len(response.text) < 3000


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_run_is_an_error_and_the_next_one_runs(
    client: openai.OpenAI, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine_run.Run, "begin", _broken)
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            answer(client, stream=stream)
    assert answer(client).choices[0].message.content


def _broken(run: engine_run.Run) -> None:
    raise RuntimeError("out of memory")


def test_a_run_that_breaks_in_its_stream_says_so(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine_run.Run._add_tokens

    def add_some(run: engine_run.Run, token_ids: list[int]) -> None:
        if len(run.rows[0].answer) == 3:
            raise RuntimeError("out of memory")
        add(run, token_ids)

    monkeypatch.setattr(engine_run.Run, "_add_tokens", add_some)
    stream = iter(answer(client, stream=True))
    assert next(stream).choices[0].delta.role == "assistant"
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)


class Slow:
    """Makes the engine's tokens slow, and counts them for each run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.num_tokens: dict[engine_run.Run, int] = {}
        self.running, self.most_running = 0, 0
        add, begin, end = (
            getattr(engine_run.Run, name) for name in ("_add_tokens", "begin", "end")
        )

        def slow_add(run: engine_run.Run, token_ids: list[int]) -> None:
            self.num_tokens[run] = self.num_tokens.get(run, 0) + 1
            add(run, token_ids)
            time.sleep(seconds)

        def counted_begin(run: engine_run.Run) -> Any:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            return begin(run)

        def counted_end(run: engine_run.Run, error: Exception | None = None) -> None:
            self.running -= 1
            end(run, error)

        monkeypatch.setattr(engine_run.Run, "_add_tokens", slow_add)
        monkeypatch.setattr(engine_run.Run, "begin", counted_begin)
        monkeypatch.setattr(engine_run.Run, "end", counted_end)


def test_runs_go_on_together(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {seed: sampled(client, seed) for seed in range(3)}
    slow = Slow(monkeypatch, 0.01)
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: sampled(client, s)}))
        for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert slow.most_running == 3
    assert len(slow.num_tokens) == 3


def sampled(client: openai.OpenAI, seed: int) -> str:
    return str(answer(client, temperature=1, seed=seed).choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_run(
    client: openai.OpenAI, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, 0.3)
    body = json.dumps({"model": "spectr", "messages": HELLO, "max_tokens": 400, "stream": stream})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall((head + body).encode())
        wait_until(lambda: bool(slow.num_tokens))
    (run,) = slow.num_tokens
    num_when_left = slow.num_tokens[run]
    wait_until(lambda: slow.running == 0)
    assert slow.num_tokens[run] <= num_when_left + 2
    assert answer(client, max_tokens=1).usage.completion_tokens == 1


def test_one_that_leaves_the_line_never_runs(
    serve_model: ServeModel, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "MOST_RUNS", 1)
    slow = Slow(monkeypatch, 0.1)
    client = serve_model(routed_model)
    first = iter(answer(client, stream=True, max_tokens=20))
    next(first)
    with pytest.raises(openai.APITimeoutError):
        answer(client.with_options(timeout=0.5), model="base")
    assert [chunk.choices[0].finish_reason for chunk in first][-1] == "length"
    answer(client, max_tokens=1)
    assert [run.routers[0].name for run in slow.num_tokens] == ["single", "single"]


def test_a_line_that_is_full_says_when_to_come_again(
    serve_model: ServeModel, routed_model: SpectrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTR_METRICS", "1")
    monkeypatch.setattr(serving.app, "MAX_WAITING", 2)
    monkeypatch.setattr(batch, "MOST_RUNS", 1)
    slow = Slow(monkeypatch, 0.1)
    client = serve_model(routed_model)
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(sampled(client.with_options(timeout=60), 0)))
        for _ in range(2)
    ]
    first = answer(client, stream=True, max_tokens=400)
    next(first)
    for thread in threads:
        thread.start()
    url = str(client.base_url).replace("/v1/", "/metrics")
    wait_until(lambda: scraped(url)["runs_waiting", ""] == 2)
    with pytest.raises(openai.RateLimitError, match="2 requests wait for the model") as caught:
        answer(client, max_tokens=1)
    assert caught.value.response.headers["retry-after"] == "5"
    assert caught.value.type == "rate_limit_error"
    assert caught.value.code == "rate_limit_exceeded"
    first.close()
    for thread in threads:
        thread.join()
    assert len(texts) == 2
    assert slow.most_running == 1
