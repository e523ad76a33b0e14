"""Is this machine fit to fine-tune: versions, processors, GPUs, memory, dtypes, a real 4-bit step, the disk.

In: nothing. Out: a list of checks, each with what was found and, where something is broken, its fix.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from fitune.core import processor
from fitune.core.errors import ConfigError
from fitune.core.options import quant_options
from fitune.core.results import Check
from fitune.data import eviction
from fitune.data.cache import default_folder
from fitune.engine import environment
from fitune.memory import gpu
from fitune.memory.device import by_driver
from fitune.memory.gpu import Card
from fitune.models import kernel_faults, quant
from fitune.models.precision import choose, measure
from fitune.models.quant import trust

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy")
LOOK = 0.5  # seconds for which other processes are watched
LEAST_FREE = 2**30  # bytes of disk below which hardly a run's checkpoints fit


def doctor() -> list[Check]:
    """Every check, in the order in which one leans on the other; one that fails unexpectedly is broken, not a crash."""
    found: list[Check] = []
    for check in (_python, _versions, _devices, _memory, _load, _bf16, _bitsandbytes, _rates, _disk):
        try:
            found += check()
        except Exception as error:  # whatever is wrong with a machine is what this verb is to report
            name = check.__name__.removeprefix("_")
            found.append(Check(name, "broken", f"{type(error).__name__}: {_reason(error)}"))
    return found


def _python() -> Iterator[Check]:
    fine = sys.version_info >= (3, 11)
    yield Check(
        "python",
        "ok" if fine else "broken",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if fine else "Python 3.11 or newer",
    )


def tested() -> dict[str, str]:
    """The versions that fitune was tested with, by package."""
    text = files("fitune").joinpath("constraints.txt").read_text(encoding="utf-8")
    lines = re.findall(r"^([\w.-]+)==([\w.+-]+)$", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def _versions() -> Iterator[Check]:
    known = tested()
    for name in PACKAGES:
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, "broken", "not installed", f"pip install {name}")
            continue
        wanted = known.get(name)
        if wanted is None or there.split("+")[0] == wanted:
            yield Check(name, "ok", there)
        else:
            yield Check(name, "warn", f"{there}; tested with {wanted}", f"pip install {name}=={wanted}")


def _devices() -> Iterator[Check]:
    cards = gpu.cards()
    for card in cards:
        yield from _gpu(card)
    if cards:
        return
    if torch.version.cuda or torch.version.hip:
        yield Check(
            "gpu",
            "broken",
            "this torch is built for a GPU, and finds none",
            "install the driver (nvidia-smi must work), or torch for the CPU: pip install torch --index-url "
            "https://download.pytorch.org/whl/cpu",
        )
    elif torch.backends.mps.is_available():
        yield Check("gpu", "ok", "MPS (Apple); fitune is not tested on it")
    else:
        yield Check("gpu", "ok", "none; everything runs on the CPU")


SECONDS = 0.75  # of each rate of a GPU; there are four
Found = tuple[Literal["ok", "warn", "broken"], str, str]


def _gpu(card: Card) -> Iterator[Check]:
    """All about a GPU; what cannot be found out says why, and stops nothing else."""
    probes: dict[str, tuple[Callable[[Card], Found], Literal["warn", "broken"]]] = {
        "": (_identity, "broken"),
        " memory": (_gpu_memory, "warn"),
        " bf16": (_gpu_bf16, "warn"),
        " attention": (_attention, "warn"),
        " bitsandbytes": (_library, "warn"),
        " products": (_products, "broken"),
        " copies": (_copies, "warn"),
    }
    for name, (probe, worst) in probes.items():
        title = f"gpu {card.number}{name}"
        try:
            level, text, fix = probe(card)
        except Exception as error:
            text = f"cannot be found out: {type(error).__name__}: {_reason(error)}"
            yield Check(title, worst, text, DRIVER if worst == "broken" else "")
        else:
            yield Check(title, level, text, fix)


DRIVER = "nvidia-smi must work; free the GPU, restart its driver, or --device cpu"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _identity(card: Card) -> Found:
    major, minor = card.capability()
    try:
        versions = ", ".join(f"{name} {version or 'unknown'}" for name, version in card.versions().items())
    except Exception as error:
        versions = f"versions unknown: {_reason(error)}"
    return "ok", f"{card.name()}, compute capability {major}.{minor}, {versions}", ""


def _gpu_memory(card: Card) -> Found:
    """Free memory, and who holds the rest: a process in another container is not listed."""
    free, total = card.memory()
    text = f"{free / 2**30:,.1f} of {total / 2**30:,.1f} GiB free"
    try:
        holders = card.holders()
    except Exception as error:
        return "ok", f"{text}; who holds the rest is unknown: {_reason(error)}", ""
    if not holders:
        return "ok", f"{text}; the driver lists no process", ""
    return "ok", f"{text}; held by {', '.join(map(str, holders))}", ""


def _gpu_bf16(card: Card) -> Found:
    if card.capability() >= (8, 0):
        return "ok", "in hardware", ""
    return "warn", "not in hardware, which came with compute capability 8.0", "--precision auto takes fp16"


def _attention(card: Card) -> Found:
    """Which kernels are there; what a flat batch takes; and torch's own first choice, which fitune does not take where
    that is cuDNN's, since it plans anew for each length that it meets."""
    found = card.attention()
    there = [name for name, reason in found.items() if reason is None]
    missing = [f"{name} ({reason})" for name, reason in found.items() if reason is not None]
    try:
        first = card.default_attention()
    except Exception as error:
        first = f"unknown ({_reason(error)})"
    parts = [f"there: {', '.join(there) or 'none'}", *([f"not there: {'; '.join(missing)}"] if missing else [])]
    parts.append(f"torch's default: {first}{', which fitune does not take' if first == 'cuDNN' else ''}")
    parts.append("a flat batch: " + ("one call" if found.get(gpu.ONE_CALL) is None else "a call for each document"))
    slow = found.get(gpu.ONE_CALL) is not None and card.capability() >= (8, 0)
    return "warn" if slow else "ok", "; ".join(parts), "pip install --force-reinstall torch" if slow else ""


