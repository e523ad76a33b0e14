"""`fitune ui --check`: the page's server answers its own requests, and refuses those that nobody may make.

In: an address. Out: a line for each request; an error at the first answer that is not as it must be.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection
from urllib.parse import urlsplit

from fitune.commands.ui import choose
from fitune.commands.ui.app import page_files
from fitune.core.errors import FituneError

WAIT = 120  # seconds for an answer


@dataclass(frozen=True)
class Question:
    """A request, and the status that its answer must have. path: behind the token, or whole where it begins with /."""

    name: str
    status: int
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def questions() -> Iterator[Question]:
    """What the page does, and some of what nobody may do."""
    plan = {"model": choose.bundled_model(), "data": [], "gpu": "24GB", "settings": {}, "quick": True}
    for name in page_files():
        yield Question(f"the page's {name}", 200, name)
    for name in ("start", "models", "files"):
        yield Question(f"api/{name}", 200, f"api/{name}")
    yield Question("a plan", 200, "api/plan", json.dumps(plan).encode(), {"Content-Type": "application/json"})
    yield Question("no token", 401, "/api/start")
    yield Question("another token", 401, f"/{secrets.token_urlsafe()}/api/start")
    yield Question("another Host", 403, "api/start", headers={"Host": "example.org"})
    yield Question("another Origin", 403, "api/start", headers={"Origin": "https://example.org"})
    yield Question("a path outside", 400, "api/files?path=../..")


def passed(address: str) -> list[str]:
    """Ask everything once.

    Raises:
        FituneError: an answer is not as it must be.
    """
    done = []
    for one in questions():
        status = status_of(address, one)
        if status != one.status:
            raise FituneError(f"ui: {one.name} is answered with status {status}", expected=f"status {one.status}")
        done.append(f"passed: {one.name} ({status})")
    return done


def status_of(address: str, asked: Question) -> int:
    """The status of the answer."""
    parts = urlsplit(address)
    connection = HTTPConnection(str(parts.hostname), parts.port, timeout=WAIT)
    try:
        path = asked.path if asked.path.startswith("/") else parts.path + asked.path
        connection.request("GET" if asked.body is None else "POST", path, asked.body, dict(asked.headers))
        return connection.getresponse().status
    finally:
        connection.close()
