"""int8 by the largest value: the readable reference for how bitsandbytes packs a weight, with a scale for each row.

    scale = max|x| / 127,  q = round(x / scale),  x' = q * scale

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) quantizes inputs too, but for columns with a value above a
threshold; fitune does not (int8.py), and counts such columns where it quantizes a model (quantizing.py).

Shapes: x (N, in), weight (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGHEST = 127


def quantize(x: Tensor, *, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """int8 values and their scale.

    Args:
        x: any shape; with `by_row` (rows, columns).
        by_row: a scale for each row in place of one for all.

    Returns:
        int8 of x's shape, and the scale: (), or (rows, 1). Zeros have the scale 0.
    """
    largest = x.abs().amax(dim=-1, keepdim=True) if by_row else x.abs().max()
    scale = largest / HIGHEST
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(x / safe).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The values that int8 stands for, in the scale's dtype."""
    return q.to(scale.dtype) * scale


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """Numbers of the columns of x (N, in) that hold a value of at least the threshold; 0: none are taken out."""
    over = (x.abs() >= threshold).any(dim=0) if threshold > 0 else torch.zeros(x.shape[-1], dtype=torch.bool)
    return torch.nonzero(over)[:, 0]
