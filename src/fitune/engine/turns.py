"""Turns at what only one thread may use, such as a model: the holder can let those who wait go first.

In: threads. Out: one at a time goes on, in the order in which they came.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that is handed on fairly; use it as a context.

    Example:
        >>> with turns:
        ...     while work():
        ...         if turns.wanted:
        ...             turns.give()
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    def __enter__(self) -> Turns:
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    @property
    def wanted(self) -> bool:
        """Does somebody wait?"""
        return len(self._queue) > 1

    def give(self) -> None:
        """Let all who wait now go first, and come back behind them. Only the holder may call it."""
        mine = object()
        with self._changed:
            self._queue.append(mine)
            self._queue.popleft()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue[0] is mine)

    def _take(self) -> None:
        mine = object()
        with self._changed:
            self._queue.append(mine)
            self._changed.wait_for(lambda: self._queue[0] is mine)

    def _leave(self) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()
