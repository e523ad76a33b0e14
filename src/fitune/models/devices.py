"""The device that a run computes on.

In: the name that a user gives. Out: torch's device, one that can be used.
"""

from __future__ import annotations

import torch

from fitune.core.errors import ModelError
from fitune.models import determinism


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is the first CUDA GPU, else the CPU.

    Raises:
        ModelError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            determinism.use_gpu(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {name!r} cannot be used", received=str(error).splitlines()[0], fix="--device auto"
        ) from None
    return device
