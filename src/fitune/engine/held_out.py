"""The loss, and the rewards of preferences, on rows that are not trained.

In: a model, held-out batches, an objective. Out: the loss as training has it: per target token, per unit of weight, or
per row of preferences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fitune.core.records import Batch, Layout, Rewards
from fitune.engine.rewards import FIGURES, rewards_of
from fitune.engine.step import SFT, Objective
from fitune.models.switches import evaluating


@dataclass(frozen=True)
class HeldOut:
    """What held-out batches have: the loss as training has it, and the rewards of preferences."""

    loss: float
    rewards: Rewards | None = None


@torch.no_grad()
def held_out(
    model: nn.Module,
    batches: Iterable[Batch],
    layout: Layout = "flat",
    objective: Objective = SFT,
    added: Callable[[Tensor], Tensor] | None = None,
    idle: Iterable[Batch] = (),
) -> HeldOut:
    """Loss and rewards over held-out batches; the model's mode is left as it was.

    Args:
        model, batches, layout, objective: of the run.
        added: sums over all processes, where others have the rest of the batches.
        idle: go through the model for nothing.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2 + len(FIGURES), dtype=torch.float64, device=device)
    with evaluating(model):
        if objective.together:
            batches = list(batches)
            objective = objective.of_step(model, batches, layout)
        for batch in batches:
            found = objective.loss(model, batch, layout)
            sums[0] += found.total.double()
            sums[1] += batch.weight
            if found.seen is not None:
                sums[2:] += found.seen
        for batch in idle:
            objective.loss(model, batch, layout)
    total, weight, *seen = (sums if added is None else added(sums)).tolist()
    return HeldOut(total / weight, rewards_of(seen) if any(seen) else None)


def held_out_loss(model: nn.Module, batches: Iterable[Batch], layout: Layout = "flat") -> float:
    """Loss per target token (or unit of weight) over held-out batches; the model's mode is left as it was."""
    return held_out(model, batches, layout).loss
