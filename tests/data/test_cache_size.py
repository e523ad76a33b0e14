"""The cache has a size and leaves what is in use alone; a token goes to its own host, and never in the clear."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fitune.core.config import build
from fitune.core.errors import FituneError, ModelError
from fitune.data import eviction
from fitune.data.cache import Cache, key
from fitune.models import hub
from fitune.models.hub.files import Remote
from fitune.models.hub.transfer import check_secure, fetch


def fill(cache: Cache, name: str, size: int, age: float) -> Path:
    path = cache.entry("rows", key(name), lambda folder: (folder / "a").write_bytes(b"x" * size) and None)
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_what_was_not_used_for_the_longest_time_goes_and_is_named(tmp_path: Path) -> None:
    for name, age in (("a", 300), ("b", 200), ("c", 100)):
        fill(Cache(tmp_path), name, 1 << 20, age)
    messages: list[str] = []
    Cache(tmp_path).entry("rows", key("a"), lambda folder: None)  # used again: now b is the oldest
    fill(Cache(tmp_path, most=5 << 19, report=messages.append), "d", 1 << 20, 0)
    left = {name for name in "abcd" if list(tmp_path.glob(f"rows-{key(name)}-*"))}
    assert left == {"a", "d"}
    assert len(messages) == 1
    assert "2 of 4 entries removed, 2.0 MiB" in messages[0]
    assert "--cache-size" in messages[0]


def test_what_a_living_process_uses_is_never_removed(tmp_path: Path) -> None:
    mine = Cache(tmp_path)
    path = fill(mine, "a", 1 << 20, 10**6)
    (tmp_path / "models").mkdir()
    assert eviction.shrink(tmp_path, 0) == (0, 0)
    assert path.is_dir()
    del mine
    assert eviction.clean(tmp_path)[0] == 1
    assert not path.exists()
    assert (tmp_path / "models").is_dir()  # not ours


def test_the_size_is_given_in_gigabytes_or_with_a_unit() -> None:
    def size(value: object) -> str:
        return build({"model": "m", "data": ["d"], "cache_size": value}).cache_size

    assert [size(value) for value in (20, "500MB", "1.5 TB", "3GB", "2")] == ["20GB", "500MB", "1.5TB", "3GB", "2GB"]
    for wrong in ("0", "-1", "many", "1e999", "99999999TB"):
        with pytest.raises(FituneError, match="cache_size"):
            size(wrong)


class Host(ThreadingHTTPServer):
    """Answers with a file, or sends on; keeps what it was asked with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.to: str | None = None
        self.tokens: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Asked(BaseHTTPRequestHandler):
    server: Host

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        there, body = self.server.to, b"weights"
        if there is not None and not self.path.endswith("again"):
            self.send_response(302)
            self.send_header("Location", there)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    both = Host(), Host()
    yield both
    for one in both:
        one.shutdown()
        one.server_close()


def test_a_token_follows_no_redirect_to_another_host(
    hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = hosts
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", first.address)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    first.to = f"{other.address}/file"
    file = Remote("model.safetensors", 7)
    fetch(f"{first.address}/api", file, tmp_path / "model.safetensors", None)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert (first.tokens, other.tokens) == (["Bearer secret"], [None])
    first.to = f"{first.address}/again"  # the same host may have it
    fetch(f"{first.address}/api", file, tmp_path / "more.safetensors", None)
    assert first.tokens == ["Bearer secret"] * 3
    first.to = "http://example.invalid/file"
    with pytest.raises(ModelError, match="not secure"):
        fetch(f"{first.address}/api", file, tmp_path / "third.safetensors", None)


@pytest.mark.parametrize(
    "address", ["http://hub.example", "ftp://localhost", "http://127.0.0.1.example", "file:///etc", "x"]
)
def test_an_endpoint_in_the_clear_is_on_this_machine_only(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelError, match="MODELSCOPE_ENDPOINT"):
        hub.download("ms:org/name")


def test_what_is_secure() -> None:
    for address in ("https://hub.example", "http://localhost:8000", "http://127.0.0.1", "http://[::1]:80"):
        check_secure(address, "HF_ENDPOINT")
    with pytest.raises(ModelError) as caught:
        check_secure("http://me:secret@hub.example/a?token=secret", "HF_ENDPOINT")
    assert "secret" not in str(caught.value)
