"""trackio: on this machine, in its own folder ($TRACKIO_DIR); `trackio show` opens its page.

In: the events of a run. Out: its metrics. A run that goes on is resumed by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker


class Trackio(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        import trackio

        name, resume = run.id or _free(run), "allow" if run.id else "never"
        self.run: Any = trackio.init(
            project=run.project, name=name, config=dict(run.settings), resume=resume, embed=False
        )
        return str(self.run.name)

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_max_step_for_run(run.project, self.run.name) or 0

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.run.finish()


def _free(run: TrackedRun) -> str:
    """A name that no run of the project has: trackio knows a run that goes on by its name alone."""
    from trackio.sqlite_storage import SQLiteStorage

    there = set(SQLiteStorage.get_runs(run.project))
    return next(name for name in chain([run.name], (f"{run.name}-{n}" for n in count(2))) if name not in there)


def make() -> Tracker:
    """The tracker."""
    return Trackio()
