"""The machine and the versions that a run ran on; and whether the processor is free for it.

In: nothing. Out: a dictionary for the run folder, a Finding.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch

from fitune.core.records import Finding

PACKAGES = ("fitune", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers", "numpy")


def describe(device: torch.device) -> dict[str, object]:
    """Versions, operating system, processor, threads, memory and GPUs.

    Args:
        device: the one that is used.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(device),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_mib": psutil.virtual_memory().total >> 20,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],  # noqa: PTH119
    }


def _version(name: str) -> str | None:
    """None: it is not installed, as where the folder of the sources is on the path."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, object]:
    """What decides the bits on a device: its name and, of a GPU, its libraries and driver."""
    if device.type != "cuda":
        return {"name": device.type}
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver(),
    }


DRIVER_FILE = Path("/proc/driver/nvidia/version")


def driver() -> str | None:
    """The version of NVIDIA's driver, from the file where Linux has it; None: not known."""
    try:
        text = DRIVER_FILE.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module\b.*?\s([0-9]+(?:\.[0-9]+)+)\b", text)  # the open one names its machine before
    return found[1] if found else None


DECIDING = ("torch", "transformers", "peft", "bitsandbytes")  # whose versions decide what is computed


def changes(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs, between two of `describe`, that may change the bits of a run."""
    packages, now_packages = (_mapping(one, "packages") for one in (before, now))
    pairs = [(name, packages.get(name), now_packages.get(name)) for name in DECIDING]
    device, now_device = (_mapping(one, "device") for one in (before, now))
    pairs += [(f"device {name}", device[name], now_device.get(name)) for name in device]
    return [f"{name}: {old}, now {new}" for name, old, new in pairs if old is not None and old != new]


def _mapping(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A part of `describe`; empty where an older run folder has none."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


SLACK = 0.5  # cores that may be missing before there is a warning


def machine_load(busy: float, threads: int, available: int) -> Finding:
    """Are there enough cores for torch's threads beside what other processes use?

    Args:
        busy: cores that other processes use.
        threads: of torch.
        available: cores.
    """
    text = f"other processes use {busy:.1f} of {available} cores, torch has {threads} threads"
    if busy + threads <= available + SLACK:
        return Finding("machine-load", "ok", text)
    fewer = max(1, int(available - busy + SLACK))
    fix = ["wait until they have ended" if fewer == threads else f"OMP_NUM_THREADS={fewer} in front of the command"]
    if threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        fix.insert(0, "OMP_WAIT_POLICY=PASSIVE before torch is loaded, so that its threads do not spin while they wait")
    return Finding("machine-load", "warn", f"{text}: steps take longer than they would alone", "; or ".join(fix))
