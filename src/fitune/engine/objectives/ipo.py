"""IPO (Azar et al. 2023, arXiv:2310.12036): the squared distance of the margin of log-ratios from 1 / (2 beta).

Log-ratios are per token of their answer: sums grow with its length, and so would a squared loss. The paper's authors
confirmed that to TRL's.
"""

from __future__ import annotations

from torch import Tensor

from fitune.core.options import IpoOptions
from fitune.engine.objectives.base import Kind, Scored, margin


def losses(scored: Scored, options: IpoOptions) -> Tensor:
    """(R,)."""
    return (margin(scored.ratios / scored.tokens) - 1 / (2 * options.beta)) ** 2


def rewards(scored: Scored, options: IpoOptions) -> Tensor:
    """(A,)."""
    return options.beta * scored.ratios


KIND = Kind("ipo", losses, rewards)
