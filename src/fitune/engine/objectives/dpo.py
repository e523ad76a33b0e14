"""DPO (Rafailov et al. 2023, arXiv:2305.18290): -log sigmoid of beta x the margin of log-ratios to the reference.

With label smoothing s, a pair is taken to be the wrong way round with probability s (conservative DPO, Mitchell 2023).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from fitune.core.options import DpoOptions
from fitune.engine.objectives.base import Kind, Scored, margin


def losses(scored: Scored, options: DpoOptions) -> Tensor:
    """(R,)."""
    scores, wrong = options.beta * margin(scored.ratios), options.label_smoothing
    return -(1 - wrong) * logsigmoid(scores) - wrong * logsigmoid(-scores)


def rewards(scored: Scored, options: DpoOptions) -> Tensor:
    """(A,)."""
    return options.beta * scored.ratios


KIND = Kind("dpo", losses, rewards)
