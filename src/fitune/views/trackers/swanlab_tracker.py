"""SwanLab.

In: the events of a run. Out: its metrics, in the run folder where SWANLAB_MODE is local or offline, or nobody is logged
in here; else at swanlab.cn. A run that goes on keeps its id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker


class SwanLab(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        import swanlab

        run.folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("SWANLAB_MODE") or ("cloud" if os.environ.get("SWANLAB_API_KEY") else "offline")
        self.run: Any = swanlab.init(
            project=run.project,
            experiment_name=run.name,
            logdir=str(run.folder),
            config=dict(run.settings),
            mode=mode,
            **({"id": run.id, "resume": "allow"} if run.id else {}),
        )
        return str(getattr(getattr(self.run, "public", None), "run_id", "") or run.name)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        import swanlab

        swanlab.finish(**({} if ok else {"error": "the run ended with an error"}))


def make() -> Tracker:
    """The tracker."""
    return SwanLab()
