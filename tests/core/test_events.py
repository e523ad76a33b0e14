"""What commands report to: a watcher hears what it asks for, and the rest does nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

import fitune
from fitune.core.events import Several, Silent, Steps, Ticker, Watcher
from fitune.core.records import StepRecord

RECORD = StepRecord(1, 0.5, 2.0, 1e-3, 1.0, 10, 5, 0.1)
EVENTS = [name for name, one in vars(Watcher).items() if inspect.isfunction(one) and not name.startswith("_")]


class Recorder(Watcher):
    """Keeps the names and arguments of all events."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, tuple[object, ...]]] = []
        for name in EVENTS:
            setattr(self, name, self._recorder(name))

    def _recorder(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.heard.append((name, arguments))


def arguments(name: str) -> list[int]:
    """A number for each argument of an event."""
    return list(range(len(inspect.signature(getattr(Watcher, name)).parameters) - 1))


def test_the_public_watcher_can_be_subclassed_in_part() -> None:
    class Losses(fitune.Watcher):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def step(self, record: StepRecord) -> None:
            self.losses.append(record.loss)

    watch = Losses()
    for name in EVENTS:
        if name != "step":
            assert getattr(watch, name)(*arguments(name)) is None
    watch.step(RECORD)
    assert watch.losses == [2.0]


def test_a_silent_watcher_hears_everything_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for name in EVENTS:
        assert getattr(Silent(), name)(*arguments(name)) is None
    assert capsys.readouterr() == ("", "")


def test_several_watchers_each_hear_every_event_in_order() -> None:
    first, second = Recorder(), Recorder()
    both = Several([first, second])
    for name in EVENTS:
        getattr(both, name)(*arguments(name))
    assert first.heard == second.heard == [(name, tuple(arguments(name))) for name in EVENTS]
    assert len(EVENTS) >= 12


def test_steps_are_passed_on_alone() -> None:
    seen: list[StepRecord] = []
    watch = Several([Steps(seen.append)])
    watch.message("a line")
    watch.step(RECORD)
    assert seen == [RECORD]


def test_a_ticker_ends_at_what_was_done() -> None:
    recorder = Recorder()
    ticker = Ticker(recorder, "reading rows", None)
    ticker(3)
    ticker.end()
    assert recorder.heard[-1] == ("progress", ("reading rows", 3, 3))
