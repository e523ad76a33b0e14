"""Where a run is to fit: a GPU by name or size, or this machine; and what of it no trace sees.

In: `24GB`, `rtx-4090` or `4090`, `this machine`. Out: how much memory there is, and what the driver and its libraries
take beside the tensors: the CUDA context and the workspaces of cuBLAS, measured by `fitune plan --calibrate` and kept
for the GPU's name, else defaults on the safe side.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import psutil
import torch

from fitune.core.errors import ConfigError, RunFolderError, did_you_mean
from fitune.core.files import write_atomic
from fitune.core.units import GIB, MIB
from fitune.data.cache import default_folder
from fitune.memory.measure import peak_mib, resident_mib
from fitune.models.determinism import CUBLAS_BYTES
from fitune.models.kernels.target import Target

HERE = ("this machine", "this-machine", "here", "auto")
CALIBRATIONS = "gpus.json"  # in the cache
CONTEXT = 725 * MIB  # the most that was seen of 300 to 725 MiB: it depends on GPU, driver and the kernels loaded
# torch asks for what CUBLAS_WORKSPACE_CONFIG says, which a run sets, for each thread that multiplies: one goes forward
# and one backward (aten/src/ATen/cuda/CublasHandlePool.cpp)
WORKSPACE = CUBLAS_BYTES
MOST_GPUS = 16  # of one machine
MULTIPROCESSORS = 144  # of a GPU that nobody named: on the safe side of all but the largest


@dataclass(frozen=True)
class Gpu:
    """A GPU of the catalog. memory_mib: as its driver reports; tflops: of 16-bit matrix products with float32 sums,
    dense, gigabytes_per_second: of its memory, and multiprocessors, all as NVIDIA's data sheets give them; bf16: can it
    compute that?
    """

    name: str
    device: str
    memory_mib: int
    tflops: float
    bf16: bool
    gigabytes_per_second: float
    multiprocessors: int


@dataclass(frozen=True)
class Device:
    """Where a run is to fit. budget: bytes that it may take; None: nobody said. kind: cuda or cpu. tflops, bandwidth
    (bytes a second): None where nobody knows. here: is it this machine's? multiprocessors: of a GPU. total: bytes of
    all its memory; None: as its budget. main: bytes of main memory that are free beside a GPU; None: nobody knows."""

    name: str
    kind: str
    budget: int | None
    bf16: bool = True
    tflops: float | None = None
    bandwidth: float | None = None
    here: bool = False
    multiprocessors: int = MULTIPROCESSORS
    total: int | None = None
    main: int | None = None

    @property
    def target(self) -> Target:
        """What the code that runs there decides by; bf16 came with compute capability 8.0."""
        if self.kind != "cuda":
            return Target(self.kind)
        return Target("cuda", (8, 0) if self.bf16 else (7, 5), self.multiprocessors)


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
    memory = found.memory_mib * MIB
    return Device(found.name, "cuda", memory, found.bf16, found.tflops, speed, multiprocessors=found.multiprocessors)


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
    raise ConfigError(
        f"--gpu {text!r}",
        expected="a size such as 24GB, a GPU such as rtx-4090, or this-machine",
        fix=_meant(text.strip()) or did_you_mean(re.sub(r"[\s_]+", "-", text.strip().lower()), gpus()),
    )


def _meant(text: str) -> str | None:
    """What a number may be that is no size: a size without its unit, or the number of a GPU of this machine."""
    found = re.fullmatch(r"([+-]?[0-9]+(?:\.[0-9]+)?)\s*([gm](?:i?b)?)?", text, re.IGNORECASE)
    if not found or float(found[1]) >= 1024:
        return None
    size = f"{found[1]}GB, if that is its size"
    if text.isdecimal() and int(text) < MOST_GPUS:
        there = f"--device cuda:{text} without --gpu, if that is its number in this machine"
        return f"{size}; {there}" if int(text) else there
    return size if float(found[1]) > 0 else "a size above 0"


def _bare(name: str) -> str:
    """Letters and digits alone, without the name of the maker."""
    text = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    return re.sub(r"(\d)g$", r"\1gb", text)


def _forms(gpu: Gpu) -> set[str]:
    """What a GPU is called: with and without RTX, with and without its size."""
    whole = {_bare(gpu.name), _bare(gpu.device)}
    whole |= {_bare(re.sub(r"[- ]\d+[- ]?gb$", "", name.lower())) for name in (gpu.name, gpu.device)}
    return whole | {re.sub(r"^[rg]tx", "", name) for name in whole}


def here(kind: str = "auto") -> Device:
    """This machine: a GPU with what other processes leave of it, else its main memory.

    Args:
        kind: auto, cpu, cuda, or cuda:1.
    """
    if kind.startswith("cuda") or (kind == "auto" and torch.cuda.is_available()):
        index = torch.device("cuda" if kind == "auto" else kind).index
        return _gpu_here(torch.cuda.current_device() if index is None else index)
    return Device("this machine's CPU", "cpu", psutil.virtual_memory().available + int(resident_mib() * MIB), here=True)


def _gpu_here(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    name, properties = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index)
    known = by_driver(name)
    tflops, bandwidth = (known.tflops, known.gigabytes_per_second * 1e9) if known else (None, None)
    # What this process takes is its own to use, its context too, which grows: a plan counts the whole of it. Where the
    # driver does not say what that is, what torch holds is known to be, and the rest counts as other processes'.
    mine = of_this_process(index)
    budget = free + (torch.cuda.memory_reserved(index) if mine is None else mine)
    bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
    processors = properties.multi_processor_count
    rates = {"tflops": tflops, "bandwidth": bandwidth}
    main = psutil.virtual_memory().available
    return Device(
        name, "cuda", min(budget, total), bf16, **rates, here=True, multiprocessors=processors, total=total, main=main
    )


def by_driver(name: str) -> Gpu | None:
    """The GPU of the catalog that a driver calls so: NVIDIA A100-SXM4-80GB is an A100 80 GB, and no A10."""
    there = _name_parts(name)
    near = [gpu for gpu in gpus().values() if _name_parts(gpu.device) <= there]
    return max(near, key=lambda gpu: len(_name_parts(gpu.device)), default=None)


def _name_parts(name: str) -> set[str]:
    return set(re.sub(r"(\d) gb\b", r"\1gb", name.lower().replace("-", " ")).split())


# ---- what no trace sees ----


def calibration(name: str) -> Calibration:
    """What was measured for a GPU of this name, the driver's or the catalog's; else the defaults."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RunFolderError):
        known = json.loads((default_folder() / CALIBRATIONS).read_text(encoding="utf-8"))
        alike = (one for one in known if (gpu := by_driver(one)) is not None and gpu.name == name)
        return Calibration(**known[name if name in known else next(alike, name)])
    return Calibration()


