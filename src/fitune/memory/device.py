"""Where a run is to fit: a GPU by name or size, or this machine; and what of it no trace sees.

In: `24GB`, `rtx-4090` or `4090`, `this machine`. Out: how much memory there is, and what the driver and its libraries
take beside the tensors: the CUDA context and the workspaces of cuBLAS, measured by `fitune plan --calibrate` and kept
for the GPU's name, else defaults on the safe side.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import torch

from fitune.cache import default_folder
from fitune.errors import ConfigError, ModelError, did_you_mean
from fitune.files import write_atomic
from fitune.memory.measure import resident_mib

MIB, GIB = 2**20, 2**30
HERE = ("this machine", "this-machine", "here", "auto")
CALIBRATIONS = "gpus.json"  # in the cache
CONTEXT = 725 * MIB  # the most that was seen of 300 to 725 MiB: it depends on GPU, driver and the kernels loaded
# torch asks cuBLAS for 4 MiB x 2 + 16 KiB x 8 for each thread that multiplies, 32 MiB on Hopper and later
# (aten/src/ATen/cuda/CublasHandlePool.cpp); one thread goes forward and one backward
WORKSPACE, HOPPER = 8_519_680, 32 * MIB


@dataclass(frozen=True)
class Gpu:
    """A GPU of the catalog. memory_mib: as its driver tells; tflops: of 16-bit matrix products with float32 sums,
    dense, and gigabytes_per_second: of its memory, both as NVIDIA's data sheets give them; bf16: can it compute that?
    """

    name: str
    device: str
    memory_mib: int
    tflops: float
    bf16: bool
    gigabytes_per_second: float


@dataclass(frozen=True)
class Device:
    """Where a run is to fit. budget: bytes that it may take; None: nobody said. kind: cuda or cpu. tflops, bandwidth
    (bytes a second): None where nobody knows. here: is it this machine's?"""

    name: str
    kind: str
    budget: int | None
    bf16: bool = True
    tflops: float | None = None
    bandwidth: float | None = None
    here: bool = False


@dataclass(frozen=True)
class Calibration:
    """Bytes beside the tensors on a GPU. measured: by whom: the date of the calibration; None: these are defaults."""

    context: int = CONTEXT
    workspace: int = WORKSPACE
    measured: str | None = None


@cache
def gpus() -> dict[str, Gpu]:
    """The catalog by name."""
    text = files("fitune").joinpath("gpus.json").read_text(encoding="utf-8")
    return {name: Gpu(name, **values) for name, values in json.loads(text).items()}


def find(text: str | None) -> Device:
    """The device that a text means.

    Args:
        text: a size (24GB, 24576MiB), a name of the catalog, this machine; None: this machine.

    Raises:
        ConfigError: it means nothing.
    """
    if text is None or text.strip().lower() in HERE:
        return here()
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([gm])(?:i?b)?", text.strip().lower())
    if size and float(size[1]) > 0:
        return Device(text, "cuda", int(float(size[1]) * (GIB if size[2] == "g" else MIB)))
    found = named(text)
    speed = found.gigabytes_per_second * 1e9
    return Device(found.name, "cuda", found.memory_mib * MIB, found.bf16, found.tflops, speed)


def named(text: str) -> Gpu:
    """The GPU of the catalog that a text means: `4090`, `RTX 4090`, `rtx4090`, `A100 80G`.

    Raises:
        ConfigError: it means none, or several.
    """
    asked = _bare(text)
    found = [gpu for gpu in gpus().values() if asked in _forms(gpu)]
    driver = by_driver(text)
    if not found and driver is not None:
        found = [driver]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(gpu.name for gpu in found)
        raise ConfigError(f"--gpu {text!r} is the name of several", received=names, fix="name one of them")
    near = f"{text.strip()}GB, if that is its size" if text.strip().isdecimal() and int(text) < 1024 else None
    raise ConfigError(
        f"--gpu {text!r}",
        expected="a size such as 24GB, a GPU such as rtx-4090, or this-machine",
        fix=near or did_you_mean(re.sub(r"[\s_]+", "-", text.strip().lower()), gpus()),
    )


