"""KTO (Ethayarajh et al. 2024, arXiv:2402.01306): single answers, each marked as good or bad.

A good one is to have a higher log-ratio than the distance to the reference, a bad one a lower. That distance is
estimated over the whole step, on answers to other prompts, without a gradient, and is never below 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fitune.core.options import KtoOptions
from fitune.engine.objectives.base import Kind, Scored


def losses(scored: Scored, options: KtoOptions) -> Tensor:
    """(R,)."""
    assert scored.desirable is not None
    assert scored.kl is not None
    above = options.beta * (scored.ratios - scored.kl)
    good = options.desirable_weight * (1 - torch.sigmoid(above))
    bad = options.undesirable_weight * (1 - torch.sigmoid(-above))
    return torch.where(scored.desirable, good, bad)


def rewards(scored: Scored, options: KtoOptions) -> Tensor:
    """(A,)."""
    return options.beta * scored.ratios


KIND = Kind("kto", losses, rewards, distance=True)
