"""Memory that was really taken, in MiB."""

from __future__ import annotations

import sys

import psutil
import torch

MIB = 2**20


def resident_mib() -> float:
    """What this process holds in main memory now."""
    return float(psutil.Process().memory_info().rss / MIB)


def peak_mib(device: torch.device) -> float:
    """The most that was held: of the GPU's memory on a GPU, else of main memory by this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device) / MIB)
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset / MIB)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere
