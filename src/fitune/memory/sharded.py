"""What one of several processes takes that has its part of the model: estimated from the plan of one that has it whole.

In: a plan, the sizes of a model's blocks, the number of processes. Out: the plan of one of them. At each moment of a
step the weights, gradients and states of blocks count as its part of them (engine/shards.py), and beside them:

    forward     two blocks: the one at work, and the buffer that it came in
    backward    the block at work, and on a GPU the buffer of the next one; all gradients of the block at work, and
                those of the one before it in the buffer that they are summed from
    load        read by blocks (models/by_blocks.py): one block, as it was read; and what the method trains in blocks,
                whole before these are read. Else the whole model, and as it is shared out this process's part of one
                block
    checkpoint  on a CPU, of process 0: one tensor of what is trained, or of its states, whole (the largest)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from fitune.core import parallel
from fitune.core.config import RunConfig
from fitune.core.plan import Holding, Moment, Plan, Point, size_text
from fitune.engine.shards import ELEMENTWISE
from fitune.memory.storage import GRADIENTS, OTHER, STATES, TRAINABLE, WEIGHTS
from fitune.models import by_blocks, families, quant
from fitune.models.interfaces import causal_lm
from fitune.models.parts import trainable

IN_SHARDS = ("forward", "loss", "backward", "update", "evaluation", "checkpoint")
GATHERED = {"forward": 2, "evaluation": 2}  # blocks
AHEAD = {"cpu": 1}  # in a backward pass: 2 where the next block is gathered meanwhile


def able(config: RunConfig) -> bool:
    """Can a run with these settings be in shards?"""
    waits = config.offload or config.frozen_cache in ("memory", "disk")
    return config.optimizer in ELEMENTWISE and not config.optimizer_in_backward and not waits


@dataclass(frozen=True)
class Blocks:
    """Bytes. frozen, trained: weights in blocks. largest: of all weights of a block. gradients: of the block that has
    most of them. tensor: of the largest trained tensor in a block. share: of all that is trained, what is in
    blocks. one_by_one: they are read so."""

    frozen: int
    trained: int
    largest: int
    gradients: int
    tensor: int
    share: float
    one_by_one: bool = False


def blocks_of(model: nn.Module, config: RunConfig) -> Blocks:
    """The sizes of a model's blocks, on meta or real, in a run with these settings."""
    inner = causal_lm(model)
    frozen = trained = largest = gradients = tensor = 0
    for block in families.of(inner).block_list(inner):
        sizes = {id(p): p.numel() * p.element_size() for p in block.parameters()}
        each = [sizes[id(p)] for p in block.parameters() if p.requires_grad]
        mine, tensor = sum(each), max([tensor, *each])
        frozen, trained = frozen + sum(sizes.values()) - mine, trained + mine
        largest, gradients = max(largest, sum(sizes.values())), max(gradients, mine)
    every = sum(p.numel() * p.element_size() for p in trainable(model).values())
    able = by_blocks.able(config, inner, quant.name_of(inner))
    return Blocks(frozen, trained, largest, gradients, tensor, trained / max(1, every), able)


def chosen(plan: Plan, config: RunConfig, processes: int, model: Callable[[], nn.Module]) -> Plan:
    """The plan of one of several processes: with the whole model, where that fits or is asked for; else in shards.

    Args:
        plan: of one that has the whole model.
        config: asks for a way.
        processes: how many; those on CPUs share main memory.
        model: makes it, on meta.
    """
    if processes == 1:
        return plan
    whole = replace(plan, parallel="replicate", budget=budget_of(plan.budget, plan.device, processes))
    if config.parallel == "replicate" or not able(config) or (config.parallel == "auto" and whole.fits is not False):
        return whole
    parts = planned(whole, blocks_of(model(), config), processes)
    return parts if config.parallel == "shard" or parts.needed < plan.needed else whole


def budget_of(budget: int | None, device: str, processes: int) -> int | None:
    """Bytes that there are for one of so many processes; those of one machine share its main memory."""
    here = parallel.size_here() if parallel.size() > 1 else processes
    return budget if budget is None or device != "cpu" else budget // here


