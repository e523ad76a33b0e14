"""TensorBoard: event files in the run folder; `tensorboard --logdir RUN/trackers` shows them.

In: the events of a run. Out: scalars. torch's writer, which needs the package tensorboard. A run that goes on purges
the steps behind the last one that is kept, so its curve is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker


class TensorBoard(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        from torch.utils.tensorboard import SummaryWriter

        self.last = _last(run) if run.id else 0
        self.writer: Any = SummaryWriter(str(run.folder), purge_step=self.last + 1 if run.id else None)
        if not run.id:
            table = "\n".join(f"    {name}: {value}" for name, value in run.settings.items())
            self.writer.add_text("settings", table)
        return run.name

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        return self.last

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.writer.close()


def _last(run: TrackedRun) -> int:
    """The last step up to the one that the run goes on from of which all scalars reached the disk: the writer keeps
    some back."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = run.folder.glob("events.out.tfevents.*")
    steps = (event.step for file in files for event in EventFileLoader(str(file)).Load())
    return max(max((step for step in steps if step <= run.step), default=0) - 1, 0)


def make() -> Tracker:
    """The tracker."""
    return TensorBoard()
