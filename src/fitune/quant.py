"""Rounding to few bits by hand, as fitune and bitsandbytes do it: for lessons and for looking at a weight.

    from fitune import quant
    quant.absmax([0.1, -0.3, 0.25, 0.15, -0.05]).values    # [42, -127, 106, 64, -21]

In: numbers, or a tensor. Out: a record of what is stored, what comes back, and the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.core.errors import ConfigError, shorten
from fitune.core.quiet import quietly
from fitune.views import cells

DRAWN = 128  # numbers that a notebook shows; a layer's weight has millions

__all__ = ["Rounded", "absmax", "nf4", "nf4_values"]


@dataclass(frozen=True)
class Rounded:
    """Numbers in few bits: `values` are stored, with a scale for all (or of each block); `back` is what they stand
    for; `error` is the largest difference."""

    given: NDArray[np.float64]
    values: list[int]
    scales: list[float]
    back: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The largest difference between what was given and what comes back."""
        return float(np.abs(self.given - self.back).max(initial=0.0))

    def _repr_html_(self) -> str:
        rows: list[tuple[str, list[object]]] = [
            ("given", [f"{x:.4g}" for x in self.given[:DRAWN]]),
            ("stored", [*self.values[:DRAWN]]),
            ("back", [f"{x:.4g}" for x in self.back[:DRAWN]]),
        ]
        count = len(self.values)
        scale = ", ".join(f"{one:.6g}" for one in self.scales[:DRAWN])
        first = f"the first {DRAWN} of {count:,} numbers; " if count > DRAWN else ""
        note = cells.caption(f"{first}scale {scale}; largest error {self.error:.3g}")
        return cells.cell(cells.table([str(n) for n in range(min(count, DRAWN))], rows), note)


@quietly
def absmax(values: Sequence[float] | Any) -> Rounded:
    """int8 by the largest value (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339): q = round(127 x / max|x|).

    Args:
        values: numbers, or a tensor of any shape, which is taken flat.
    """
    from fitune.models.quant import absmax as reference

    given = _numbers(values).double()
    stored, scale = reference.quantize(given)
    back = reference.dequantize(stored, scale)
    return Rounded(given.numpy(), stored.tolist(), [float(scale)], back.numpy())


@quietly
def nf4_values() -> list[float]:
    """The sixteen values of NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): quantiles of the normal
    distribution, from -1 to 1."""
    from fitune.models.quant.nf4 import quantiles

    found: list[float] = quantiles().tolist()
    return found


@quietly
def nf4(values: Sequence[float] | Any) -> Rounded:
    """4 bits: the number of the nearest of the sixteen values, and a scale for each block of 64.

    Args:
        values: numbers, or a tensor of any shape, which is taken flat.
    """
    from fitune.models.quant.nf4 import plain, quantiles, reference

    given = _numbers(values).float()
    table = quantiles()
    numbers, scales = reference(given, table)
    back = plain(numbers, scales, table, given.shape)
    stored = numbers.flatten()[: len(given)].tolist()
    return Rounded(given.double().numpy(), stored, scales.tolist(), back.double().numpy())


def _numbers(values: Sequence[float] | Any) -> Any:
    """A flat tensor of finite numbers.

    Raises:
        ConfigError: there are none, or others.
    """
    import torch

    try:
        if isinstance(values, torch.Tensor):
            if values.is_complex() or values.is_meta:
                raise TypeError("no real numbers")
            values = values.detach().cpu()
        given = torch.as_tensor(values, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError("rounding to few bits", received=shorten(values), expected="numbers, or a tensor") from None
    if not len(given) or not bool(given.isfinite().all()):
        raise ConfigError(
            "rounding to few bits", received=shorten(given.tolist()), expected="one or more finite numbers"
        )
    return given
