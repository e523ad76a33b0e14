"""What every way of tuning offers."""

from __future__ import annotations

from typing import Any, Protocol

from fitune.config import RunConfig
from fitune.families import Family


class Method(Protocol):
    """A way of tuning.

    The model never knows its method: `attach` converts it from outside and leaves exactly the method's parameters
    trainable. `expected` is the closed form that the result is checked against before the first step.
    """

    name: str
    default_lr: float
    why_lr: str

    def attach(self, model: Any, family: Family, config: RunConfig) -> Any:
        """The model with the method's parameters, trainable, in float32; everything else frozen."""
        ...

    def expected(self, model: Any, family: Family, config: RunConfig) -> int:
        """How many parameters will be trainable, from the shapes of the model before `attach`."""
        ...
