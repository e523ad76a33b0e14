"""Errors as OpenAI's API writes them, whatever went wrong.

In: a status and what is wrong. Out: a JSON response `{"error": {message, type, param, code}}`.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was received, what was expected.
        param: the field of the body that is wrong.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        super().__init__(message)

    def body(self) -> dict[str, object]:
        """The JSON object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The whole response."""
        more = {"Retry-After": "1"} if self.status == 429 else {}
        return JSONResponse(self.body(), self.status, headers={**more, **(headers or {})})
