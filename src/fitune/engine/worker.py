"""The thread that answers: requests to several models go in from anywhere, their tokens come out one by one.

In: batchers, one for each model. Out: a place for requests that is refused when too many wait. One step of each model
that has something to do, in turn, so that none waits for another to be done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from queue import Empty, SimpleQueue

from fitune.engine.batching import Batcher, Ended, Request
from fitune.engine.out_of_memory import free, is_out_of_memory

LOG = logging.getLogger(__name__)


class Full(Exception):
    """As many requests wait as may."""


class Worker:
    """Answers requests until it is closed.

    Args:
        batchers: one for each model; nobody else may call them while the worker runs.
        waiting: how many requests may wait for their place.

    Example:
        >>> with Worker([batcher]) as worker:
        ...     worker.submit(batcher, request)
    """

    def __init__(self, batchers: Sequence[Batcher], waiting: int = 256) -> None:
        self.batchers, self.waiting = batchers, waiting
        self._inbox: SimpleQueue[tuple[Batcher, Request] | None] = SimpleQueue()
        self._open = 0  # requests that were taken and have not ended
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._inbox.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that are being answered or wait."""
        return self._open

    def submit(self, batcher: Batcher, requests: Sequence[Request]) -> None:
        """Take requests together, or none of them.

        Raises:
            Full: too many wait.
            ModelError: see `Batcher.most_of`.
        """
        for request in requests:
            batcher.most_of(request)
        places = sum(one.room.running for one in self.batchers)
        with self._lock:
            if self._open + len(requests) > places + self.waiting:
                raise Full
            self._open += len(requests)
        for request in requests:
            request.on_end = partial(self._ended, request.on_end)
            self._inbox.put((batcher, request))

    def _ended(self, then: Callable[[Ended], None], ended: Ended) -> None:
        with self._lock:
            self._open -= 1
        then(ended)

    def _run(self) -> None:
        with ExitStack() as stack:
            for batcher in self.batchers:
                stack.enter_context(batcher.ready())
            while not self._closed.is_set():
                self._take()
                for batcher in self.batchers:
                    if batcher.busy:
                        _step(batcher)
        for batcher in self.batchers:
            batcher.fail("the server was stopped")

    def _take(self) -> None:
        """The requests that have come in; where nothing else is to be done, wait for one."""
        block = not any(batcher.busy for batcher in self.batchers)
        while True:
            try:
                came = self._inbox.get(block=block)
            except Empty:
                return
            if came is None:
                return
            batcher, request = came
            batcher.waiting.append(request)
            block = False


def _step(batcher: Batcher) -> None:
    """One step; an error of it ends the requests that are there, and nothing else."""
    try:
        batcher.step()
    except Exception as error:
        if is_out_of_memory(error):
            batcher.fail("out of memory: fewer or shorter requests at once fit")
            del error
            free()
            return
        LOG.exception("answering failed")
        batcher.fail(f"answering failed: {type(error).__name__}")
