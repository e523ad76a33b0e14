"""What the first process of a run and the others do alike in a step.

In: a step's rows. Out: those of this process. Where the model is in shards, every process goes through it equally
often, and process 0 says after each step what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fitune.core.config import RunConfig
from fitune.core.records import Batch
from fitune.data.batches import Loader
from fitune.engine.parallel import World
from fitune.engine.shards import Shards

Shared = tuple[list[Batch], torch.optim.Optimizer, float, list[Batch]]  # as StepRunner.step takes them


@dataclass(frozen=True)
class Turn:
    """What process 0 does after a step in shards. saves: a checkpoint. ends: the run, which is then finished, or to go
    on later."""

    saves: bool
    ends: bool
    finished: bool

    def as_dict(self) -> dict[str, bool]:
        """For JSON."""
        return asdict(self)


def in_shards(config: RunConfig, world: World) -> bool:
    """Is the model of this run in shards?"""
    return world.size > 1 and config.parallel == "shard"


def share(
    step: Sequence[Batch], loader: Loader, world: World, shards: Shards | None, optimizer: torch.optim.Optimizer
) -> Shared:
    """What this process does of a step.

    Args:
        step: its micro-batches.
        loader: of the run.
        world: its processes.
        shards: of the model, where it is in some.
        optimizer: of this process.
    """
    mine, idle = loader.share(step, world.rank, world.size), list[Batch]()
    if shards is not None:
        rows = np.array([row for batch in step for row in batch.rows], np.int64)
        most = max(len(groups) for groups in loader.shares(rows, world.size))
        idle = shards.idle(mine, step, most)
    return mine, optimizer, sum(batch.weight for batch in step), idle
