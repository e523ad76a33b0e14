"""Weights & Biases.

In: the events of a run. Out: its metrics, in the run folder until `wandb sync` takes them where WANDB_MODE=offline, or
nobody is logged in here; else at wandb.ai or $WANDB_BASE_URL. A run that goes on keeps its id.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

from fitune.core.tracking import TrackedRun, Tracker
from fitune.views.trackers.offline_log import records


class Wandb(Tracker):
    """See Tracker."""

    def start(self, run: TrackedRun) -> str:
        """See Tracker."""
        os.environ.setdefault("WANDB_SILENT", "true")  # the terminal is fitune's
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        name = run.id or secrets.token_hex(4)
        self.run: Any = wandb.init(
            project=run.project,
            name=run.name,
            dir=str(run.folder),
            config=dict(run.settings),
            id=name,
            resume="allow",
            mode=mode,
        )
        return name

    def seen(self, run: TrackedRun) -> int:
        """See Tracker."""
        return max(_last(run), int(self.run.starting_step) - 1)  # in its files, and at its server

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """See Tracker."""
        self.run.log(dict(figures), step=step)

    def end(self, ok: bool) -> None:
        """See Tracker."""
        self.run.finish(exit_code=0 if ok else 1)


def _last(run: TrackedRun) -> int:
    """The last step in the files of a run that was offline: a block of 32 KiB is written when it is full."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = 0
    for file in run.folder.glob(f"wandb/*/run-{run.id}.wandb"):
        for one in records(file):
            found = max(found, Record.FromString(one).history.step.num)
    return found


def make() -> Tracker:
    """The tracker."""
    return Wandb()
