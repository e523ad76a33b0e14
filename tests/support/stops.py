"""Runs that stop or crash at a step."""

from __future__ import annotations

from fitune.core.events import Watcher


class StopAt(Watcher):
    """Ends the run from inside at a step, as a failure would."""

    def __init__(self, step: int, action) -> None:
        self.at, self.action = step, action

    def step(self, record) -> None:
        if record.step == self.at:
            self.action()


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash
