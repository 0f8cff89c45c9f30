"""What the servers of this project share: bodies of bounded size, and a log without prompts."""

import logging
import traceback
from collections.abc import Mapping
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spectr_demo.experts.messages import shown

MAX_BODY = 2 * 2**20  # bytes: a prompt that fills a context of 128,000 tokens, three times over
_FRAMES = 8  # of a traceback, the innermost


class BodyLimit:
    """ASGI middleware. A larger body is an HTTPException where the application reads it, which
    answers in its own form. others: bytes of bodies that are sent to these paths."""

    def __init__(
        self,
        app: ASGIApp,
        max_body: int = MAX_BODY,
        others: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.app, self.max_body, self.others = app, max_body, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        most = self.others.get(path, self.max_body)
        said = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        num_said, num_read = int(said[:20]) if said.isdecimal() else 0, 0

        def check(num: int) -> None:
            if num > most:
                raise HTTPException(
                    413, f"the request has more than {most:,} bytes; send a shorter one"
                )

        async def bounded() -> Message:
            nonlocal num_read
            check(num_said)  # before anything is read
            message = await receive()
            num_read += len(message.get("body", b""))
            check(num_read)
            return message

        await self.app(scope, bounded, send)


def log_fault(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log where an error arose. Its words may hold a prompt: they are for `logging.DEBUG` only."""
    frames = "".join(traceback.format_tb(error.__traceback__)[-_FRAMES:])
    logger.error("%s: %s\n%s", what, type(error).__name__, frames.rstrip())
    logger.debug("its words: %s", shown(error))
