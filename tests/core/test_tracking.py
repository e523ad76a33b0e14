"""Trackers follow a run and never hold it up: planted ones that are missing, fail, hang, or fall behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fitune.core import tracking
from fitune.core.records import Rewards, StepRecord
from fitune.core.tracking import TrackedRun, Tracker, as_tracker, figures, tracked
from fitune.views import trackers
from support.followed import Heard, follow, record

pytestmark = pytest.mark.unit


class Fake(Tracker):
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.run: TrackedRun | None = None

    def start(self, run: TrackedRun) -> str:
        self.run = run
        return run.id or "my-id"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.calls.append((step, figures["train/loss"]))

    def end(self, ok: bool) -> None:
        self.calls.append(ok)


def test_a_tracker_gets_the_run_its_steps_and_its_end_and_goes_on_as_the_same(tmp_path: Path) -> None:
    fake, function = Fake(), list[tuple[int, float]]()
    some = {
        "fake": lambda: fake,
        "mine": lambda: as_tracker(lambda step, values: function.append((step, values["train/lr"]))),
    }
    assert follow(tmp_path / "run", some, [1, 2]).messages == []
    assert fake.calls == [(1, 2.0), (2, 1.0), True]
    assert function == [(1, 1e-3), (2, 1e-3)]
    assert fake.run == TrackedRun(
        "run", "p", tmp_path / "run" / "trackers" / "fake",
        {"track_project": "p", "lora.rank": 8, "data": "['a']"}, total=10,
    )  # fmt: skip
    again = Fake()
    follow(tmp_path / "run", {"fake": lambda: again}, [3], done=2)
    assert again.run is not None
    assert (again.run.id, again.run.step) == ("my-id", 2)


@pytest.mark.parametrize(
    ("seen", "logged"), [(0, [1, 2, 3, 4, 5]), (1, [2, 3, 4, 5]), (4, [5]), (9, []), (None, [4, 5])]
)
def test_a_tracker_gets_what_a_killed_process_kept_from_it_and_nothing_twice(
    tmp_path: Path, seen: int | None, logged: list[int]
) -> None:
    """The run goes on from step 3 and makes 4 and 5; the tracker has all up to `seen`, or does not know."""

    class Keeping(Fake):
        def seen(self, run: TrackedRun) -> int:
            return super().seen(run) if seen is None else seen

    fake = Keeping()
    assert follow(tmp_path / "run", {"fake": lambda: fake}, [4, 5], done=3).messages == []
    assert fake.calls == [*((step, 2.0 / step) for step in logged), True]


def test_the_end_says_whether_the_run_failed(tmp_path: Path) -> None:
    fake = Fake()
    follow(tmp_path, {"fake": lambda: fake}, [1])
    with pytest.raises(TypeError):  # what a step raises goes through
        follow(tmp_path, {"fake": lambda: fake}, [None])  # type: ignore[list-item]  # on purpose
    assert fake.calls.pop() is False
    assert fake.calls == [(1, 2.0), True]


def test_a_run_that_never_starts_has_no_tracker(tmp_path: Path) -> None:
    made: list[Tracker] = []
    with tracked(tmp_path, {"fake": lambda: made.append(Fake()) or made[0]}, {}, Heard()):
        pass
    assert made == []


def test_what_is_missing_or_fails_is_reported_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Fake):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            raise SystemExit(3) if step == 2 else RuntimeError("the server says no")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fake = Fake()
    some = {**trackers.made(["trackio"]), "failing": Failing, "fake": lambda: fake}
    heard = follow(tmp_path, some, range(1, 40))
    assert len(fake.calls) == 40
    assert sorted(heard.messages) == [
        "tracker failing: the server says no; the run goes on without it, and steps.jsonl has every step",
        "tracker trackio: the package is not installed: pip install trackio; the run goes on without it, and "
        "steps.jsonl has every step",
    ]


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What a hanging tracker waits for; set when the test is over. Deadlines are short."""
    monkeypatch.setattr(tracking, "DEADLINE", 0.2)
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("where", ["start", "log", "end"])
def test_one_that_hangs_holds_up_nothing(tmp_path: Path, released: threading.Event, where: str) -> None:
    """It hangs for ever: a run that waited for it would never end."""

    class Hanging(Fake):
        def start(self, run: TrackedRun) -> str:
            return super().start(run) if where != "start" or released.wait() else ""

        def log(self, step: int, figures: Mapping[str, float]) -> None:
            _ = where == "log" and released.wait()

        def end(self, ok: bool) -> None:
            _ = where == "end" and released.wait()

    fake = Fake()
    heard = follow(tmp_path, {"hanging": Hanging, "fake": lambda: fake}, range(1, 20))
    assert len(fake.calls) == 20
    assert len(heard.messages) == 1
    assert "tracker hanging: has not taken all steps" in heard.messages[0]


def test_one_that_falls_behind_loses_steps_not_time(
    tmp_path: Path, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "WAITING", 5)

    class Slow(Fake):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            released.wait()

    heard = follow(tmp_path, {"slow": Slow}, range(1, 200))
    assert len(heard.messages) == 1
    assert "is 5 steps behind" in heard.messages[0]


def test_figures_have_the_names_that_trackers_show() -> None:
    assert figures(record(2)) == {
        "train/loss": 1.0, "train/lr": 1e-3, "train/grad_norm": 0.5, "train/epoch": 0.2,
        "train/tokens_per_second": 400.0, "eval/loss": 1.5,
    }  # fmt: skip
    rewards = Rewards(0.5, None, 0.25, 0.75, -3.0, -4.0, None)
    found = figures(StepRecord(1, 1.0, 0.7, 1e-4, 1.0, 10, 5, 1.0, rewards=rewards))
    assert found["train/rewards/margin"] == 0.25
    assert "train/rewards/rejected" not in found
