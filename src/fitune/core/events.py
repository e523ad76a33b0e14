"""What a command reports while it works.

In: calls at each event. Out: whatever a Watcher does with them: views show them, a caller in Python may count them.
Nothing here prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from fitune.core.plan import Plan
from fitune.core.records import Finding, Kept, StepRecord

RUN_FOLDER = "run folder"
NAME = 11  # columns of a name before its line


class Watcher(Protocol):
    """What a command reports to. Subclass it and write the methods that you want: the others do nothing.

    Example:
        >>> class Losses(fitune.Watcher):
        ...     def step(self, record):
        ...         print(record.step, record.loss)
        >>> fitune.train(model="models/llama", data=["rows.jsonl"], watch=Losses())
    """

    # Each method returns explicitly: a type checker takes a method of a protocol without a body for an abstract one.

    def message(self, text: str) -> None:
        """A line for the user."""
        return

    def summary(self, lines: Mapping[str, str]) -> None:
        """The run in a few lines, by name: its model, its data, ..."""
        return

    def settings(self, values: Mapping[str, str]) -> None:
        """The resolved settings, by name."""
        return

    def groups(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """(part of the model, trainable, total) parameters."""
        return

    def findings(self, findings: Sequence[Finding]) -> None:
        """What the checks found."""
        return

    def kept(self, parts: Sequence[Kept]) -> None:
        """In which dtype the model's tensors are kept."""
        return

    def plan(self, plan: Plan) -> None:
        """The memory that the run will take."""
        return

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Progress of something that takes long; done == total: it is finished. total None: not known."""
        return

    def start(self, total: int, done: int, device: str) -> None:
        """Training starts: `done` of `total` optimizer steps were made before."""
        return

    def step(self, record: StepRecord) -> None:
        """An optimizer step was made."""
        return

    def stopping(self) -> None:
        """The user asked to stop: the step in progress is the last one. Called from a signal handler."""
        return

    def stop(self) -> None:
        """Training ended, with a result or an error."""
        return


class Silent(Watcher):
    """Does nothing: what commands report to when nobody watches."""


class Steps(Watcher):
    """Passes on the optimizer steps only.

    Args:
        on_step: is called with the record of each step.
    """

    def __init__(self, on_step: Callable[[StepRecord], None]) -> None:
        self.on_step = on_step

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        self.on_step(record)


class Several(Watcher):
    """Passes every event on to several watchers.

    Args:
        others: the watchers, in the order in which they are called.
    """

    def __init__(self, others: Sequence[Watcher]) -> None:
        for name in (name for name, one in vars(Watcher).items() if not name.startswith("_") and callable(one)):
            setattr(self, name, partial(self._pass_on, others, name))

    @staticmethod
    def _pass_on(others: Sequence[Watcher], name: str, *arguments: object) -> None:
        for other in others:
            getattr(other, name)(*arguments)


class Ticker:
    """Reports progress to a watcher, at most five times a second.

    Args:
        watch: what it reports to.
        what: the work in progress, for people.
        total: how many items there are; None: not known.
    """

    def __init__(self, watch: Watcher, what: str, total: int | None) -> None:
        self.watch, self.what, self.total = watch, what, total
        self.done, self.reported = 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.reported > 0.2:
            self.reported = time.monotonic()
            self.watch.progress(self.what, done, self.total)

    def end(self) -> None:
        """Report that the work is finished."""
        self.watch.progress(self.what, self.done, self.done)
