"""Trackers: whoever follows a run from outside, TensorBoard, W&B and the like, or a function of the user's own.

In: the events of a run. Out: calls of three functions, `start`, `log` and `end`, each tracker in a thread of its own
behind a queue that is bounded. So a tracker that is missing, fails, or hangs is reported once, and the run neither
stops nor waits for it: not a step while it goes on, and at its end no longer than DEADLINE.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Protocol

from fitune.core.errors import Interrupted, RunFolderError
from fitune.core.events import Several, Watcher
from fitune.core.files import write_json
from fitune.core.records import StepRecord
from fitune.core.untrusted import read_json

WAITING = 1_000  # steps that a tracker may be behind; later ones are not passed on to it
DEADLINE = 10.0  # seconds that the end of a run waits for all trackers together
FOLDER = "trackers"  # of a run folder: what trackers keep there, and the names by which they know the run


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given of a run.

    Args:
        name: of the run: its folder's.
        project: that the tracker files it under.
        folder: where the tracker may keep files.
        settings: of the run, by name, groups as `lora.rank`.
        id: by which the tracker knows the run from before it was stopped; "": it is new.
        step: optimizer steps made before.
        total: of the whole run.
    """

    name: str
    project: str
    folder: Path
    settings: Mapping[str, object]
    id: str = ""
    step: int = 0
    total: int = 0


class Tracker(Protocol):
    """Follows a run. Subclass it and write the functions that you want: the others do nothing.

    They are called in a thread of the tracker's own, one after the other. What one raises is reported, once, and the
    tracker is called no more; the run goes on.

    Example:
        >>> class Losses(fitune.Tracker):
        ...     def log(self, step, figures):
        ...         print(step, figures["train/loss"])
        >>> fitune.train(model="models/llama", data=["rows.jsonl"], callbacks=[Losses()])
    """

    # Each function returns explicitly: a type checker takes one without a body for an abstract one.

    def start(self, run: TrackedRun) -> str:
        """The run begins, or goes on: with `run.id` the same curve continues. Gives the tracker's own id of the run."""
        return ""

    def seen(self, run: TrackedRun) -> int:
        """The last step that the tracker has of the run, asked after `start`. Of a run that goes on the steps behind it
        are logged first, from steps.jsonl, and those up to it not again: what a killed process had not passed on is
        missing in a tracker, and steps behind the checkpoint are made twice. Without this function every step that is
        made is logged."""
        return run.step

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """An optimizer step was made: train/loss, train/lr, ..., and eval/loss where it was evaluated."""
        return

    def end(self, ok: bool) -> None:
        """The run is over; ok: not by an error."""
        return


class Function(Tracker):
    """A function of a step and its figures as a tracker.

    Args:
        function: is called with each step.
    """

    def __init__(self, function: Callable[[int, Mapping[str, float]], object]) -> None:
        self.function = function

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.function(step, figures)


Callback = Tracker | Callable[[int, Mapping[str, float]], object]


def as_tracker(callback: Callback) -> Tracker:
    """A callback as a tracker: an object with any of the three functions, or a function for `log`."""
    if any(hasattr(callback, name) for name in ("start", "log", "end")):
        return callback  # type: ignore[return-value]  # it may have some of the functions alone; see _Feed
    return Function(callback)  # type: ignore[arg-type]  # what has none of them is called itself


