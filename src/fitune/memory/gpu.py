"""What a CUDA GPU has and does, asked of torch, the driver and bitsandbytes: the seam that tests replace.

In: the number of a GPU. Out: a Card, each of whose methods answers one question, or raises what was in the way.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fitune.core.units import MIB
from fitune.engine import environment
from fitune.models.kernels import flash
from fitune.models.kernels.target import of

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
ONE_CALL = "flash over documents"  # kernels/flash.py: all documents of a flat batch in one call
SIZE, COPIED = 4096, 256 * MIB  # of a matrix product, and bytes of a copy, that keep any GPU busy
AT_ONCE = 8  # of them before the clock is looked at

Way = Literal["host to device", "device to device"]


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a GPU. bytes: None where the driver does not say."""

    pid: int
    name: str
    bytes: int | None

    def __str__(self) -> str:
        who = "this process" if self.pid == os.getpid() else f"{self.name} (pid {self.pid})"
        return who if self.bytes is None else f"{who} {self.bytes / 2**30:,.1f} GiB"


class Card:
    """A GPU of this machine.

    Args:
        number: torch's.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.device = torch.device("cuda", number)

    def name(self) -> str:
        """As the driver calls it."""
        return torch.cuda.get_device_name(self.device)

    def capability(self) -> tuple[int, int]:
        """Compute capability: (9, 0) of an H100."""
        return torch.cuda.get_device_capability(self.device)

    def versions(self) -> dict[str, str | None]:
        """Of the driver and of the libraries that torch brings."""
        if torch.version.hip:
            return {"ROCm": torch.version.hip}
        cudnn = torch.backends.cudnn.version()
        return {"driver": driver(), "CUDA": torch.version.cuda, "cuDNN": None if cudnn is None else str(cudnn)}

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes, as the driver counts them."""
        return torch.cuda.mem_get_info(self.device)

    def holders(self) -> list[Holder]:
        """Processes that hold memory of it, those that the driver lists: not those of another container."""
        listed = torch.cuda.list_gpu_processes(self.device)
        if "pid" in listed or "process" in listed:
            pairs = re.findall(r"process\s+(\d+)\s+uses\s+([0-9.]+) MB", listed)
            return [_holder(int(pid), round(float(size) * MIB)) for pid, size in pairs]
        asked = nvidia_smi("--query-compute-apps=pid,used_memory", f"--id={self.uuid()}")
        lines = [line.split(",") for line in asked.splitlines() if "," in line]
        return [_holder(int(pid), int(size) * MIB if size.strip().isdigit() else None) for pid, size in lines]

    def uuid(self) -> str:
        """What NVIDIA's tools know it by; their numbers need not be torch's."""
        return f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"

    def half(self) -> torch.dtype:
        """The 16-bit dtype that it computes in hardware."""
        return torch.bfloat16 if self.capability() >= (8, 0) else torch.float16

    def attention(self) -> dict[str, str | None]:
        """Kernels of attention, forward and backward; of each None, or why it is not there."""
        query = torch.ones(1, 2, 64, 64, dtype=self.half(), device=self.device, requires_grad=True)
        found = {name: refused(lambda b=backend: _attend(query, b)) for name, backend in BACKENDS.items()}  # type: ignore[misc]  # a default of a lambda has no type
        why = flash.refusal(of(self.device), 64, self.half())
        return {**found, ONE_CALL: why or refused(lambda: _attend_documents(query))}

    def default_attention(self) -> str:
        """The kernel that torch takes for a causal batch in 16 bits, where nobody chooses."""
        query = torch.ones(1, 2, 64, 64, dtype=self.half(), device=self.device)
        chosen = torch._fused_sdp_choice(query, query, query, None, 0.0, True)
        return next(name for name, backend in BACKENDS.items() if int(backend) == int(chosen))  # type: ignore[call-overload]  # torch's enum has no types

    def bitsandbytes(self) -> tuple[str, bool]:
        """The library of kernels that bitsandbytes loaded, and whether it is for a GPU."""
        from bitsandbytes.cextension import lib

        there = vars(lib).get("_lib")  # it gives a function for every name that it does not know
        if there is None:
            raise RuntimeError(" ".join(str(vars(lib).get("formatted_error", "it found no library")).split())[:300])
        return os.path.basename(str(there._name)), bool(lib.compiled_with_cuda)  # noqa: PTH119

    def product_rate(self, dtype: torch.dtype, seconds: float) -> float:
        """TFLOP/s of large matrix products, over so many seconds."""
        a, b = (torch.ones(SIZE, SIZE, dtype=dtype, device=self.device) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * SIZE**3 * self._each_second(lambda: torch.mm(a, b, out=out), seconds) / 1e12

    def copy_rate(self, way: Way, seconds: float) -> float:
        """Bytes a second: copied from pinned memory, or read and written on the GPU."""
        pinned = way == "host to device"
        where = {"device": "cpu", "pin_memory": True} if pinned else {"device": self.device}
        source = torch.zeros(COPIED, dtype=torch.uint8, **where)
        target = torch.empty(COPIED, dtype=torch.uint8, device=self.device)
        times = self._each_second(lambda: target.copy_(source, non_blocking=True), seconds)
        return (1 if pinned else 2) * COPIED * times

    def _each_second(self, run: Callable[[], object], seconds: float) -> float:
        """How often something runs in a second."""
        run()
        torch.cuda.synchronize(self.device)
        done, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds or not done:
            for _ in range(AT_ONCE):
                run()
            torch.cuda.synchronize(self.device)
            done += AT_ONCE
        return done / passed


def cards() -> list[Card]:
    """The GPUs of this machine, those that this process may see."""
    return [Card(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def refused(run: Callable[[], object]) -> str | None:
    """Why something cannot run, with what torch warned of; None: it ran."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            run()
        except Exception as error:
            reasons = [str(one.message) for one in warned] or [f"{type(error).__name__}: {error}"]
            return " ".join(reasons[-1].split()).split(" (Triggered internally")[0][:160]
    return None


def _attend(query: Tensor, backend: SDPBackend) -> None:
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()


def _attend_documents(query: Tensor) -> None:
    length = query.shape[2]
    bounds = np.array([0, length // 2, length], np.int32)
    there = torch.from_numpy(bounds).to(query.device)
    documents = flash.Documents(torch.from_numpy(bounds), there, there, (length // 2, length // 2))
    flash.attend(query, query, query, documents).sum().backward()


def _holder(pid: int, size: int | None) -> Holder:
    name = "another process"
    with suppress(psutil.Error):
        name = psutil.Process(pid).name()
    return Holder(pid, name, size)


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    return environment.driver() or nvidia_smi("--query-gpu=driver_version").partition("\n")[0].strip() or None


def nvidia_smi(*asked: str) -> str:
    """What NVIDIA's tool says, as lines of values between commas.

    Raises:
        RuntimeError: it is not there, or fails.
    """
    path = shutil.which("nvidia-smi")
    if path is None:
        raise RuntimeError("neither nvidia-ml-py nor nvidia-smi is there to ask")
    command = [path, *asked, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603  # no shell
    if done.returncode:
        raise RuntimeError(f"nvidia-smi: {' '.join((done.stderr or done.stdout).split())[:200]}")
    return done.stdout
