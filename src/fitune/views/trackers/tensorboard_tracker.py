"""TensorBoard: event files in the run folder; `tensorboard --logdir RUN/trackers` shows them.

In: the events of a run. Out: scalars. torch's writer, which needs the package tensorboard. A run that goes on purges
the steps behind the one that it goes on from, so its curve is one.
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

        self.writer: Any = SummaryWriter(str(run.folder), purge_step=run.step + 1 if run.id else None)
        if not run.id:
            table = "\n".join(f"    {name}: {value}" for name, value in run.settings.items())
            self.writer.add_text("settings", table)
        return run.name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.writer.close()


def make() -> Tracker:
    """The tracker."""
    return TensorBoard()
