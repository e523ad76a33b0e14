"""The same bits every time, and which of torch's kernels a run takes.

In: nothing. Out: contexts that set torch's switches and put them back. On a CUDA GPU the backward pass of attention is
deterministic only where torch is strict about it: asked merely to warn, it keeps the other kernel and warns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fitune.core.units import MIB

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# 8 buffers of 4 MiB: https://docs.nvidia.com/cuda/cublas/index.html, "Results reproducibility"; torch takes as much
CUBLAS_BUFFERS, CUBLAS_BYTES = ":4096:8", 32 * MIB
FILL = False  # memory as it is given out with NaN: for a test
# Not cuDNN's attention, torch's first choice on newer GPUs: it plans anew for each length that it meets, for a second.
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def use_gpu(device: torch.device) -> None:
    """Make a CUDA GPU this process's own, before the first product on it: cuBLAS reads its setting only then."""
    os.environ.setdefault(CUBLAS, CUBLAS_BUFFERS)
    torch.cuda.set_device(device)


def kernels(device: torch.device) -> AbstractContextManager[None]:
    """Inside, attention goes through kernels that need no plan for each length."""
    return sdpa_kernel(FUSED) if device.type == "cuda" else nullcontext()


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Inside, torch takes algorithms that give the same bits every time, where it has them; `strict` insists on them.
    Memory that is given out is not filled first: nothing here reads what it has not written."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    strict(False)
    switches.fill_uninitialized_memory = FILL
    try:
        with kernels(device):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        switches.fill_uninitialized_memory = fill


def strict(on: bool) -> None:
    """Refuse an operation that has no deterministic algorithm (RuntimeError), or only warn."""
    torch.use_deterministic_algorithms(True, warn_only=not on)


def lacking(error: BaseException) -> str | None:
    """The operation that has no deterministic algorithm, where an error says so."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError) or "deterministic" not in text:
        return None
    return text.split(" does not have a deterministic")[0].split(". ")[0][:120]
