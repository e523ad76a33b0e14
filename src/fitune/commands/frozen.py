"""Hidden states of frozen blocks, for a run that keeps them between its epochs.

In: a run as it is planned, its model, its rows. Out: the finding of the trial, and what keeps the states, or None.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fitune.checks import frozencheck
from fitune.core.config import RunConfig
from fitune.core.plan import Plan
from fitune.core.records import Batch, Finding
from fitune.data.batches import Loader
from fitune.data.store import lengths_of
from fitune.engine.frozen_states import FrozenStates
from fitune.engine.state_store import InMemory, OnDisk, Store
from fitune.memory import frozen


def tried(
    plan: Plan, config: RunConfig, model: nn.Module, loader: Loader, largest: Batch
) -> tuple[Plan, list[Finding]]:
    """The plan as it can be, and whether states can be kept where it has a place for them.

    Args:
        plan: of the run.
        config: resolved.
        model: with its method on it.
        loader: of its rows.
        largest: micro-batch of the run.
    """
    if plan.frozen_cache == "off":
        return plan, []
    rows: list[NDArray[np.int64]] = [loader.epoch_steps(epoch)[0][0] for epoch in (0, 1)]
    batches = [*rows, np.array(largest.rows, np.int64)]
    asked = config.frozen_cache != "auto"
    why = frozencheck.refusal(model, loader.samples, batches, plan.frozen_blocks)
    found = frozencheck.frozen_states(why, plan.frozen_blocks, asked=asked)
    return plan if why is None else frozen.dropped(plan), [found]


def states(plan: Plan, config: RunConfig, loader: Loader, report: Callable[[str], None]) -> FrozenStates | None:
    """What keeps them; None: nothing does.

    Args:
        plan, config, loader: of the run; the trial has passed.
        report: is called with one line where keeping them ends early.
    """
    lengths = lengths_of(loader.samples)
    total, place = int(lengths.astype(np.int64).sum()), frozen.folder(config)

    def make(width: int, dtype: torch.dtype) -> Store:
        if plan.frozen_cache == "disk" and place is not None:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            return OnDisk(place, width, dtype)
        return InMemory(total, width, dtype)

    asked = config.frozen_cache != "auto"
    return None if plan.frozen_cache == "off" else FrozenStates(plan.frozen_blocks, lengths, make, report, asked=asked)
