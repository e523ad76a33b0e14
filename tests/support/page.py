"""The page of `fitune ui` in a real browser, where Playwright and a chromium are there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
HERE = bool(BROWSER) and find_spec("playwright") is not None
needs_browser = pytest.mark.skipif(
    not HERE, reason="no chromium (apt-get install chromium) or no Playwright (pip install playwright) here"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
NAMELESS = """
() => [...document.querySelectorAll('button, input, select, textarea, a[href], [role=img], pre[tabindex]')]
  .filter(e => e.getClientRects().length)
  .filter(e => !(e.getAttribute('aria-label') || e.ariaLabel || e.textContent.trim()
    || [...(e.labels || [])].map(l => l.textContent.trim()).join('') || e.title))
  .map(e => e.outerHTML.slice(0, 200))
"""
WIDER = """
() => [...document.querySelectorAll('body *')]
  .filter(e => e.getClientRects().length && !e.closest('.scroll, .log, dialog'))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))
"""


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working folder, for as long as a page's server stands in it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Seen:
    """What a page did that it must not: errors of the console, and requests to other servers."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.errors: list[str] = []
        self.elsewhere: list[str] = []

    def watch(self, page: Any) -> None:
        """Note what this page does from now on."""
        page.on("console", lambda one: self.errors.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda one: self._request(one.url))

    def _request(self, url: str) -> None:
        if not url.startswith((self.address, "data:")):
            self.elsewhere.append(url)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as library:
        started = library.chromium.launch(executable_path=BROWSER, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


# ---- its server, without a browser ----

MIB = 1 << 20


@dataclass(frozen=True)
class Asked:
    """A request: as the page makes it, but for what is changed."""

    method: str
    path: str  # behind the token
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    token: str | None = None


@dataclass(frozen=True)
class Site:
    """A page's server, and the folder that it stands in."""

    address: str
    work: Path

    def answer(self, asked: Asked) -> tuple[int, bytes]:
        """Status and body."""
        parts = urlsplit(self.address)
        connection = HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        prefix = parts.path if asked.token is None else asked.token
        try:
            connection.putrequest(asked.method, prefix + asked.path, skip_host="Host" in asked.headers)
            length = {} if asked.body is None else {"Content-Length": str(len(asked.body))}
            for name, value in {**length, **asked.headers}.items():
                connection.putheader(name, value)
            connection.endheaders(asked.body if len(asked.body or b"") <= MIB else None)
            answered = connection.getresponse()
            return answered.status, answered.read()
        finally:
            connection.close()

    def json(self, path: str, body: object | None = None) -> Any:
        """The answer to what the page asks."""
        asked = Asked("GET", path) if body is None else post(path, body)
        status, text = self.answer(asked)
        assert status == 200, text
        return json.loads(text)


def post(path: str, body: object) -> Asked:
    return Asked("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})


def put(name: str, content: bytes = b'{"prompt": "a", "completion": "b"}\n') -> Asked:
    return Asked("PUT", f"api/upload?name={quote(name)}", content, {"Content-Type": "application/octet-stream"})
