"""`fitune doctor --gpus`: can the processes of a run talk to each other, and how fast?

In: how many processes. Out: checks: NCCL's version, which GPUs reach each other's memory, and the rate of an all-reduce
between real processes, over NCCL between GPUs, else over gloo.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import distributed

from fitune.core.results import Check
from fitune.engine.parallel import World

SECONDS = 10.0  # for which the rate is measured
SIZE = 64 * 2**20  # bytes that are summed at once


def examine(world: World, seconds: float = SECONDS) -> list[Check]:
    """What process 0 found; the others take part.

    Args:
        world: the processes; each takes the GPU of its number, where there is one.
        seconds: of the measurement.
    """
    on_gpu = torch.cuda.device_count() >= world.size
    device = torch.device("cuda", world.local) if on_gpu else torch.device("cpu")
    world.connect(device)
    return [*_nccl(), *_peers(), *_all_reduce(world, device, seconds)]


def _nccl() -> Iterator[Check]:
    if not torch.cuda.is_available():
        yield Check("nccl", "ok", "not looked for: there is no GPU here")
    elif not distributed.is_nccl_available():
        yield Check("nccl", "broken", "this torch has none", "torch for CUDA on Linux; GPUs talk by it")
    else:
        yield Check("nccl", "ok", ".".join(str(part) for part in torch.cuda.nccl.version()))


def _peers() -> Iterator[Check]:
    count = torch.cuda.device_count()
    if count < 2:
        return
    apart = [f"{a} and {b}" for a, b in permutations(range(count), 2) if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        text = f"{count} GPUs; not between {', '.join(apart[:4])}: what they exchange goes through main memory"
        yield Check("peer access", "warn", text, "slower, not wrong; it takes NVLink, or PCIe with P2P switched on")
    else:
        yield Check("peer access", "ok", f"each of {count} GPUs reads the memory of all others")


def _all_reduce(world: World, device: torch.device, seconds: float) -> Iterator[Check]:
    """The rate by the bytes that each process must send and get: 2 (n - 1) / n of those that are summed."""
    ours = torch.full((SIZE // 4,), float(world.rank + 1), device=device)
    times = 0
    began = time.monotonic()
    while bool(world.added(torch.tensor([float(world.rank == 0 and time.monotonic() - began < seconds)]))[0]):
        ours.fill_(float(world.rank + 1))
        distributed.all_reduce(ours)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times += 1
    took = time.monotonic() - began
    how = "NCCL between GPUs" if device.type == "cuda" else "gloo between processes on the CPU; no GPU took part"
    wanted = world.size * (world.size + 1) / 2
    if times and not bool((ours == wanted).all()):
        yield Check("all-reduce", "broken", f"the sum of {world.size} processes is wrong over {how}", "another driver")
        return
    rate = 2 * (world.size - 1) / world.size * SIZE * times / took / 1e9
    each = 1000 * took / max(1, times)
    text = f"{rate:.2f} GB/s in each of {world.size} processes, {SIZE // 2**20} MiB in {each:.1f} ms, by {how}"
    yield Check("all-reduce", "ok", text)
