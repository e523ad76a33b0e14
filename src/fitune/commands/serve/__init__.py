"""Runs as an OpenAI-compatible server on this machine: what `fitune chat` answers, over HTTP.

In: run folders or model folders. Out: a server until it is stopped.

    asked.py    what clients ask for          guard.py     who may ask
    prompts.py  from there to ids             live.py      one answer while it is made
    choices.py  what an answer is to clients  response.py  the JSON around it
    app.py      the paths                     errors.py    errors as OpenAI's API has them
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import uvicorn

from fitune.commands.serve.app import app_of
from fitune.commands.serve.guard import LOOPBACK, Rules
from fitune.core.errors import ConfigError
from fitune.core.files import expand
from fitune.core.units import MIB
from fitune.engine.batching import Batcher, Room
from fitune.engine.loading import load
from fitune.engine.worker import Worker
from fitune.models.load import Tuned
from fitune.models.shared import share

GRACE = 5  # seconds that answers in progress have when the server is stopped


@dataclass(frozen=True)
class Place:
    """Where the server listens. key: what clients must bring; hosts: further names by which they call it."""

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    hosts: Sequence[str] = ()

    def open(self) -> socket.socket:
        """A listening socket.

        Raises:
            ConfigError: it cannot be had, or everybody could ask.
        """
        if not self.loopback and not self.key:
            raise ConfigError(
                f"--host {self.host}: other machines could use the model",
                expected="--api-key, when the server listens beyond this machine",
                fix="--api-key KEY, or leave --host out",
            )
        try:
            family, _, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            found = socket.create_server(address[:2], family=family, backlog=2048)
        except OSError as error:
            raise ConfigError(
                f"the server cannot listen at {self.host}, port {self.port}",
                received=error.strerror or str(error),
                fix="choose another --port; 0 takes a free one",
            ) from None
        return found

    @property
    def loopback(self) -> bool:
        """Only this machine can reach it."""
        try:
            return self.host in LOOPBACK or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def rules(self, body: int) -> Rules:
        """Who may ask."""
        hosts = [*LOOPBACK, self.host.lower(), *(name.lower() for name in self.hosts)] if self.loopback else self.hosts
        return Rules(tuple(dict.fromkeys(hosts)), self.key, body)


@dataclass(frozen=True)
class Limits:
    """What the server takes. running: requests answered at once; waiting: those that wait for it; tokens: of an answer;
    body: bytes of a request; cache_tokens: of all prompts and answers at once, of each model; None: what fits into half
    of the free memory."""

    running: int = 64
    waiting: int = 256
    tokens: int = 4096
    body: int = 1 << 20
    cache_tokens: int | None = None


def serve(
    runs: Sequence[str | Path],
    *,
    place: Place = Place(),
    limits: Limits = Limits(),
    loading: Mapping[str, object] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Answer until the process is stopped.

    Args:
        runs: run folders or model folders; each is a model by its folder's name.
        place: where.
        limits: how much.
        loading: as for `engine.loading.load`.
        report: is given a line for people.

    Raises:
        ConfigError: it cannot listen there.
        ModelError, RunFolderError: a run cannot be loaded.
    """
    names = names_of(runs)
    with place.open() as listening:
        models = {name: Batcher(tuned) for name, tuned in _loaded(names, loading or {}, report).items()}
        for batcher in models.values():
            batcher.room = Room(limits.running, limits.cache_tokens or _fits(batcher, len(models)))
        with Worker(list(models.values()), limits.waiting) as worker:
            app = app_of(worker, models, rules=place.rules(limits.body), most=limits.tokens)
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", server_header=False,
                timeout_graceful_shutdown=GRACE,
            )  # fmt: skip
            host, port = listening.getsockname()[:2]
            for name, batcher in models.items():
                how = f"{batcher.rows} answers side by side" if batcher.rows else "one answer after the other"
                tokens = batcher.room.tokens
                more = f"; {tokens:,} tokens of prompts and answers at once" if tokens else ""
                report(f"model {name}: {how}{more}")
            server = uvicorn.Server(config)
            with server.capture_signals():  # from this line on Ctrl-C ends it, also before its event loop is there
                report(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C stops")
                server.run(sockets=[listening])


def _loaded(
    names: Mapping[str, str | Path], loading: Mapping[str, object], report: Callable[[str], None]
) -> dict[str, Tuned]:
    """The models by name; what they have in common is held once."""
    found: dict[str, Tuned] = {}
    for name, run in names.items():
        tuned = load(run, **loading)  # type: ignore[arg-type]  # its own keywords
        if found:
            saved = sum(share(other.model, tuned.model) for other in found.values())
            report(f"model {name}: {saved / MIB:,.1f} MiB of it are those of the models before it")
        found[name] = tuned
    return found


def _fits(batcher: Batcher, models: int) -> int | None:
    """How many tokens the caches of a model may hold: half of the memory that is free now, shared by all models."""
    each = batcher.bytes_per_token()
    if each is None:
        return None
    device = batcher.tuned.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(1, int(free / 2 / models / each))


def names_of(runs: Sequence[str | Path]) -> dict[str, Path | str]:
    """Runs by the names that clients give: of each as many of the last parts of its path as make it the only one.

    Raises:
        ConfigError: the same run twice.
    """
    parts = [expand(run).absolute().parts if expand(run).exists() else (str(run),) for run in runs]
    if len(set(parts)) < len(parts):
        raise ConfigError("serve: the same run twice", received=", ".join(map(str, runs)), fix="name each once")
    count = 1
    while len({one[-count:] for one in parts}) < len(parts):
        count += 1
    return {"/".join(one[-count:]): run for one, run in zip(parts, runs, strict=True)}
