"""SwanLab.

In: the events of a run. Out: its metrics, in the run folder where SWANLAB_MODE is local or offline, or nobody is logged
in here; else at swanlab.cn. A run that goes on keeps its id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker
from fitune.views.trackers.offline_log import records


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
        return str(getattr(self.run, "id", None) or self.run.public.run_id)  # older versions have the second

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        return _last(run)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        import swanlab

        swanlab.finish(**({} if ok else {"error": "the run ended with an error"}))


def _last(run: TrackedRun) -> int:
    """The last step in the files of a run of which all scalars are there: what a killed process had in its buffer is
    not. Its server refuses steps that it has."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found = dict[str, int]()
    for file in run.folder.glob(f"*/run-{run.id}.swanlab"):
        for one in records(file):
            scalar = Record.FromString(one).scalar
            if scalar.key.startswith("train/"):
                found[scalar.key] = max(found.get(scalar.key, 0), scalar.step)
    return min(found.values(), default=0)


def make() -> Tracker:
    """The tracker."""
    return SwanLab()
