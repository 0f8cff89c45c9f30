"""The routes of the API. Runs stand in one line, in front of a model that makes some at a time. A
client that leaves ends its run."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from spectr_demo.config import has_metrics
from spectr_demo.cpu.threads import release_threads
from spectr_demo.engine.model import SpectrModel
from spectr_demo.metrics import PATH, Metrics
from spectr_demo.serving.answer import Piece, pieces
from spectr_demo.serving.errors import ApiError
from spectr_demo.serving.request import Asked, ChatRequest, model_names, understood
from spectr_demo.web import BodyLimit, log_fault

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # requests in line
RETRY_SECONDS = 5  # after which one that found no place may find one
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hand on many tokens at once
]


def build(model: SpectrModel) -> FastAPI:
    """OpenAI's API for a model; its routers are the models there."""
    # Pages of documentation would load their code from another host.
    app = FastAPI(title="SpectR", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    line = anyio.Semaphore(model.most_runs)
    metrics = Metrics(model.library.names)
    created = int(time.time())
    models = {
        name: {"id": name, "object": "model", "created": created, "owned_by": "spectr-demo"}
        for name in model_names(model)
    }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(models.values())}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in models:
            raise ApiError(
                f"unknown model {name!r}; there is {', '.join(models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return models[name]

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        return _Answering(request, model, line, metrics)

    if has_metrics():
        app.add_route(PATH, metrics.response)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        return _unreadable(error).response

    @app.exception_handler(HTTPException)
    async def nothing_there(request: Request, error: HTTPException) -> Response:
        what = str(error.detail)
        if error.status_code in (404, 405):
            what = f"{request.method} {request.url.path}: {what}; there is POST "
            what += "/v1/chat/completions and GET /v1/models"
        return ApiError(what, status=error.status_code).response

    if model.library.names:
        _ = model.reader.ordinary  # now, so that the first request does not wait for it
    release_threads()  # of loading and reading: runs have threads of their own
    return app


def _unreadable(error: RequestValidationError) -> ApiError:
    """All that is wrong with a body, in one message."""
    wrong = []
    for each in error.errors():
        names = [str(part) for part in each["loc"] if part != "body"]
        what = each["msg"].removeprefix("Value error, ")
        wrong.append(f"{'.'.join(names)}: {what}" if names else what)
    loc = error.errors()[0]["loc"]
    return ApiError("; ".join(wrong), param=str(loc[1]) if len(loc) > 1 else None)


class _Answering(Response):
    """One request from its place in the line to its last token, whole or as a stream of events."""

    def __init__(
        self, request: ChatRequest, model: SpectrModel, line: anyio.Semaphore, metrics: Metrics
    ) -> None:
        super().__init__()
        self.request, self.model, self.line, self.metrics = request, model, line, metrics
        self.is_begun = False  # from then on an error is an event of the stream
        self.facts = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
            try:
                await self._answer(scope, receive, send)
            except Exception as error:
                await self._fail(error, scope, receive, send)
            tasks.cancel_scope.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._turn() as (asked, answer):
            if self.request.stream:
                await self._stream(asked, answer, send)
                return
            text = ""
            async for piece in answer:
                text += piece.text
        await JSONResponse(self._whole(text, piece, asked))(scope, receive, send)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[tuple[Asked, AsyncIterator[Piece]]]:
        """A place among the runs that the model makes at the same time."""
        with self.metrics.run(_is_refusal) as counted:
            if self.line.statistics().tasks_waiting >= MAX_WAITING:
                raise ApiError(
                    f"{MAX_WAITING} requests wait for the model; try again in {RETRY_SECONDS} s",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after=RETRY_SECONDS,
                )
            async with self.line:
                counted.begin()
                asked = await run_in_threadpool(understood, self.request, self.model)
                answer = pieces(asked, self.model)

                async def each() -> AsyncIterator[Piece]:
                    while (piece := await run_in_threadpool(next, answer, None)) is not None:
                        counted.add(piece.step)
                        yield piece

                try:
                    yield asked, each()
                finally:
                    with anyio.CancelScope(shield=True):  # the next one waits for this run's end
                        await run_in_threadpool(answer.close)

    async def _stream(self, asked: Asked, answer: AsyncIterator[Piece], send: Send) -> None:
        has_usage = self.request.stream_options and self.request.stream_options.include_usage
        async for piece in answer:
            if not self.is_begun:  # once the prompt was read, and nothing is wrong with it
                start = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
                await send(start)
                self.is_begun = True
                await _send_event(send, self._chunk({"role": "assistant", "content": ""}))
            if piece.text:
                await _send_event(send, self._chunk({"content": piece.text}))
        await _send_event(send, self._chunk({}, piece.ending))
        if has_usage:
            end = {**self.facts, "object": "chat.completion.chunk", "choices": []}
            await _send_event(send, {**end, "usage": _usage(asked, piece)})
        await _send_event(send, None)

    def _chunk(self, delta: dict[str, str], ending: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": ending}
        return {**self.facts, "object": "chat.completion.chunk", "choices": [choice]}

    def _whole(self, text: str, last: Piece, asked: Asked) -> dict[str, Any]:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": last.ending,
        }
        return {
            **self.facts,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(asked, last),
        }

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(error, ApiError):
            log_fault(logger, "a run failed", error)
            is_wrong = _is_refusal(error)  # what only a run finds out of a request
            message = str(error) if is_wrong else f"the run broke off ({error!r}); run it again"
            error = ApiError(message, status=400 if is_wrong else 500)
        if self.is_begun:
            await _send_event(send, error.body)
            await _send_event(send, None)
        else:
            await error.response(scope, receive, send)


def _is_refusal(error: Exception) -> bool:
    """Whether the request is at fault, or there is no place for it. Else the server is."""
    return error.status < 500 if isinstance(error, ApiError) else isinstance(error, ValueError)


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _send_event(send: Send, document: dict[str, Any] | None) -> None:
    """One event of a stream; None is the mark of its end, and ends the response."""
    data = "[DONE]" if document is None else json.dumps(document)
    body = f"data: {data}\n\n".encode()
    is_last = document is None
    await send({"type": "http.response.body", "body": body, "more_body": not is_last})


def _usage(asked: Asked, last: Piece) -> dict[str, int]:
    num_tokens = last.step.columns[0].num_tokens
    return {
        "prompt_tokens": asked.num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": asked.num_prompt + num_tokens,
    }
