"""Errors as OpenAI's API writes them."""

import json
from typing import Any

from fastapi.responses import Response

from spectr_demo.experts.messages import MOST_SAID, shown


class ApiError(Exception):
    """What a client is told. status: of HTTP. param: the request's field at fault, if it is one.
    code: for programs, one of OpenAI's. retry_after: seconds."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(shown(message, MOST_SAID))
        self.status, self.code = status, code
        self.param = None if param is None else shown(param)
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> Response:
        # In ASCII: what a client wrote may be no text that UTF-8 can hold.
        content = json.dumps(self.body)
        headers = None if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return Response(content, self.status, headers, media_type="application/json")
