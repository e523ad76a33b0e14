"""ORPO (Hong et al. 2024, arXiv:2403.07691): the loss of the chosen answer and a term of the odds ratio of both.

Probabilities are those per token: exp of the mean log-probability. Only answers are in the loss, as everywhere here;
TRL has the prompt of the chosen answer in it too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fitune.core.options import OrpoOptions
from fitune.engine.objectives.base import Kind, Scored, margin


def losses(scored: Scored, options: OrpoOptions) -> Tensor:
    """(R,)."""
    odds = margin(scored.means - _log_rest(scored.means))
    return -scored.means[0::2] - options.beta * logsigmoid(odds)


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0; of both ways to compute it the one that keeps its digits (Mächler 2012)."""
    near = logs > -math.log(2)
    low = torch.where(near, torch.full_like(logs, -1.0), logs)
    high = torch.where(near, logs, torch.full_like(logs, -0.1)).clamp(max=-1e-7)
    return torch.where(near, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def rewards(scored: Scored, options: OrpoOptions) -> Tensor:
    """(A,)."""
    return options.beta * scored.means


KIND = Kind("orpo", losses, rewards, reference=False)
