"""Runs without a model: their steps, passed on to trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fitune.core.events import Watcher
from fitune.core.records import StepRecord
from fitune.core.tracking import Tracker, tracked


class Heard(Watcher):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record.step)


def record(step: int) -> StepRecord:
    return StepRecord(step, step / 10, 2.0 / step, 1e-3, 0.5, 100, 50, 0.25, 1.5 if step % 2 == 0 else None)


def follow(
    run: Path, some: Mapping[str, Callable[[], Tracker]], steps: Sequence[int], done: int = 0, project: str = "p"
) -> Heard:
    """A run of these steps, behind those that steps.jsonl has."""
    heard, settings = Heard(), {"track_project": project, "lora": {"rank": 8}, "lr": None, "data": ["a"]}
    with tracked(run, some, settings, heard, lambda: [record(step) for step in range(1, done + 1)]) as watch:
        watch.start(10, done, "cpu")
        for step in steps:
            watch.step(record(step))
    assert heard.steps == list(steps)  # the run's own watcher missed nothing
    return heard
