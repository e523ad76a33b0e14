"""Ctrl-C and the other signals that stop a run: the step in progress is finished and saved.

In: signals. Out: an event that the loop looks at; an error that says how to go on.
"""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fitune.core.errors import Interrupted
from fitune.core.events import Watcher
from fitune.engine.checkpoint import RunFolder

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


@contextmanager
def stop_on_signal(watch: Watcher) -> Iterator[threading.Event]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) set the event; a second one ends the program at
    once. A signal that is ignored from the start stays so: `nohup`, the background of a script."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        watch.stopping()

    with _handled(handle):
        yield stopped


@contextmanager
def passed_on(wish: threading.Event) -> Iterator[None]:
    """Inside, the first of these signals is a wish to stop, which process 0 of a run learns in the next exchange: a
    launcher sends them to all processes, and no one may leave the others in the middle of a step."""

    def handle(number: int, frame: object) -> None:
        if wish.is_set():
            raise KeyboardInterrupt
        wish.set()

    with _handled(handle):
        yield


@contextmanager
def _handled(handle: Callable[[int, object], None]) -> Iterator[None]:
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def resumable(run: RunFolder) -> Iterator[None]:
    """Inside, a Ctrl-C that ends the program (a second one, or one before the first step) becomes an error that names
    the last checkpoint and the command that goes on from it."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.has_settings():
            raise
        newest = Path(run.newest_name()).name
        raise interrupted(run, f"stopped at once, last checkpoint: {newest}") from None


def interrupted(run: RunFolder, what: str) -> Interrupted:
    """One line: what was done, and how to go on."""
    return Interrupted(f"{what}. Resume with: fitune train --resume --output {shlex.quote(str(run.path))}")
