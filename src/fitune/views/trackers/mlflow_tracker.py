"""MLflow: at $MLFLOW_TRACKING_URI, else in a database of the run folder; newer versions refuse a folder of files.

In: the events of a run. Out: its metrics. A run that goes on is the same run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker

MOST = 500  # characters of a parameter's value


class MLflow(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        from mlflow.tracking import MlflowClient

        run.folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(run.folder / 'mlflow.db').absolute().as_posix()}"
        self.client: Any = MlflowClient(tracking_uri=uri)
        if run.id:
            self.run = run.id
            self.client.set_terminated(self.run, "RUNNING")
            return run.id
        known = self.client.get_experiment_by_name(run.project)
        experiment = known.experiment_id if known else self.client.create_experiment(run.project)
        self.run = self.client.create_run(experiment, tags={"mlflow.runName": run.name}).info.run_id
        from mlflow.entities import Param

        self.client.log_batch(self.run, params=[Param(n, str(value)[:MOST]) for n, value in run.settings.items()])
        return str(self.run)

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        return max((one.step for one in self.client.get_metric_history(self.run, "train/loss")), default=0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.client.set_terminated(self.run, "FINISHED" if ok else "FAILED")


def make() -> Tracker:
    """The tracker."""
    return MLflow()