def _library(card: Card) -> Found:
    name, on_gpu = card.bitsandbytes()
    if on_gpu:
        return "ok", name, ""
    return "broken", f"{name}, which knows no GPU", "pip install --force-reinstall bitsandbytes; --quant none works"


def _products(card: Card) -> Found:
    """Matrix products, beside the data sheet's."""
    half, known = card.half(), by_driver(card.name())
    low, full = (card.product_rate(dtype, SECONDS) for dtype in (half, torch.float32))
    share = f" ({low / known.tflops:.0%} of the data sheet's {known.tflops:,.0f})" if known else ""
    name = str(half).removeprefix("torch.")
    return "ok", f"{low:,.1f} TFLOP/s in {name}{share}, {full:,.1f} in float32", ""


def _copies(card: Card) -> Found:
    there, within = (card.copy_rate(way, SECONDS) for way in ("host to device", "device to device"))
    known = by_driver(card.name())
    share = f" ({within / 1e9 / known.gigabytes_per_second:.0%} of the data sheet's)" if known else ""
    return "ok", f"host to device {there / 1e9:,.1f} GB/s; on the device {within / 1e9:,.0f} GB/s{share}", ""


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 2**30:,.1f} of {memory.total / 2**30:,.1f} GiB free, {psutil.cpu_count()} processors"
    yield Check("memory", "ok", f"{text}, {torch.get_num_threads()} torch threads")


