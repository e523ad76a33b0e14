"""SimPO (Meng et al. 2024, arXiv:2405.14734): a margin of gamma between beta x mean log-probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from fitune.core.options import SimpoOptions
from fitune.engine.objectives.base import Kind, Scored, margin


def losses(scored: Scored, options: SimpoOptions) -> Tensor:
    """(R,)."""
    return -logsigmoid(options.beta * margin(scored.means) - options.gamma)


def rewards(scored: Scored, options: SimpoOptions) -> Tensor:
    """(A,)."""
    return options.beta * scored.means


KIND = Kind("simpo", losses, rewards, reference=False)
