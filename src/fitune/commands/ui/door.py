"""The way in: the token of the address, and an origin that is this page's own.

In: ASGI calls that the guard of `fitune serve` let through (Host, size and kind of the body). Out: the same without the
token in their paths, or a refusal. A page of another site knows no token, and cannot send one without being asked.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fitune.commands.serve.errors import Refused

POLICY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
METHODS = ("GET", "HEAD", "POST", "PUT")


class Door:
    """Lets in what has the token. Paths are /TOKEN/..., so that what the page asks for has it by itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is answered here, no {scope['type']}")
        try:
            inside = self._opened(scope)
        except Refused as refused:
            await refused.response(POLICY)(scope, receive, send)
            return
        await self.app(inside, receive, _with_policy(send))

    def _opened(self, scope: Scope) -> Scope:
        before, token, path = [*scope["path"].split("/", 2), "", ""][:3]
        same = hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode())
        if before or not same or scope["path"].count("/") < 2:
            raise Refused(401, "the token is missing; expected: the whole address that fitune ui printed")
        if scope["method"] not in METHODS:
            raise Refused(405, f"{scope['method'][:20]} is not done here")
        self._check_origin(Headers(scope=scope), api=path.startswith("api/"))
        return {**scope, "path": f"/{path}", "raw_path": f"/{path}".encode()}

    def _check_origin(self, headers: Headers, *, api: bool) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        if origin is not None and origin != f"http://{headers.get('host', '')}":
            raise Refused(403, f"a page of another site may not call this server: Origin {origin[:80]!r}")
        if api and site not in ("same-origin", "none"):
            raise Refused(403, f"a page of another site may not call this server: Sec-Fetch-Site {site[:20]!r}")


def _with_policy(send: Send) -> Send:
    async def inner(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in POLICY.items():
                headers.setdefault(name, value)
        await send(message)

    return inner
