"""What the servers of this project share: bodies of bounded size, and a log without prompts."""

import logging
import traceback

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spectr_demo.experts.messages import shown

MAX_BODY = 2 * 2**20  # bytes: a prompt that fills a context of 128,000 tokens, three times over
_FRAMES = 8  # of a traceback, the innermost


class BodyLimit:
    """ASGI middleware. A larger body is an HTTPException where the application reads it, which
    answers in its own form."""

    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = Headers(scope=scope).get("content-length", "") if scope["type"] == "http" else ""
        num_said, num_read = int(said[:20]) if said.isdecimal() else 0, 0

        def check(num: int) -> None:
            if num > self.max_body:
                raise HTTPException(
                    413, f"the request has more than {self.max_body:,} bytes; send a shorter one"
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
