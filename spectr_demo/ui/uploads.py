"""Zip files that visitors send: one door for them, with places, a size, and no name on the disk.

Gradio's own door stays closed. It takes any file from anyone, keeps it, and says where.
"""

import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import unquote

import anyio
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from spectr_demo.charts.text import counted
from spectr_demo.config import has_uploads, owner_token
from spectr_demo.experts.messages import shown
from spectr_demo.ui.libraries import is_owner
from spectr_demo.ui.visitors import address_of

PATH = "/experts/zip"  # no path that ends as one of the doors that are closed
OWNER_HEADER = "x-spectr-owner"  # the token, percent-encoded
MOST_FILES, MOST_EACH = 8, 2  # that are sent or wait, in all and of one address
SECONDS = 600.0  # for sending one, and until one that waits is forgotten


def is_open() -> bool:
    """Whether there may be anyone who can send a file."""
    return has_uploads() or bool(owner_token())


@dataclass(kw_only=True, eq=False)
class Upload:
    """A file that was sent; it is gone from the disk with this. name: what its sender calls it."""

    name: str
    address: str
    at: float
    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)


class Uploads:
    """Files on their way from a browser to the handler of the same page, which knows the ticket."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[str, Upload] = {}

    async def receive(self, request: Request) -> Response:
        """Keep the body of a request, and answer with its ticket."""
        if not (has_uploads() or is_owner(unquote(request.headers.get(OWNER_HEADER, "")))):
            return _refusal(403, "uploads are off here: only the owner may send a file")
        upload = Upload(
            name=shown(request.query_params.get("name", "")),
            address=address_of(request.headers, request.client),
            at=self._clock(),
        )
        ticket = secrets.token_urlsafe(16)
        if problem := self._full(ticket, upload):
            return _refusal(429, problem)
        is_whole = False
        try:
            with anyio.fail_after(SECONDS):
                async for part in request.stream():  # as long as the door lets it be
                    await run_in_threadpool(upload.file.write, part)
            is_whole = True
        except (ClientDisconnect, TimeoutError):
            return _refusal(408, "the file did not come whole: send it again")
        except OSError as error:
            return _refusal(507, f"the file could not be kept ({error.strerror})")
        finally:
            if not is_whole:
                self.take(ticket)
        return JSONResponse({"ticket": ticket})

    def take(self, ticket: str) -> Upload | None:
        """The file of a ticket, once."""
        with self._lock:
            return self._files.pop(ticket, None)

    def _full(self, ticket: str, upload: Upload) -> str:
        """Why there is no place for a file, if there is none."""
        with self._lock:
            for old in [t for t, u in self._files.items() if upload.at - u.at > 2 * SECONDS]:
                del self._files[old]
            own = sum(each.address == upload.address for each in self._files.values())
            if own >= MOST_EACH:
                return f"{counted(own, 'file')} of yours are being sent: wait for their end"
            if len(self._files) >= MOST_FILES:
                return "many files are being sent here: try again in a minute"
            self._files[ticket] = upload
            return ""


def _refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)
