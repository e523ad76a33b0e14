"""What a run ran on: versions, machine, memory; and whether the processor is free for it.

In: nothing. Out: a dictionary for the run folder, a Finding.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import psutil
import torch

from fitune.records import Finding

PACKAGES = ("fitune", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def describe() -> dict[str, Any]:
    """Versions, operating system, processor, threads, memory and GPUs."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],  # noqa: PTH119
    }


SLACK = 0.5  # cores that are asked for in vain before there is a warning


def machine_load(busy: float, threads: int, available: int) -> Finding:
    """Are there cores enough for torch's threads beside what others do?

    Args:
        busy: cores that other processes use.
        threads: of torch.
        available: cores.
    """
    text = f"other processes use {busy:.1f} of {available} cores, torch has {threads} threads"
    if busy + threads <= available + SLACK:
        return Finding("machine-load", "ok", text)
    fewer = max(1, int(available - busy + SLACK))
    fix = ["wait until they are done" if fewer == threads else f"OMP_NUM_THREADS={fewer} in front of the command"]
    if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        fix.insert(0, "OMP_WAIT_POLICY=PASSIVE before torch is loaded, so that its threads do not spin while they wait")
    return Finding("machine-load", "warn", f"{text}: steps take longer than they would alone", "; or ".join(fix))
