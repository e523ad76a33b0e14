"""Traces that are kept, so that the same plan is not traced twice.

In: all that decides what a trace finds, and a function that traces. Out: what it found, from the cache where it is
there. What is of the moment (how much memory is free, what this process holds already) is never kept: a plan adds it.

The key has the settings but for places of files, the model's config, every number of the micro-batches, the device
that is planned for and what was measured of it, this machine's processor, threads and allocator, the code of fitune and
the versions of what it stands on. Where any of it differs the work is traced anew; an entry that does not match its
checksums, or does not hold what it should, is traced anew too.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from fitune.core import processor
from fitune.core.config import RunConfig
from fitune.core.errors import RunFolderError
from fitune.core.files import as_json
from fitune.core.parse import parse
from fitune.core.records import Answers, Batch
from fitune.data.cache import Cache, key
from fitune.engine.integrity import PLACES
from fitune.memory import device, heap
from fitune.memory.frozen import Below
from fitune.memory.recompute import Sets
from fitune.memory.usage import Usage
from fitune.models.kernels import fused
from fitune.models.kernels.target import planned

KIND = "plan"
FILE = "trace.json"
ROOMS = ("core", "data", "models", "engine", "memory")  # whose code decides what a trace finds
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "triton")


@dataclass(frozen=True)
class Traced:
    """What a trace finds, in bytes and numbers of parameters: the fields of the plan that do not depend on the moment.

    allocator: what CUDA's caching allocator makes of it. between: holes in the heap of a CPU process. forms: closed
    forms of the same. sets: which blocks are recomputed. host: bytes of activations that wait in main memory. below:
    frozen blocks.
    """

    usage: Usage
    allocator: dict[str, int]
    between: dict[str, int]
    forms: dict[str, int]
    trainable: int
    total: int
    loss_rows: int
    sets: Sets
    host: int
    below: Below
    how: str = "trace"
    why: str = ""


@dataclass(frozen=True)
class Question:
    """What decides a trace.

    settings: resolved. model_config: transformers config. steps, held_out: micro-batches. others: what else the work
    has, as JSON has it. where: the device.
    """

    settings: RunConfig
    model_config: PretrainedConfig
    steps: Sequence[Sequence[Batch]]
    held_out: Batch | None
    others: Sequence[object]
    where: device.Device

    @property
    def can_be_kept(self) -> bool:
        """Is all that decides it here? Not where an adapter or a tokenizer's files have a say."""
        prompt = self.settings.method == "prompt" and self.settings.prompt.init == "text"
        return self.settings.adapter is None and not prompt

    def key(self) -> str:
        """A name for all of it."""
        settings = {n: v for n, v in self.settings.model_dump(mode="json").items() if n not in PLACES}
        steps = [[_digest(batch) for batch in step] for step in self.steps]
        held_out = None if self.held_out is None else _digest(self.held_out)
        where = [self.where.kind, astuple(self.where.target), asdict(device.calibration(self.where.name))]
        return key(
            settings, _of_model(self.model_config), steps, held_out, list(self.others), where, here(self.where), code()
        )


def _of_model(config: PretrainedConfig) -> list[object]:
    """The class of a config and its values, but for where it was read."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)
    return [f"{type(config).__module__}.{type(config).__qualname__}", values]


def _digest(batch: Batch | Answers) -> str:
    found = hashlib.sha256()
    for name, value in vars(batch).items():
        if isinstance(value, (Batch, Answers)):
            found.update(f"{name} {_digest(value)}".encode())
            continue
        found.update(f"{name} {value.dtype} {value.shape}".encode() if isinstance(value, np.ndarray) else name.encode())
        found.update(np.ascontiguousarray(value).tobytes() if value is not None else b"none")
    return found.hexdigest()


def here(where: device.Device) -> dict[str, object]:
    """What of this machine and process code looks at while it is traced."""
    with planned(where.target):
        kernels = fused.described(where.target)
    return {
        "processor": [platform.machine(), *_processor()],
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "kernels": kernels,
        "heap": heap.taken(os.environ, processor.glibc()) if where.kind == "cpu" else None,
    }


def _processor() -> list[object]:
    """What the processor can do, which decides between kernels."""
    look = getattr(torch.cpu, "get_capabilities", None)  # not in every torch that is supported
    return [torch.backends.cpu.get_cpu_capability(), dict(look()) if look is not None else platform.node()]


@cache
def code(root: Path = Path(__file__).parents[1]) -> str:
    """Changes whenever the code that is traced does, or what it stands on.

    Args:
        root: the folder of the rooms.
    """
    found = hashlib.sha256(sys.version.encode())
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        found.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.update(f"{name} {metadata.version(name)}".encode())
    return found.hexdigest()


def traced(question: Question, where: Cache | None, trace: Callable[[], Traced]) -> Traced:
    """What `trace` finds, from the cache where it is there.

    Args:
        question: all that decides it.
        where: it is kept; None: nowhere.
        trace: does the work. What could not be traced is not kept.

    Raises:
        RunFolderError: the disk is full, or the cache cannot be written.
    """
    if where is None or not question.can_be_kept:
        return trace()
    name = question.key()
    there = where.newest(KIND, name)
    found = None if there is None else _read(there)
    if found is not None:
        return found
    made = trace()
    if made.how == "trace" and there is None:
        where.entry(KIND, name, lambda folder: _write(folder, made))
    return made


def _write(folder: Path, made: Traced) -> None:
    (folder / FILE).write_text(as_json(asdict(made)), encoding="utf-8")


def _read(folder: Path) -> Traced | None:
    """What an entry holds; None: not what it should."""
    try:
        values: Mapping[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return parse(Traced, values, str(folder))
    except (OSError, ValueError, RunFolderError):
        return None
