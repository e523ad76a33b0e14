"""Memory that was really taken. torch is imported only where it is asked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fitune.core.units import MIB

if TYPE_CHECKING:
    import torch


def resident_mib() -> float:
    """What this process holds in main memory now."""
    return float(psutil.Process().memory_info().rss / MIB)


def forget_peak(device: torch.device) -> None:
    """Let peaks count from now on, where the system can: loading maps whole files, whose pages it may drop again, and
    that is no memory that a run needs."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # not everywhere allowed
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> float:
    """The most that was held: of the GPU's memory on a GPU, else of main memory by this process; since `forget_peak`
    on CUDA and Linux, else since the process began."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.max_memory_reserved(device) / MIB)
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset / MIB)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024  # bytes there, KiB elsewhere


def most_allocated(work: Callable[[], object], there: int = 0, mapped: int = 0) -> int:
    """The most bytes of main memory that torch's profiler sees at once; see `allocated`."""
    return allocated(work, there, mapped)[0]


def allocated(work: Callable[[], object], there: int = 0, mapped: int = 0) -> tuple[int, int]:
    """The most bytes of main memory that torch's profiler sees at once while some work is done, in this thread and in
    those that work for it, and what it takes to be left. What a thread of gloo gives back once its work is done it does
    not see: that is too much in both.

    Args:
        work: is done once.
        there: bytes that are held before it.
        mapped: of a file that is read: its pages, which the system may drop, are not counted.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = most = there
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) != mapped:
            now += event.nbytes()
            most = max(most, now)
    return most, now
