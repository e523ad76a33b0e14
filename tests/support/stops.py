"""Runs that stop or crash at a step."""

from __future__ import annotations

from collections.abc import Callable

from fitune.core.events import Watcher
from fitune.core.records import StepRecord


class StopAt(Watcher):
    """Ends the run from inside at a step, as a failure would."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.at, self.action = step, action

    def step(self, record: StepRecord) -> None:
        if record.step == self.at:
            self.action()


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash
