"""Where a run keeps hidden states of its frozen blocks between epochs: in memory, on the disk, or nowhere.

In: a plan without them, what a trace knows of the blocks, how many tokens the rows have. Out: the plan with them. They
are kept where they are read: in a run of more than one epoch, whose lowest blocks are all frozen. auto takes main
memory where there is room to spare, else the disk.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.plan import Plan, size_text
from fitune.core.records import Batch
from fitune.core.units import size_bytes
from fitune.data.batches import Loader
from fitune.data.cache import default_folder
from fitune.data.store import lengths_of
from fitune.memory import chunks, flops
from fitune.memory.device import Device
from fitune.memory.recompute import SHARE
from fitune.models.attached import compute_dtype
from fitune.models.frozen_blocks import below
from fitune.models.interfaces import causal_lm

STATES = "hidden states of frozen blocks"  # in a plan, beside the tensors of a step
DISK_LEFT = 2**30  # bytes of the disk that states leave free: checkpoints go there too


@dataclass(frozen=True)
class Below:
    """Frozen blocks at the bottom of a model. each: bytes of a token's states. later_work: see Plan."""

    blocks: int
    each: int
    later_work: float


@dataclass(frozen=True)
class Epochs:
    """Of a run. tokens: of one epoch. passes: how many there are. folder: where states may lie on a disk; None: it is
    another machine's."""

    tokens: int
    passes: float
    folder: Path | None = None


def epochs(config: RunConfig, where: Device, loader: Loader, steps: int) -> Epochs:
    """Of a run that makes so many optimizer steps."""
    tokens = int(lengths_of(loader.samples).astype(np.int64).sum())
    return Epochs(tokens, steps / max(1, loader.count(0)), folder(config) if where.here else None)


def folder(config: RunConfig) -> Path | None:
    """Where a run keeps on the disk what others do not need: the cache's folder; None: there is none."""
    if config.cache == "none":
        return Path(tempfile.gettempdir())
    with suppress(RunFolderError):
        return default_folder() if config.cache == "auto" else Path(config.cache)
    return None


def of_model(model: nn.Module, config: RunConfig, batch: Batch) -> Below:
    """Of a run's model with its method on it, and its largest micro-batch."""
    count = below(model)
    if not count:
        return Below(0, 0, 1.0)
    inner, lengths = causal_lm(model), np.diff(batch.bounds)
    wide = compute_dtype(model) == torch.float32
    dtype = torch.float32 if wide else inner.get_input_embeddings().weight.dtype
    labelled = batch.targets / max(1, int(lengths.sum()))
    work = flops.later(flops.counts(model, config), lengths, labelled, count, checkpointing=config.checkpointing)
    return Below(count, inner.config.hidden_size * dtype.itemsize, work)


def useless(config: RunConfig, found: Below, epochs: Epochs | None, layout: str) -> str | None:
    """Why a run keeps none, whatever room there is; None: it could."""
    if config.objective != "sft":
        return f"the objective {config.objective} sees two answers of a row"
    if layout != "flat":
        return f"the layout is {layout}, and they are kept of flat batches"
    if not found.blocks:
        return f"the method {config.method} trains something in the first block, or before it"
    if epochs is not None and epochs.passes <= 1:
        return "no row is met twice: there is one epoch"
    return None


def planned(made: Plan, config: RunConfig, found: Below, epochs: Epochs | None, where: Device, layout: str) -> Plan:
    """The plan with hidden states kept where they have room, or where the setting says.

    Args:
        made: without them.
        config: of the run.
        found: of its model.
        epochs: of its rows; None: nobody knows them.
        where: it runs.
        layout: of its batches.

    Raises:
        ConfigError: the setting asks for what cannot be, or the disk has no room for it.
    """
    asked, why = config.frozen_cache, useless(config, found, epochs, layout)
    if asked in ("memory", "disk") and why is not None:
        raise ConfigError(f"--frozen-cache {asked}: {why}", fix="leave --frozen-cache out")
    if epochs is None or asked == "off" or why is not None:
        return made
    size = epochs.tokens * found.each
    place = asked if asked != "auto" else _room(made, size, epochs, where, size_bytes(config.cache_size))
    if place == "off":
        return made
    if asked == "disk" and epochs.folder is not None and size + DISK_LEFT > (free := free_bytes(epochs.folder)):
        raise ConfigError(
            f"--frozen-cache disk: the states take {size_text(size)}, and {size_text(DISK_LEFT)} are to stay free",
            received=f"{size_text(free)} free at {epochs.folder}",
            fix="free some space, name another folder with --cache, or --frozen-cache off",
        )
    kept = replace(made, frozen_cache=place, frozen_blocks=found.blocks, frozen_bytes=size, later_work=found.later_work)
    if place != "memory" or where.kind == "cuda":
        return kept
    return replace(kept, outside={**made.outside, STATES: size}, needed=made.needed + size)


def dropped(made: Plan) -> Plan:
    """The plan of a run that keeps none after all."""
    outside = without(made.outside)
    less = sum(made.outside.values()) - sum(outside.values())
    made = replace(made, outside=outside, needed=made.needed - less)
    return replace(made, frozen_cache="off", frozen_blocks=0, frozen_bytes=0, later_work=1.0)


def without(outside: Mapping[str, int]) -> dict[str, int]:
    """Bytes beside the tensors, without those of states: each plan adds its own."""
    return {name: size for name, size in outside.items() if name != STATES}


def _room(made: Plan, size: int, epochs: Epochs, where: Device, most: int) -> str:
    """Args: most: bytes of the disk that may be taken unasked: as many as all of the cache may."""
    if where.kind == "cuda":
        roomy = where.main is not None and size <= SHARE * where.main
    else:
        roomy = chunks.roomy(made.needed + size, where)
    if roomy:
        return "memory"
    there = epochs.folder
    return "disk" if there is not None and size <= most and size + DISK_LEFT <= free_bytes(there) else "off"


def free_bytes(place: Path) -> int:
    """Of the disk that a folder is on, or will be."""
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
