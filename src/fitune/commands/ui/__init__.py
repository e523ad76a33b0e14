"""`fitune ui`: a page in the browser for what the commands do.

In: folders. Out: a server on this machine alone, until it is stopped. The page holds nothing: runs are processes of
their own, and what they did lies in their run folders.

    choose.py     a model, data, rows        app.py        the paths
    planned.py    memory, as settings move   door.py       the token of the address
    runs.py       runs, alone and together   paths.py      what the page may look at
    talk.py       chat                       settings.py   what is asked for
    hand_over.py  exports and downloads      processes.py  runs and exports in their own processes
    page/         what the browser loads     self_test.py  `--check`
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from threading import Thread

import uvicorn
from huggingface_hub.constants import HF_HUB_CACHE

from fitune.commands.demo import bundled
from fitune.commands.serve import GRACE, Place
from fitune.commands.serve.guard import Rules
from fitune.commands.ui.app import Desk, app_of
from fitune.commands.ui.paths import Roots
from fitune.commands.ui.self_test import passed
from fitune.core.begun import RUNS
from fitune.core.errors import ConfigError
from fitune.core.files import expand
from fitune.core.units import MIB

TOKEN = 16  # bytes
BODY = 1 << 20  # bytes of a request that is no upload


def roots_of(runs: str | Path = RUNS, folders: Sequence[str | Path] = ()) -> Roots:
    """What the page may look at.

    Raises:
        ConfigError: a folder is not there.
    """
    missing = [str(one) for one in folders if not expand(one).is_dir()]
    if missing:
        raise ConfigError(
            "ui: no such folder", received=", ".join(missing), fix="--folder takes folders that are there"
        )
    more = [Path(HF_HUB_CACHE), bundled(), *(expand(one).absolute() for one in folders)]
    return Roots(Path.cwd(), expand(runs).absolute(), tuple(more))


def ui(
    *,
    port: int = 8010,
    runs: str | Path = RUNS,
    folders: Sequence[str | Path] = (),
    upload_mib: int = 1024,
    report: Callable[[str], None] = lambda line: None,
    started: Callable[[str], object] | None = None,
) -> None:
    """Answer until the process is stopped.

    Args:
        port: 0 takes a free one.
        runs: the folder of the run folders, and of uploads and exports.
        folders: further folders whose models and data may be chosen.
        upload_mib: the largest upload.
        report: is given a line for people.
        started: is called with the address before the first request is answered.

    Raises:
        ConfigError: it cannot listen there, or a folder is not there.
    """
    made = prepared(roots_of(runs, folders), port=port, upload_mib=upload_mib)
    with made as (server, listening, address), server.capture_signals():  # as in serve
        report(f"open {address}; Ctrl-C stops the page, and no run")
        if started is not None:
            started(address)
        server.run(sockets=[listening])


@contextmanager
def prepared(roots: Roots, *, port: int = 0, upload_mib: int = 1024) -> Iterator[tuple[uvicorn.Server, socket, str]]:
    """The server, the socket that it is to answer at, and the page's address."""
    place, token = Place(port=port), secrets.token_urlsafe(TOKEN)
    with place.open() as listening:
        rules = Rules(place.rules(BODY).hosts, body=BODY, uploads=upload_mib * MIB)
        config = uvicorn.Config(
            app_of(Desk(roots), token=token, rules=rules), log_level="warning", access_log=False, lifespan="off",
            server_header=False, ws="none", proxy_headers=False, timeout_graceful_shutdown=GRACE,
        )  # fmt: skip
        yield uvicorn.Server(config), listening, f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/"


@contextmanager
def running(roots: Roots, *, upload_mib: int = 1024) -> Iterator[str]:
    """The page's address; a thread of this process answers there."""
    with prepared(roots, upload_mib=upload_mib) as (server, listening, address):
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(GRACE + 5)


def check(runs: str | Path = RUNS) -> list[str]:
    """Start, ask for everything once as the page does, and for some of it as nobody may; a line for each.

    Raises:
        FituneError: an answer is not as it must be.
    """
    with running(roots_of(runs)) as address:
        return passed(address)
