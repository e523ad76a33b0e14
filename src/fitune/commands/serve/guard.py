"""What a request must bring before anything of it is read: Host, Origin, the key, and a body of a bounded size.

In: ASGI calls. Out: the same, or a refusal. A page of another site that makes a browser call a server on this machine
(DNS rebinding, or a form that is sent to 127.0.0.1) names another host or another origin, and cannot send JSON without
being asked.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fitune.commands.serve.errors import Refused

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Rules:
    """Who may ask. hosts: names by which the server is called; none: any. key: of the API; none: no key is needed.
    body: most bytes of a request; uploads: of one that is a file, sent by PUT; 0: none are taken."""

    hosts: Sequence[str] = LOOPBACK
    key: str | None = None
    body: int = 1 << 20
    uploads: int = 0

    def most(self, method: str) -> int:
        """Bytes that the body of a request may have."""
        return self.uploads if method == "PUT" and self.uploads else self.body


KINDS = {"POST": "application/json", "PUT": "application/octet-stream"}  # what a browser sends to nobody unasked


class Guard:
    """Refuses what the rules do not allow, before the app sees it."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope), scope["method"])
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return
        await self.app(scope, _bounded(receive, self.rules.most(scope["method"])), send)

    def _check(self, headers: Headers, method: str) -> None:
        host = _name(headers.get("host", ""))
        if self.rules.hosts and host not in self.rules.hosts:
            expected = ", ".join(self.rules.hosts)
            raise Refused(403, f"the Host header names another server: {host[:80]!r}; expected: {expected}")
        origin = headers.get("origin")
        if origin is not None and self.rules.hosts and _name(origin.partition("://")[2]) not in self.rules.hosts:
            raise Refused(403, f"a page of another site may not call this server: Origin {origin[:80]!r}")
        key = self.rules.key
        if key is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Refused(
                    401, "wrong or missing API key; expected: Authorization: Bearer KEY", code="invalid_api_key"
                )
        if method == "POST" or (method == "PUT" and self.rules.uploads):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != KINDS[method]:
                raise Refused(415, f"a body of type {kind[:80]!r}; expected: {KINDS[method]}")
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.rules.most(method):
                raise _too_large(self.rules.most(method))


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _bounded(receive: Receive, most: int) -> Receive:
    """Bodies whose length is not said beforehand."""
    got = 0

    async def inner() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise _too_large(most)
        return message

    return inner


def _too_large(most: int) -> Refused:
    return Refused(413, f"the body is too large; expected: at most {most:,} bytes", code="body_too_large")
