"""What a command reports while it works.

In: calls at each event. Out: whatever a Watcher does with them: views show them, a caller in Python may count them.
Nothing here prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fitune.core.records import Finding, StepRecord

RUN_FOLDER = "run folder"
NAME = 11  # columns of a name before its line


class Watcher:
    """Hears what a run does. This one stays silent; Terminal shows it."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def summary(self, lines: Mapping[str, str]) -> None:
        """The run in a few lines, by name: its model, its data, ..."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """The resolved settings."""

    def groups(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """(part of the model, trainable, total) parameters."""

    def findings(self, findings: Sequence[Finding]) -> None:
        """What the preflight rules found."""

    def kept(self, parts: Sequence[Any]) -> None:
        """What lies in which dtype (precision.Kept)."""

    def plan(self, plan: Any) -> None:
        """What the run will take (memory.plan.Plan)."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Something that takes long is so far; done == total: it is finished."""

    def start(self, total: int, done: int, device: str) -> None:
        """Training begins: `done` of `total` steps are behind it."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step was made."""

    def stopping(self) -> None:
        """The user asked to stop: the step that goes on is the last one. Called from a signal handler."""

    def stop(self) -> None:
        """Training ended, however it did."""


class Steps(Watcher):
    """Hears of the steps alone.

    Args:
        on_step: is called with the record of each.
    """

    def __init__(self, on_step: Callable[[StepRecord], None]) -> None:
        self.on_step = on_step

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        self.on_step(record)


class Several(Watcher):
    """Passes on what it hears.

    Args:
        others: to whom, in this order.
    """

    def __init__(self, others: Sequence[Watcher]) -> None:
        for name in (name for name, one in vars(Watcher).items() if not name.startswith("_") and callable(one)):
            setattr(self, name, partial(self._tell, others, name))

    @staticmethod
    def _tell(others: Sequence[Watcher], name: str, *what: Any) -> None:
        for other in others:
            getattr(other, name)(*what)


class Ticker:
    """Tells a watcher how far something is, now and then.

    Args:
        watch: who is told.
        what: what goes on.
        total: how many there are; None: nobody knows.
    """

    def __init__(self, watch: Watcher, what: str, total: int | None) -> None:
        self.watch, self.what, self.total = watch, what, total
        self.done, self.told = 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.told > 0.2:
            self.told = time.monotonic()
            self.watch.progress(self.what, done, self.total)

    def end(self) -> None:
        """It is finished."""
        self.watch.progress(self.what, self.done, self.done)
