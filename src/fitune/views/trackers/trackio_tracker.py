"""trackio: on this machine, in its own folder ($TRACKIO_DIR); `trackio show` opens its page.

In: the events of a run. Out: its metrics. A run that goes on is resumed by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker


class Trackio(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        import trackio

        name, resume = run.id or run.name, "must" if run.id else "never"
        self.run: Any = trackio.init(
            project=run.project, name=name, config=dict(run.settings), resume=resume, embed=False
        )
        return str(self.run.name)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.run.finish()


def make() -> Tracker:
    """The tracker."""
    return Trackio()
