"""Which blocks are recomputed: as few as a plan needs to fit.

In: a function that plans a run with some blocks recomputed or waiting in main memory, and the blocks through which the
backward pass goes. Out: the cheapest of these plans that fits; it says which blocks they are.

Which ones. Let a block that is kept hold K bytes until its backward pass, and one that is recomputed c, its input. When
the backward pass begins all of them are there, n c + (N - n) K, whichever n they are. When it is at block j, there are
the bytes of the blocks below j, all K of block j, recomputed or not, and the gradients of those above it. The blocks
below j hold least, for every j at once, if the lowest n are the recomputed ones. So no set of n blocks has a lower peak
than the first n above the border of what is trained, and the choice is a number. (The highest block is the one that it
helps least to recompute: its K is there again as soon as the loss is.) Blocks below the border keep nothing. The one at
the border may keep a hidden state less than the others, so that a set without it could take so much less; that one is
not looked for.

How many. The peak falls with n, so the number is between none and all of them; the line through two plans says where to
look, and the plan itself is asked: the one that is returned fits, and the one with a block less does not.

On a CUDA GPU blocks may have what they keep in main memory instead. The inputs of recomputed blocks go there where
recomputing all of them is not enough; and all that blocks keep goes there, with nothing recomputed, where arithmetic
says that copying it twice takes less time than the forward pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from torch import nn

from fitune.core.blocks import Blocks, chosen, named
from fitune.core.config import RunConfig
from fitune.core.plan import Plan
from fitune.core.records import Batch
from fitune.memory import flops
from fitune.memory.device import Device
from fitune.models.interfaces import causal_lm
from fitune.models.parts import block_count, first_trained

How = dict[str, Blocks]  # the settings checkpointing and offload
LINK = 12e9  # bytes a second from a GPU's memory to pinned main memory: PCIe 3.0 x16, the slowest that is common
SHARE = 0.5  # of the free main memory that may be pinned: a process needs some elsewhere too
PATIENCE = 4  # plans, after which a number of blocks is looked for by halves


@dataclass(frozen=True)
class Price:
    """What may be done, and what it costs.

    again: seconds in which all blocks are recomputed for the largest micro-batch; None: nobody knows. apart: is there
    main memory beside the device? main: bytes of it that are free; None: it is another machine's.
    """

    again: float | None
    apart: bool
    main: int | None

    def copying_is_faster(self, saved: int) -> bool:
        """Than recomputing: bytes there and back. Not measured on a GPU, so only where the machine is known."""
        known = self.apart and self.main is not None and self.again is not None
        return known and 2 * saved / LINK < (self.again or 0.0)

    def has_room(self, made: Plan) -> bool:
        """For what waits in main memory."""
        return self.main is None or made.host <= SHARE * self.main


def able(model: nn.Module, which: Blocks) -> list[int]:
    """Of the blocks that a setting means, those that the backward pass goes through: the others keep nothing. None of a
    model that cannot recompute any."""
    if not causal_lm(model).supports_gradient_checkpointing:
        return []
    first = first_trained(model)
    return [number for number in sorted(chosen(which, block_count(model))) if number >= first]


@dataclass(frozen=True)
class Sets:
    """The fields of a plan that say which blocks are recomputed; see there."""

    blocks: int
    recomputed: list[int]
    waiting: list[int]
    more_work: float


def sets(model: nn.Module, config: RunConfig, batch: Batch) -> Sets:
    """Of a model, of its run's settings and its largest micro-batch."""
    again, away = able(model, config.checkpointing), able(model, config.offload)
    return Sets(block_count(model), again, away, _more_work(model, config, batch) if again else 0.0)


def _work_of(model: nn.Module, config: RunConfig, batch: Batch, which: Blocks = True) -> float:
    """Operations that recomputing blocks adds to a micro-batch."""
    found, lengths = flops.counts(model, config), np.diff(batch.bounds)
    again, once = (flops.per_token(found, lengths, 1.0, checkpointing=how) for how in (which, False))
    return (again - once) * float(lengths.sum())


def _more_work(model: nn.Module, config: RunConfig, batch: Batch) -> float:
    """The same of the run's own blocks, as a share of the operations without it."""
    lengths = np.diff(batch.bounds)
    once = flops.per_token(flops.counts(model, config), lengths, batch.targets / max(1, int(lengths.sum())))
    return _work_of(model, config, batch, config.checkpointing) / (once * float(lengths.sum()))


def price(model: nn.Module, config: RunConfig, batch: Batch, where: Device) -> Price:
    """Of a run on a device.

    Args:
        model: with its method.
        config: of the run.
        batch: its largest micro-batch.
        where: it runs.
    """
    again = flops.seconds(
        _work_of(model, config, batch), where.tflops, quantized=config.quant.name != "none", cpu=where.kind == "cpu"
    )
    return Price(again, where.kind == "cuda", where.main)


def cheapest(planned: Callable[[How], Plan], blocks: Sequence[int], price: Price) -> Plan:
    """The plan that takes the least time of those that fit; where none fits, the one that takes the least memory.

    Args:
        planned: makes a plan with such settings.
        blocks: those through which the backward pass goes.
        price: of what may be done.
    """
    known: dict[tuple[int, int], Plan] = {}

    def plan_of(again: int, away: int) -> Plan:
        """With so many of the lowest blocks recomputed, and so many of them waiting."""
        if (again, away) not in known:
            known[again, away] = planned(_how(blocks, again, away))
        return known[again, away]

    every, none = len(blocks), plan_of(0, 0)
    if none.fits is not False or not every:
        return none
    if price.copying_is_faster(none.needed - plan_of(every, 0).needed):
        away = fewest(lambda number: plan_of(0, number), every)
        if away is not None and price.has_room(plan_of(0, away)):
            return plan_of(0, away)
    again = fewest(lambda number: plan_of(number, 0), every)
    if again is not None:
        return plan_of(again, 0)
    if price.apart:
        away = fewest(lambda number: plan_of(every, number), every)
        if away is not None and price.has_room(plan_of(every, away)):
            return plan_of(every, away)
    return min(known.values(), key=lambda one: one.needed)


def _how(blocks: Sequence[int], again: int, away: int) -> How:
    return {"checkpointing": named(blocks[:again]), "offload": named(blocks[:away])}


def fewest(plan_of: Callable[[int], Plan], most: int) -> int | None:
    """The smallest number of blocks, of 1 to most, whose plan fits, where that of 0 does not; None: none does."""
    if not plan_of(most).fits:
        return None
    low, high, tried = 0, most, 0
    while high - low > 1:
        missing, spare = -(plan_of(low).spare or 0), plan_of(high).spare or 0
        share = missing / (missing + spare) if tried < PATIENCE else 0.5
        number = min(high - 1, max(low + 1, low + ceil(share * (high - low))))
        low, high = (low, number) if plan_of(number).fits else (number, high)
        tried += 1
    return high
