"""What a run ran on: versions, machine, memory. In: nothing. Out: a dictionary for the run folder."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Any

import psutil
import torch

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