def _bare(name: str) -> str:
    """Letters and digits alone, without the maker's words."""
    text = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    return re.sub(r"(\d)g$", r"\1gb", text)


def _forms(gpu: Gpu) -> set[str]:
    """What a GPU is called: with and without RTX, with and without its size."""
    whole = {_bare(gpu.name), _bare(gpu.device)}
    whole |= {_bare(re.sub(r"[- ]\d+[- ]?gb$", "", name.lower())) for name in (gpu.name, gpu.device)}
    return whole | {re.sub(r"^[rg]tx", "", name) for name in whole}


def here(kind: str = "auto") -> Device:
    """This machine: its first GPU with what is free there, else its main memory."""
    if kind.startswith("cuda") or (kind == "auto" and torch.cuda.is_available()):
        free, _ = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        known = by_driver(name)
        mine = free + torch.cuda.memory_reserved() + calibration(name).context  # the context is there since just now
        bf16 = torch.cuda.get_device_capability()[0] >= 8
        tflops, bandwidth = (known.tflops, known.gigabytes_per_second * 1e9) if known else (None, None)
        return Device(name, "cuda", mine, bf16, tflops, bandwidth, here=True)
    return Device("this machine's CPU", "cpu", psutil.virtual_memory().available + int(resident_mib() * MIB), here=True)


def by_driver(name: str) -> Gpu | None:
    """The GPU of the catalog that a driver calls so: NVIDIA A100-SXM4-80GB is an A100 80 GB, and no A10."""
    there = _words(name)
    near = [gpu for gpu in gpus().values() if _words(gpu.device) <= there]
    return max(near, key=lambda gpu: len(_words(gpu.device)), default=None)


def _words(name: str) -> set[str]:
    return set(re.sub(r"(\d) gb\b", r"\1gb", name.lower().replace("-", " ")).split())


# ---- what no trace sees ----


def calibration(name: str) -> Calibration:
    """What was measured for a GPU of this name, the driver's or the catalog's; else the defaults."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        known = json.loads((default_folder() / CALIBRATIONS).read_text(encoding="utf-8"))
        alike = (one for one in known if (gpu := by_driver(one)) is not None and gpu.name == name)
        return Calibration(**known[name if name in known else next(alike, name)])
    hopper = any(part in name.lower() for part in ("h100", "h200", "h20", "b200", "gb200"))
    return Calibration(workspace=HOPPER if hopper else WORKSPACE)


def calibrate(date: str) -> dict[str, Any]:
    """Measure this machine's GPU and keep it: {"gpu": name, "context": bytes, "workspace": bytes, ...}.

    Args:
        date: of today, kept beside.

    Raises:
        ModelError: there is no CUDA GPU here.
    """
    if not torch.cuda.is_available():
        raise ModelError(
            "no CUDA GPU here to calibrate",
            expected="a machine with one",
            fix=f"plans for other GPUs take defaults: {CONTEXT >> 20} MiB of context, two workspaces of cuBLAS",
        )
    name = torch.cuda.get_device_name()
    torch.zeros(1, device="cuda")
    a = torch.ones(256, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    product = a @ a
    workspace = torch.cuda.memory_allocated() - before - product.numel() * product.element_size()
    product.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    context = _of_this_process(total - free) - torch.cuda.memory_reserved()
    found = Calibration(max(0, context), max(0, workspace) or calibration(name).workspace, date)
    path = default_folder() / CALIBRATIONS
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**known, name: asdict(found)}, indent=1))
    return {"gpu": name, **asdict(found), "file": str(Path(path))}


def _of_this_process(used: int) -> int:
    """What the driver says that this process takes of the GPU; where it does not say, all that is used."""
    with suppress(Exception):  # needs NVIDIA's management library
        import os

        mine = [line for line in torch.cuda.list_gpu_processes().splitlines() if str(os.getpid()) in line]
        size = re.search(r"([0-9.]+) MB", mine[0])
        if size:
            return int(float(size[1]) * MIB)
    return used
