"""A run while it is made: its folder, its job and its watcher, and what is measured of it along the way.

In: a prepared job. Out: held-out losses, sample answers, the load of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from fitune.commands.check_log import CheckLog
from fitune.commands.prepare import Job
from fitune.core import processor
from fitune.core.clock import Clock
from fitune.core.events import Watcher
from fitune.core.records import Batch, Conversation, Finding
from fitune.data.batches import in_order, split
from fitune.engine import environment
from fitune.engine.checkpoint import RunFolder
from fitune.engine.drawing import Sampling
from fitune.engine.generation import SIDE_BY_SIDE, answers
from fitune.engine.held_out import HeldOut, held_out
from fitune.engine.out_of_memory import in_fewer
from fitune.engine.parallel import ALONE, World
from fitune.engine.shards import Shards
from fitune.engine.step import first_sums
from fitune.models import adapters, methods

T = TypeVar("T")


@dataclass
class ActiveRun:
    """A run that this process works on.

    Args:
        folder: the run folder.
        job: all that it needs, checked.
        watch: what it reports to.
        clock: counts the seconds of its phases.
        world: the processes that share its steps.
    """

    folder: RunFolder
    job: Job
    watch: Watcher
    clock: Clock
    world: World = ALONE

    @property
    def shards(self) -> Shards | None:
        """Of the model, where it is in some."""
        return self.job.shards

    @cached_property
    def checks(self) -> CheckLog:
        """Takes the checks that are made while it runs."""
        return CheckLog(self.folder, self.watch)

    def held_out(self) -> HeldOut | None:
        """Loss and rewards of the model as it is now; None: no row is held out. Each process does its share."""
        return held_out_of(self.job, self.world, self.watch.message)

    def sample_rows(self) -> list[Conversation]:
        """The held-out rows whose prompts are answered before and after."""
        return sample_rows(self.job)

    def sample_answers(self) -> list[str]:
        """The greedy answers of the model as it is now, one for each of `sample_rows`. Each process does its share."""
        return answers_of(self.job, self.world, self.watch.message)

    def check_machine_load(self, since: processor.Moment) -> None:
        """Keep whether the processor was free while the run went on. It is reported only once: not again where it was
        not free at the start."""
        warned = any(finding.rule == "machine-load" and finding.level == "warn" for finding in self.job.findings)
        for finding in machine_load(self.job, since):
            self.checks.add(finding, quiet=warned)


def held_out_of(job: Job, world: World, report: Callable[[str], None]) -> HeldOut | None:
    """Loss and rewards of the model as it is now, each process with its share of the rows; None: no row is held out.
    All processes go equally often through a model in shards.

    Args:
        job: of the run.
        world: its processes.
        report: is called with one line where fewer rows go side by side.
    """
    if not job.held_out:
        return None
    model, most, objective = job.tuned.model, job.config.batch_size, job.objective
    in_shards = job.shards is not None
    shared = world.added if world.size > 1 else None

    def batches(rows: int) -> Iterator[Batch]:
        """Of this process; which of them these are does not depend on what fits."""
        for batch in islice(in_order(job.held_out, most), world.rank, None, world.size):
            yield from split(batch, -(-len(batch.rows) // rows))

    def sums(rows: int) -> Tensor:
        return first_sums(objective, model, batches(rows), job.layout, idle=idle)

    def measured(rows: int) -> HeldOut:
        return held_out(model, batches(rows), job.layout, objective, shared, idle)

    idle = list(islice(in_order(job.held_out, 1), 1))[: int(in_shards and world.rank >= _batches(job) % world.size > 0)]

    def fitting(work: Callable[[int], T]) -> T:
        return work(most) if in_shards else in_fewer(work, most, "held-out rows", report)

    if objective.first:
        objective = objective.of_step(world.added(fitting(sums)))
    return fitting(measured)


def _batches(job: Job) -> int:
    return -(-len(job.held_out) // job.config.batch_size)


def sample_rows(job: Job) -> list[Conversation]:
    """The held-out rows whose prompts are answered before and after."""
    return job.held_out_rows[: job.config.sample_prompts]


def answers_of(job: Job, world: World, report: Callable[[str], None]) -> list[str]:
    """The greedy answers of the model as it is now to the questions of `sample_rows`, of which each process answers
    some; of a model in shards, which all processes go through together, each answers all."""
    questions = [row.question() for row in sample_rows(job)]
    in_shards = job.shards is not None
    mine = questions if in_shards else questions[world.rank :: world.size]
    sampling = Sampling(max_new_tokens=job.config.sample_tokens)

    def answered(rows: int) -> list[str]:
        some = (mine[start : start + rows] for start in range(0, len(mine), rows))
        return [text for asked in some for text in answers(job.tuned, asked, sampling)]

    if in_shards:
        return answered(SIDE_BY_SIDE)
    of_all = world.gathered(in_fewer(answered, SIDE_BY_SIDE, "prompts answered", report), "sample answers")
    return [of_all[at % world.size][at // world.size] for at in range(len(questions))]


@dataclass(frozen=True)
class Before:
    """Before the first step: of the base model, of the model with what will be trained, and answers of the base."""

    base: HeldOut | None
    start: HeldOut | None
    answers: list[str]


def measured_before(job: Job, world: World, report: Callable[[str], None]) -> Before:
    """Held-out losses and sample answers before the first step; each process does its share."""
    start = held_out_of(job, world, report)
    with adapters.disabled(job.tuned.model):
        same = methods.find(job.config.method).same_at_start
        base = start if same else held_out_of(job, world, report)
        return Before(base, start, answers_of(job, world, report))


def machine_load(job: Job, since: processor.Moment) -> list[Finding]:
    """Was the processor free since a moment? Nothing, where another device computes."""
    if job.tuned.device.type != "cpu":
        return []
    return [environment.machine_load(processor.others(since), torch.get_num_threads(), processor.cores())]
