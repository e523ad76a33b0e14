"""What the first process of a run and the others do alike in a step.

In: a step's rows. Out: those of this process. Where the model is in shards, every process goes through it equally
often, and process 0 says after each step what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fitune.core import parallel
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.core.records import Batch
from fitune.data.batches import Loader
from fitune.engine.parallel import World
from fitune.engine.shards import ELEMENTWISE, Shards

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


CONFIG = "config"  # what process 0 publishes, once it is resolved


def check_shareable(config: RunConfig, device: torch.device) -> None:
    """Can several processes share the steps of a run, on this machine?

    Raises:
        ConfigError: they cannot.
    """
    here = parallel.size_here()
    wrong = []
    if config.optimizer_in_backward:
        wrong.append("optimizer_in_backward applies each gradient before those of the other processes are there")
    if config.parallel == "shard" and config.optimizer not in ELEMENTWISE:
        wrong.append(
            f"optimizer {config.optimizer}, which looks at whole tensors, on shards ({', '.join(ELEMENTWISE)})"
        )
    if config.frozen_cache in ("memory", "disk"):
        wrong.append("frozen_cache keeps the states of rows in one process")
    if device.type == "cuda" and here > torch.cuda.device_count():
        wrong.append(f"{here} processes on {torch.cuda.device_count()} GPUs")
    if wrong:
        raise ConfigError(
            "several processes cannot share the steps of this run",
            received="; ".join(wrong),
            fix="fewer --workers, or without the option that is named",
        )


def together(config: RunConfig, world: World, device: torch.device) -> None:
    """From here on all processes of a run whose model goes into shards do the same: they read its weights.

    Args:
        config: of process 0, which the others get.
        world: the processes.
        device: of the model.

    Raises:
        ConfigError: they cannot share the run.
    """
    check_shareable(config, device)
    if world.rank == 0:
        world.publish_once(CONFIG, config.model_dump(mode="json"))
    world.connect(device, config.collective_timeout)


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
