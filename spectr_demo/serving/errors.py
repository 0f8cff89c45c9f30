"""Errors as OpenAI's API writes them."""

import json
from typing import Any

from fastapi.responses import Response


class ApiError(Exception):
    """What a client is told. status: of HTTP. param: the request's field at fault, if it is one.
    code: for programs, one of OpenAI's."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def response(self) -> Response:
        # In ASCII: what a client wrote may be no text that UTF-8 can hold.
        content = json.dumps(self.body)
        return Response(content, status_code=self.status, media_type="application/json")
