"""What a tracker prints is dropped: the terminal is the run's, and standard output may be one JSON object.

In: calls of a tracker, in its thread. Out: the same calls, while whatever that thread prints goes nowhere; others print
as ever. Libraries that have a switch of their own for this are switched by it in their files.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from fitune.core.tracking import TrackedRun, Tracker

_silent: set[int] = set()  # threads whose prints are dropped
_lock = threading.Lock()


class _Stream:
    """A stream that drops what silent threads write.

    Args:
        real: where the others write.
    """

    def __init__(self, real: TextIO) -> None:
        self.real = real

    def write(self, text: str) -> int:
        """See TextIO."""
        return len(text) if threading.get_ident() in _silent else self.real.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@contextmanager
def silent() -> Iterator[None]:
    """Inside, this thread prints nothing."""
    with _lock:
        for name in ("stdout", "stderr"):
            if not isinstance(getattr(sys, name), _Stream):
                setattr(sys, name, _Stream(getattr(sys, name)))
        _silent.add(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _silent.discard(threading.get_ident())
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if not _silent and isinstance(stream, _Stream):
                    setattr(sys, name, stream.real)


class Silent(Tracker):
    """A tracker that prints nothing.

    Args:
        inner: the tracker.
    """

    def __init__(self, inner: Tracker) -> None:
        self.inner = inner

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        with silent():
            return self.inner.start(run)

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        with silent():
            return self.inner.seen(run)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        with silent():
            self.inner.log(step, figures)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        with silent():
            self.inner.end(ok)
