"""Who calls the page, whether they are still there, and what its server takes from them."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from fastapi.exceptions import RequestValidationError
from gradio.block_function import BlockFunction
from gradio.route_utils import FnIndexInferError
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spectr_demo.charts.text import counted
from spectr_demo.experts.messages import MOST_SAID, shown
from spectr_demo.metrics import Metrics
from spectr_demo.web import log_fault

logger = logging.getLogger(__name__)

MOST_WRONG = 8  # faults of one body that are told
# What Gradio offers and this page does not use. An upload would say where it is stored.
_CLOSED = ("/upload", "/process_recording", "/monitoring", "/monitoring/summary")
# What Gradio raises for a call of a shape that it does not know.
_UNREADABLE = (ValueError, TypeError, LookupError, FnIndexInferError)
_HERE = ("127.0.0.1", "::1")
_OF_PROXIES = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
_MCP_ENDS = ("/gradio_api/mcp", "/gradio_api/mcp/http")
_MCP_CALL = "x-spectr-mcp-call"  # Gradio hands a call's headers on to the endpoint
_mcp_calls: dict[str, str] = {}  # address of each client that waits for an answer, by call


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Who called a handler. name: the browser's or the client's session, else its address. is_here:
    whether the call comes from this machine, and no proxy handed it on."""

    name: str
    is_gone: Callable[[], bool]
    is_here: bool = False


_visitor: ContextVar[Visitor] = ContextVar("visitor")
_NOBODY = Visitor(name="", is_gone=lambda: False)


def visitor() -> Visitor:
    """Who called the handler that runs here; one and the same outside of a server."""
    return _visitor.get(_NOBODY)


class Page(gr.Blocks):
    """Blocks that know who calls. What is wrong with a call is one short message, and the log does
    not repeat the call. metrics: of its runs. receive: what becomes of a file that is sent."""

    metrics: Metrics
    receive: Callable[[Request], Awaitable[Response]]

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        needed, got = len(block_fn.inputs), len(inputs)
        if got < needed:
            name = block_fn.api_name or block_fn.name
            raise gr.Error(f"{name} takes {counted(needed, 'value')}, in order; it was given {got}")

    async def process_api(
        self, block_fn: BlockFunction | int, inputs: list[Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        _visitor.set(self._visitor(**kwargs))
        try:
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except gr.Error as error:
            raise _short(error.message) from None
        except Exception as error:
            log_fault(logger, "a call failed", error)
            raise _short("the call cannot be read: its values are not of this page") from None

    def _visitor(
        self,
        request: Any = None,
        session_hash: str | None = None,
        event_id: str | None = None,
        **others: Any,
    ) -> Visitor:
        task = asyncio.current_task()
        # Gradio says so nowhere else. A stream that broke off marks the event of its run; a run
        # that is cancelled ends its task, while the thread of a generator goes on.
        event = self._queue.event_ids_to_events.get(event_id or "")
        headers, client = getattr(request, "headers", {}), getattr(request, "client", None)
        call = headers.get(_MCP_CALL)
        has_session = session_hash is not None and session_hash != event_id
        address = _mcp_calls.get(call) if call else address_of(headers, client)

        def is_gone() -> bool:
            is_cancelled = task is not None and task.cancelling() > 0
            has_left = event is not None and not event.alive
            return is_cancelled or has_left or (call is not None and call not in _mcp_calls)

        name = session_hash if has_session and not call else address
        return Visitor(name=name or "", is_gone=is_gone, is_here=_is_here(headers, client))


def _is_here(headers: Any, client: Any) -> bool:
    """The name by which the page was asked for counts, too: another site's name may be made to lead
    to this machine."""
    if any(headers.get(name) for name in _OF_PROXIES):
        return False
    asked = urlsplit(f"//{headers.get('host', '')}").hostname
    return client is not None and client[0] in _HERE and asked in (*_HERE, "localhost")


def address_of(headers: Any, client: Any) -> str:
    """A client's address, also where a proxy hands its requests on."""
    first, _, _ = headers.get("x-forwarded-for", "").partition(",")
    return first.strip() or (client[0] if client else "")


def _short(message: object) -> gr.Error:
    return gr.Error(shown(message, MOST_SAID), print_exception=False)


def tell_metrics(request: Request) -> Response:
    """The metrics of the page that is served."""
    page: Page = request.app.get_blocks()
    return page.metrics.response(request)


async def refuse_file(request: Request) -> Response:
    """Of a page that takes none."""
    return JSONResponse({"detail": "this page takes no files"}, 404)


async def receive_file(request: Request) -> Response:
    """A file for the page that is served."""
    page: Page = request.app.get_blocks()
    return await page.receive(request)


async def unreadable(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a body, as FastAPI says it, but without the body."""
    assert isinstance(error, RequestValidationError)
    wrong = [
        {"loc": [shown(name) for name in each["loc"]], "msg": shown(each["msg"])}
        for each in error.errors()[:MOST_WRONG]
    ]
    return JSONResponse({"detail": wrong}, 422)


class Door:
    """ASGI middleware in front of Gradio: what is closed, which MCP clients still wait, and no
    traceback with what came."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, has_begun = scope["path"].rstrip("/"), False

        async def begin(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        async def answer(status: int, detail: str) -> None:
            await JSONResponse({"detail": detail}, status)(scope, receive, send)

        if path.endswith(_CLOSED):
            await answer(404, "this page has no such door: nothing is taken or watched there")
            return
        try:
            if path.endswith(_MCP_ENDS) and scope["method"] == "POST":
                await self._mcp(scope, receive, begin)
            else:
                await self.app(scope, receive, begin)
        except Exception as error:
            log_fault(logger, "a request failed", error)
            if has_begun:
                return
            if isinstance(error, _UNREADABLE):
                await answer(400, f"the request cannot be read ({shown(repr(error))})")
            else:
                await answer(500, f"the request failed ({type(error).__name__})")

    async def _mcp(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Gradio runs a tool to its end though nobody waits for it, unless it can be told."""
        call = uuid.uuid4().hex
        _mcp_calls[call] = address_of(Headers(scope=scope), scope.get("client"))
        scope["headers"] = [*scope["headers"], (_MCP_CALL.encode(), call.encode())]
        try:
            await self.app(scope, receive, send)
        finally:  # answered, or gone
            del _mcp_calls[call]