def planned(plan: Plan, blocks: Blocks, processes: int) -> Plan:
    """The plan of one of so many processes.

    Args:
        plan: of one that has the whole model, and its rows of each step.
        blocks: of the model.
        processes: how many.
    """
    course = [replace(point, parts=_parts(point, blocks, processes, plan.device)) for point in plan.timeline]
    tops: dict[str, dict[str, int]] = {}
    for point in course:
        if sum(point.parts.values()) > sum(tops.get(point.phase, {}).values()):
            tops[point.phase] = point.parts
    for moment in plan.phases:
        whole = {name: size for name, size in moment.parts.items() if name not in (STATES, GRADIENTS)}
        if moment.phase == "evaluation" and sum(whole.values()) > sum(tops.get(moment.phase, {}).values()):
            tops[moment.phase] = whole  # before the first step
    phases = [Moment(m.phase, sum(tops[m.phase].values()), tops[m.phase]) for m in plan.phases if m.phase in tops]
    peak = max(phases, key=lambda moment: moment.bytes)
    note = (
        f"one of {processes} processes, in shards: estimated from the trace of a whole model; a part of its blocks "
        f"({size_text(blocks.frozen + blocks.trained)}) is there, and at most {size_text(2 * blocks.largest)} gathered"
    )
    return replace(
        plan,
        parallel="shard",
        phases=phases,
        peak=peak,
        largest=[Holding(name, 1, size) for name, size in peak.parts.items()],
        timeline=course,
        allocated=peak.bytes,
        reserved=None,
        reserved_expandable=None,
        smallest=None,
        needed=peak.bytes + sum(plan.outside.values()),
        notes=[*plan.notes, note],
    )


def _parts(point: Point, blocks: Blocks, processes: int, device: str) -> dict[str, int]:
    """What is there at a moment."""
    phase, parts = point.phase, point.parts
    if phase in ("load", "start") and blocks.one_by_one:
        return _read(parts, blocks, processes)
    if phase not in IN_SHARDS:
        more = blocks.largest // processes if phase == "load" else 0
        return {**parts, **({OTHER: parts.get(OTHER, 0) + more} if more else {})}
    left = 1 - 1 / processes
    found = Counter(parts)
    gradients = blocks.share * parts.get(GRADIENTS, 0)
    states = blocks.share * parts.get(STATES, 0)
    found[WEIGHTS] -= int(blocks.frozen * left)
    found[TRAINABLE] -= int(blocks.trained * left)
    found[STATES] -= int(states * left)
    found[OTHER] += GATHERED.get(phase, 0) * blocks.largest
    if phase == "backward":  # gloo gathers into a buffer of its own before the block begins
        found[OTHER] = max(found[OTHER] + AHEAD.get(device, 2) * blocks.largest, 2 * blocks.largest)
        done = int(gradients // max(1, blocks.gradients)) * blocks.gradients
        found[GRADIENTS] += min(done, blocks.gradients)
        gradients = done
    found[GRADIENTS] -= int(gradients * left)
    if phase == "update":  # the buffer in which they are exchanged has only what is in no block
        exchanged = min(found[OTHER], blocks.trained)
        found[OTHER] -= exchanged
        found[GRADIENTS] += 0 if gradients else exchanged // processes
    if phase == "checkpoint" and device == "cpu":
        found[OTHER] += blocks.tensor
    return {name: size for name, size in found.items() if size > 0}


def _read(parts: Mapping[str, int], blocks: Blocks, processes: int) -> dict[str, int]:
    """What is there at most while blocks are read: as the last one is, or as the first one is, before all others that
    the method has put something on."""
    left = 1 - 1 / processes
    found = Counter(parts)
    found[WEIGHTS] -= int(blocks.frozen * left)
    found[TRAINABLE] -= min(found[TRAINABLE], int(blocks.trained * left))  # a method's own come last
    first = int(blocks.trained * left) - blocks.frozen // processes if blocks.frozen else 0
    found[OTHER] += blocks.largest + max(0, first)
    return {name: size for name, size in found.items() if size > 0}
