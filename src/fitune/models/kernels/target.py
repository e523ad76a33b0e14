"""The kind of device that code decides for: that of the tensors, or the one that a plan plays.

In: a device. Out: what it can do. A plan goes over shadows that say that they lie on a CPU, through the code that will
run on a GPU; where that code chooses between kernels, it asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """kind: cpu, cuda. capability: of a CUDA GPU, (8, 0) for an A100. multiprocessors: how many it has."""

    kind: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0


CPU = Target("cpu")
AMPERE = Target("cuda", (8, 0), 108)  # an A100

_planned: ContextVar[Target | None] = ContextVar("planned", default=None)


def of(device: torch.device) -> Target:
    """What decides for tensors on a device."""
    return _planned.get() or _real(device)


def is_planned() -> bool:
    """Is it a plan that asks?"""
    return _planned.get() is not None


@cache
def _real(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(device.type)
    return Target(
        "cuda",
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_properties(device).multi_processor_count,
    )


@contextmanager
def planned(target: Target) -> Iterator[None]:
    """Inside, code decides as it would on that device."""
    token = _planned.set(target)
    try:
        yield
    finally:
        _planned.reset(token)