def of_this_process(index: int) -> int | None:
    """Bytes that the driver says this process takes of a GPU; None: it does not say (that needs nvidia-ml-py)."""
    with suppress(Exception):  # the library is missing, or the driver does not let it look
        mine = [line for line in torch.cuda.list_gpu_processes(index).splitlines() if str(os.getpid()) in line.split()]
        size = re.search(r"([0-9.]+) MB", mine[0])
        if size:
            return int(float(size[1]) * MIB)
    return None


def peak_taken_mib(device: torch.device) -> float:
    """The most that a run took, counted as a plan counts it: on a GPU what torch reserved and the CUDA context beside
    it, as the driver reports, or as a plan supposes where it does not; on a CPU the process."""
    if device.type != "cuda":
        return peak_mib(device)
    mine = of_this_process(device.index or 0)
    supposed = calibration(torch.cuda.get_device_name(device)).context
    context = supposed if mine is None else max(0, mine - torch.cuda.memory_reserved(device))
    return peak_mib(device) + context / MIB


def keep_calibration(name: str, found: Calibration) -> Path:
    """Keep what was measured for a GPU, by its driver's name; the file."""
    path = default_folder() / CALIBRATIONS
    known: dict[str, object] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({**known, name: asdict(found)}, indent=1))
    return path
