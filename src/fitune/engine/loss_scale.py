"""The factor on a float16 loss. In: whether steps were finite. Out: the factor of the next one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor on a float16 loss that keeps small gradients from becoming zero (Micikevicius et al. 2018,
    arXiv:1710.03740); always a power of two, so that taking it off again changes no bit. 1: none.

    value: now. fine: steps since it changed.
    """

    START, HIGHEST, PATIENCE = 2.0**16, 2.0**24, 2000

    value: float = 1.0
    fine: int = 0

    def lower(self) -> bool:
        """Half of it, after gradients that are not finite; False: it is 1 already, so they would stay so."""
        if self.value <= 1:
            return False
        self.value, self.fine = self.value / 2, 0
        return True

    def passed(self) -> None:
        """A step was finite; after many of them it is doubled."""
        self.fine += 1
        if self.value > 1 and self.fine >= self.PATIENCE:
            self.value, self.fine = min(2 * self.value, self.HIGHEST), 0
