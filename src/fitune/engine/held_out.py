"""The loss, and the rewards of preferences, on rows that are not trained.

In: a model, held-out batches, an objective. Out: the loss as training has it: per target token, per unit of weight, or
per row of preferences; or that of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fitune.core.records import Answers, Batch, Layout, Rewards
from fitune.engine.objectives.base import log_probabilities
from fitune.engine.rewards import FIGURES, rewards_of
from fitune.engine.step import SFT, Objective, first_sums
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
        if objective.first:
            batches = list(batches)
            objective = objective.of_step(first_sums(objective, model, batches, layout))
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


def losses(model: nn.Module, batches: Iterable[Batch], layout: Layout, count: int) -> NDArray[np.float64]:
    """(count,): the summed loss of each sample's target tokens; 0 where it has none. Weights of tokens do not count.

    Args:
        model: the model; its mode is left as it was.
        batches: of samples, whose numbers are `rows`.
        layout: how documents go through it.
        count: how many samples there are.
    """
    found = np.zeros(count, np.float64)
    with evaluating(model):
        for batch in batches:
            of = np.searchsorted(batch.bounds, batch.label_rows, side="right") - 1
            there = np.unique(of)  # samples that have a target
            answers = Answers(np.searchsorted(there, of), np.zeros(len(there), np.float32))
            if len(there):
                each = log_probabilities(model, replace(batch, answers=answers), layout)
                found[np.array(batch.rows)[there]] = -each.double().cpu().numpy()
    return found