def _load() -> Iterator[Check]:
    since = processor.moment()
    time.sleep(LOOK)
    found = environment.machine_load(processor.others(since), torch.get_num_threads(), processor.cores())
    yield Check("processor", "warn" if found.level == "warn" else "ok", found.text, found.fix or "")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bf16() -> Iterator[Check]:
    device = _device()
    a = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    right = bool(((a @ a) == 64).all())
    chosen, why = choose(device)
    if not right:
        yield Check("bf16", "broken", "a product in bf16 is wrong", "--precision fp32; reinstall torch")
    else:
        yield Check("bf16", "ok", f"computes; --precision auto takes {chosen}: {why}")


def _bitsandbytes() -> Iterator[Check]:
    """A real step through 4-bit and 8-bit weights: the product, and the gradient that goes through it."""
    for name in quant.NAMES:
        try:
            quantizer = quant.find(name)
        except ConfigError as error:
            yield Check(name, "broken", f"{error.what}: {error.received or ''}".rstrip(": "), error.fix or "")
            continue
        yield _quantized_step(name, quantizer)
        if name == "nf4":  # products with int8 weights are torch's own
            yield _kernels(name, quantizer)


# (out, in): rows of whole blocks of 64; multiples of 16 that are none (a bug of bitsandbytes' kernel for AVX512); of 4
PROBES = ((48, 64), (48, 128), (48, 80), (256, 688), (100, 96), (48, 172), (48, 100))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels(name: str, quantizer: Any) -> Check:
    """The shapes that this machine's kernels for packed weights get wrong; fitune finds them in a model by itself."""
    options = [quant_options("nf4"), quant_options("fp4")]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) / 16 for shape in PROBES]
    layers = [quantizer.make(weight, how, _device()) for how in options for weight in weights]
    faults = [fault for dtype in DTYPES for fault in trust.check(layers, dtype)]
    tried = f"{len(layers)} layers in {len(DTYPES)} dtypes"
    if not faults:
        return Check(f"{name} kernels", "ok", f"right for {tried}")
    text = f"{kernel_faults.describe(faults)}; of {tried}"
    return Check(f"{name} kernels", "warn", text, kernel_faults.OTHERS)


def _quantized_step(name: str, quantizer: Any) -> Check:
    device, fix = _device(), "pip install --force-reinstall bitsandbytes; without it --quant none works"
    torch.manual_seed(0)
    weight, x = torch.randn(128, 256) / 16, torch.randn(4, 256, device=device, requires_grad=True)
    try:
        layer = quantizer.make(weight, quant_options(name), device)
        out = layer(x)
        out.sum().backward()
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", fix)
    assert x.grad is not None
    expected = x.detach() @ weight.T.to(device)
    out = out.detach()
    off = float((out - expected).norm() / expected.norm())
    grad = float((x.grad - weight.to(device).sum(0)).norm() / weight.sum(0).norm())
    text = f"forward and backward on {device.type}: output off by {off:.1%}, gradient by {grad:.1%}"
    bound = 0.2 if name == "nf4" else 0.05
    return Check(name, "ok", text) if max(off, grad) < bound else Check(name, "broken", text, fix)


def _rates() -> Iterator[Check]:
    if gpu.cards():  # theirs are measured with larger products
        return
    device = _device()
    measured = measure(device)
    text = ", ".join(f"{name} {rate:,.1f}" for name, rate in measured.items())
    yield Check("matrix products", "ok", f"GFLOP/s on {device.type}: {text}")


def _disk() -> Iterator[Check]:
    places: dict[str, Callable[[], Path]] = {"disk": Path.cwd, "cache": default_folder}
    for name, where in places.items():
        place = next(parent for parent in (where(), *where().parents) if parent.exists())
        free = shutil.disk_usage(place).free
        level: Literal["ok", "broken"] = "ok" if free >= LEAST_FREE else "broken"
        kept = ""
        if name == "cache":
            there = eviction.entries(where())
            kept = f"; prepared data takes {eviction.size_text(sum(one.bytes for one in there))} (--clean removes it)"
        text = f"{free / 2**30:,.1f} GiB free at {where()}{kept}"
        yield Check(name, level, text, "" if level == "ok" else "free some space: fitune doctor --clean")
