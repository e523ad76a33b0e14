"""The machine's processor, beside what torch does with it: settings of torch's libraries, and who else is at work.

In: nothing. Out: environment variables, set before torch is loaded (no torch here); cores that other processes use.

torch's threads spin while they wait for each other. Where another process has one of the cores they do so while it
works: a small model ran at 54 to 246 tokens/s with two threads on a busy machine of two cores, and at 7,700 to 9,900
with threads that sleep. oneDNN, and torch's layer over it, keep a compiled kernel for each distinct number of tokens,
up to 1,024 in each of two caches: five small matrices grew by 160 MiB in 200 steps of different sizes. 128 hold what
one step of a model needs, a dozen shapes in three directions.

torch asks for blocks at multiples of 64 bytes. glibc before 2.39 cuts such a block out of a larger piece and keeps the
cut ends for small objects, which then lie between the blocks: freed blocks do not become one again, and the next block
of the same size fits into none of them (glibc's bug 30723). Without the two caches of small pieces the ends go back:
a model of 33 million parameters took 961 MiB where it took 1,232. glibc reads these
settings only when a process begins, so the command starts itself anew with them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

# When this process began: what Python took before it came here it computed, without waiting
BEGAN = time.perf_counter() - time.process_time()
KERNELS = "128"
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # whoever set one of these has chosen
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": KERNELS, "LRU_CACHE_CAPACITY": KERNELS}
UNBOUNDED = 1024  # torch's and oneDNN's own bound
TUNABLES = "GLIBC_TUNABLES"
MERGING = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
MERGES_ITSELF = (2, 39)  # the glibc that gives the ends of an aligned block back
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")  # large blocks are apart then, or the allocator is another
KERNEL_BYTES = 160 * 2**10  # of a kernel that is kept: benchmarks/kernel_caches.py, by the bound


def set_defaults() -> None:
    """Let threads sleep, and bound the caches of kernels. What is set already stays; where torch is loaded already,
    the process is somebody else's, and nothing is set."""
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in SPINNING):
        os.environ.update(SLEEP)
    if not any(name in os.environ for name in (*CACHES, "DNNL_PRIMITIVE_CACHE_CAPACITY")):
        os.environ.update(CACHES)


def glibc() -> tuple[int, int] | None:
    """The version of the C library, where it is glibc."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):  # Windows, macOS, musl
        return None


def heap_settings(given: Mapping[str, str], version: tuple[int, int] | None) -> dict[str, str]:
    """Variables with which glibc merges what is freed between large blocks; none where it does so by itself, where it
    is no glibc, or where its malloc was set already.

    Args:
        given: the environment.
        version: of glibc.
    """
    tunables = given.get(TUNABLES, "")
    if version is None or version >= MERGES_ITSELF or "glibc.malloc." in tunables or any(map(given.get, CHOSEN)):
        return {}
    return {TUNABLES: ":".join([*filter(None, [tunables]), *(f"{name}={value}" for name, value in MERGING.items())])}


def start_anew() -> None:
    """Start this command again with `heap_settings`, before anything is loaded; does nothing where there are none."""
    settings = heap_settings(os.environ, glibc()) if sys.platform == "linux" else {}
    if settings and sys.executable:
        with suppress(OSError):  # it runs all the same
            arguments = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, arguments, {**os.environ, **settings})  # noqa: S606  # our own arguments, no shell


def kernel_bytes() -> int:
    """What compiled kernels take once both caches are full, as they are after some steps of a run in 16 bits."""
    bounds = (os.environ.get(name, "") for name in CACHES)
    return KERNEL_BYTES * sum(int(bound) if bound.isdecimal() else UNBOUNDED for bound in bounds)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1


@dataclass(frozen=True)
class Moment:
    """Seconds of work done until a moment, of all processes and of this one; since when they count does not matter."""

    at: float
    everyone: float
    mine: float


def moment() -> Moment:
    """Now."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # are in user and nice already
    mine = psutil.Process().cpu_times()
    return Moment(time.perf_counter(), sum(times) - idle - guests, mine.user + mine.system)


def others(since: Moment) -> float:
    """Cores that other processes kept busy since then, on average."""
    now = moment()
    seconds = max(now.at - since.at, 1e-3)
    return max(0.0, (now.everyone - since.everyone - (now.mine - since.mine)) / seconds)
