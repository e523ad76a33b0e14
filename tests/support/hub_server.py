"""A small hub on loopback, and downloads from it."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from support import forks, tiny

SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """What the hubs' addresses give for one model, with faults to plant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.served: dict[str, Any] = {}
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        url = urlparse(self.path)
        self.server.asked.append((self.command, url.path, self.headers.get("Range")))
        if time.sleep(self.server.faults.get("slow", 0)):
            return
        if "gated" in url.path:
            self._send(401, b"{}", head, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif "nothing" in url.path:
            self._send(404, b"{}", head, {"X-Error-Code": "RepoNotFound"})
        elif url.path.startswith("/api/models/org/name/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in self.server.files()
            ]
            self._json(tree, head)
        elif url.path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": p.name, "size": p.stat().st_size} for p in self.server.files()]
            if "refs" in url.path or "@" in url.path:
                self._send(404, b"{}", head)
                return
            self._json({"id": "org/name", "sha": SHA, "siblings": siblings, "private": False, "tags": []}, head)
        elif url.path.startswith("/org/name/resolve/"):
            self._file(self.server.folder / url.path.rpartition("/")[2], head)
        elif url.path == "/api/v1/models/org/name/repo/files":
            found = [
                {
                    "Path": p.name,
                    "Size": p.stat().st_size,
                    "Type": "blob",
                    "Sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
                }
                for p in self.server.files()
            ]
            self._json({"Code": 200, "Data": {"Files": found}}, head)
        elif url.path == "/api/v1/models/org/name/repo":
            self._file(self.server.folder / parse_qs(url.query)["FilePath"][0], head)
        else:
            self._send(404, b"{}", head)

    def _json(self, value: Any, head: bool) -> None:
        self._send(200, json.dumps(value).encode(), head, {"Content-Type": "application/json"})

    def _file(self, path: Path, head: bool) -> None:
        data = path.read_bytes()
        whole, status = len(data), 200
        start = 0
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
        more = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if status == 206:
            more["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        served = self.server.served.setdefault(path.name, 0)
        self.server.served[path.name] += not head
        if path.suffix == ".safetensors" and not head:
            if self.server.faults.get("breaks", 0) > served:  # the line goes dead in the middle
                self.send_response(status)
                for name, value in {**more, "Content-Length": str(whole - start)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[start : start + (whole - start) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            if "damaged" in self.server.faults:
                data = data[:-4] + b"\0\1\2\3"
            if "long" in self.server.faults:
                data += bytes(100)
        self._send(status, data[start:], head, more)

    def _send(self, status: int, data: bytes, head: bool, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tiny.save("llama", tmp_path / "source")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched beside safetensors")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    made = Server(folder)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def fetch(server: Server, home: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """`fitune download` in a process of its own, with the server in the hubs' place."""
    return ask(server, home, "download", "--json", *arguments, **environment)


def ask(server: Server, home: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Any command so: its exit code, what it printed as JSON, its messages."""
    home.mkdir(parents=True, exist_ok=True)
    out, err = home / "printed", home / "messages"
    given = {
        "HF_ENDPOINT": server.address, "MODELSCOPE_ENDPOINT": server.address, "HF_HOME": str(home / "hf"),
        "FITUNE_CACHE": str(home / "cache" / "data"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment,
    }  # fmt: skip
    process = forks.start(_with_a_new_client, *words, out=out, err=err, environment=given)
    process.join(240)
    assert process.exitcode is not None, err.read_text(encoding="utf-8")
    printed = out.read_text(encoding="utf-8")
    return process.exitcode, json.loads(printed) if printed else {}, err.read_text(encoding="utf-8")


def _with_a_new_client(*words: str) -> None:
    """Work: the command line; the hub's client reads its address when it is imported, and so it is imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    forks.command(*words)