def figures(record: StepRecord) -> dict[str, float]:
    """The figures of a step by the names that trackers show."""
    found: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": record.epoch,
        "train/tokens_per_second": record.tokens / max(record.seconds, 1e-9),
        "eval/loss": record.held_out_loss,
    }
    for place, rewards in (("train", record.rewards), ("eval", record.held_out_rewards)):
        if rewards is not None:
            found |= {f"{place}/rewards/{name}": value for name, value in asdict(rewards).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


class _Feed:
    """Passes a run on to one tracker, in a thread.

    Args:
        name: of the tracker.
        make: makes it, in that thread: what it needs is imported there.
        run: what it is given.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], run: TrackedRun) -> None:
        self.name, self.make, self.run = name, make, run
        self.queue: Queue[tuple[int, dict[str, float]]] = Queue(WAITING)
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.closing = threading.Event()
        self.before: Sequence[StepRecord] = ()  # steps of steps.jsonl
        self.ok, self.lost, self.problem, self.reported = True, 0, "", False

    def put(self, step: int, values: dict[str, float]) -> None:
        """A step; never waits."""
        try:
            self.queue.put_nowait((step, values))
        except Full:
            self.lost += 1

    def close(self, ok: bool) -> None:
        """The run is over; does not wait."""
        self.ok = ok
        self.closing.set()

    def report(self, *, end: bool = False) -> str:
        """What is to be reported now; "": nothing, or it was."""
        text = ""
        if self.problem:
            text = self.problem
        elif self.lost:
            text = f"is {WAITING:,} steps behind: later ones are not passed on to it"
        elif end and self.thread.is_alive():
            text = f"has not taken all steps {DEADLINE:.0f} s after the run ended: it is not waited for"
        if not text or self.reported:
            return ""
        self.reported = True
        return f"tracker {self.name}: {text}; the run goes on without it, and steps.jsonl has every step"

    def _work(self) -> None:
        try:
            self.run.folder.parent.mkdir(parents=True, exist_ok=True)
            tracker = self.make()
            found = self._call(tracker, "start", self.run)
            if found and found != self.run.id:
                write_json(self.run.folder.parent / f"{self.run.folder.name}.json", {"id": found})
            seen = tracker.seen(self.run) if hasattr(tracker, "seen") else self.run.step
            for step, values in chain(self._before(), self._steps()):
                if step > seen:
                    self._call(tracker, "log", step, values)
            self._call(tracker, "end", self.ok)
        except BaseException as error:  # a library may raise what is no Exception; nothing of it ends the run
            self.problem = " ".join(str(error).split())[:300] or type(error).__name__

    @staticmethod
    def _call(tracker: Tracker, name: str, *arguments: object) -> str:
        function = getattr(tracker, name, None)
        found = None if function is None else function(*arguments)
        return found if isinstance(found, str) else ""

    def _before(self) -> Iterator[tuple[int, dict[str, float]]]:
        return ((record.step, figures(record)) for record in self.before if record.step <= self.run.step)

    def _steps(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The steps, until the run is over and all are taken."""
        while not self.closing.is_set() or not self.queue.empty():
            with suppress(Empty):
                yield self.queue.get(timeout=0.1)


class _Feeds(Watcher):
    """Passes a run on to its trackers, and reports their problems to its watcher. before: gives the steps of
    steps.jsonl."""

    def __init__(self, feeds: Sequence[_Feed], watch: Watcher, before: Callable[[], Sequence[StepRecord]]) -> None:
        self.feeds, self.watch, self.before, self.started = feeds, watch, before, False

    def start(self, total: int, done: int, device: str) -> None:
        """See Watcher."""
        self.started = True
        before = self.before() if done else ()
        for feed in self.feeds:
            feed.before = before
            feed.run = replace(feed.run, step=done, total=total)
            feed.thread.start()

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        values = figures(record)
        for feed in self.feeds:
            feed.put(record.step, values)
        self._report()

    def close(self, ok: bool) -> None:
        """The run is over: trackers have until the deadline, all together."""
        if not self.started:
            return
        for feed in self.feeds:
            feed.close(ok)
        end = time.monotonic() + DEADLINE
        for feed in self.feeds:
            feed.thread.join(max(0.0, end - time.monotonic()))
        self._report(end=True)

    def _report(self, *, end: bool = False) -> None:
        for feed in self.feeds:
            text = feed.report(end=end)
            if text:
                self.watch.message(text)


@contextmanager
def tracked(
    run: Path,
    trackers: Mapping[str, Callable[[], Tracker]],
    settings: Mapping[str, object],
    watch: Watcher,
    before: Callable[[], Sequence[StepRecord]] = tuple,
) -> Iterator[Watcher]:
    """Inside, what is reported to the watcher that this gives goes to the trackers, too.

    Args:
        run: the run folder.
        trackers: by name, what makes each.
        settings: of the run, as `RunConfig.model_dump` gives them.
        watch: the run's watcher; problems of trackers are reported to it.
        before: gives the steps that the run made before; asked where it goes on.
    """
    if not trackers:
        yield watch
        return
    flat = _flat(settings)
    feeds = [_Feed(name, make, _described(run, name, flat)) for name, make in trackers.items()]
    them, ok = _Feeds(feeds, watch, before), False
    try:
        yield Several([watch, them])
        ok = True
    except Interrupted:
        ok = True
        raise
    finally:
        them.close(ok)


def _described(run: Path, name: str, settings: Mapping[str, object]) -> TrackedRun:
    folder = run / FOLDER / name
    known = ""
    with suppress(FileNotFoundError, RunFolderError):
        known = str(read_json(folder.parent / f"{name}.json", RunFolderError).get("id", ""))
    return TrackedRun(run.name, str(settings.get("track_project", "")), folder, settings, known)


def _flat(values: Mapping[str, object], before: str = "") -> dict[str, object]:
    """Groups as `lora.rank`; lists as text."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        elif value is not None:
            found[before + name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return found
