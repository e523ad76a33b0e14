"""Optimizer steps that survive running out of memory, and float16 gradients beyond their range.

In: the micro-batches of a step. Out: the step's result, or an error that says which rows, and what would help. A step
that runs out of memory is repeated from where it began (gradients dropped, random numbers restored, no weight had
changed) with every micro-batch in twice as many parts: the objective is a sum over the whole step, and stays the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from fitune.core.errors import TrainingError
from fitune.core.records import Batch, Layout, Source
from fitune.data.batches import split
from fitune.engine import optim, out_of_memory
from fitune.engine.checkpoint import restore_rng, rng_state
from fitune.engine.loss_scale import LossScale
from fitune.engine.non_finite import first_non_finite
from fitune.engine.out_of_memory import SAFE, OutOfMemory, attempt
from fitune.engine.parallel import ALONE, World
from fitune.engine.shards import Shards
from fitune.engine.step import SFT, Made, Objective, StepResult, apply_gradients, first_sums, make_gradients
from fitune.models.parts import trainable

T = TypeVar("T")
MOST_BAD = 3  # steps in a row that are not finite


class Phases(Protocol):
    """What counts memory by the phase of a run (memory.trace.Tracer)."""

    def during(self, phase: str) -> AbstractContextManager[object]:
        """Inside, what is allocated belongs to that phase."""


@dataclass
class StepRunner:
    """Makes the optimizer steps of a run; the rehearsal of the largest step and the training share it.

    Args:
        model: in training mode.
        layout: how documents go through the model.
        max_grad_norm: gradients are scaled down to this norm; 0: they are not.
        source: where a row of the data stands, by its number.
        report: is called with one line when micro-batches are split.
        parts: each micro-batch goes through the model in so many parts; more once memory has run out.
        scale: of the loss. Gradients that are not finite under it halve it, and the step is repeated: no row is lost,
            and it does not count as a bad step.
        objective: what is made small.
        world: the processes that share each step.
        shards: of the model, where it is shared out, too.
    """

    model: nn.Module
    layout: Layout
    max_grad_norm: float
    source: Callable[[int], Source | None]
    report: Callable[[str], None]
    parts: int = 1
    scale: LossScale = field(default_factory=LossScale)
    objective: Objective = SFT
    world: World = ALONE
    shards: Shards | None = None

    def summed(self) -> list[nn.Parameter]:
        """What is trained, of which each process has all of the gradients."""
        return list(trainable(self.model).values()) if self.shards is None else self.shards.outside

    def step(
        self,
        micro_batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        weight: float | None = None,
        idle: Sequence[Batch] = (),
    ) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: all rows of the step; of several processes, those of this one.
            optimizer: with its learning rate set.
            weight: of the whole step, where several processes share it.
            idle: micro-batches that go through the model for nothing.

        Raises:
            TrainingError: a single row does not fit, or the optimizer's states do not.
        """
        start, objective = self.scale.value, self._objective(micro_batches, optimizer, idle)
        while True:
            before = rng_state()
            made = self._gradients(micro_batches, optimizer, weight, idle, objective)
            made = self.world.summed(made, self.summed)
            done = self._apply(made, optimizer)
            if done.finite or not math.isfinite(done.loss) or not self.scale.lower():
                if not done.finite:
                    self.scale.value = start  # no scale would have helped
                self.scale.passed()
                return done
            restore_rng(before)

    def _objective(
        self, micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer, idle: Sequence[Batch]
    ) -> Objective:
        """That of this step. What it must know of the whole step is added up over all processes here, once: a step's
        gradients may be made several times, and not equally often in each process."""
        if not self.objective.first:
            return self.objective

        def sums(reached: list[Batch]) -> Tensor:
            pieces = self._pieces(micro_batches)
            return first_sums(self.objective, self.model, pieces, self.layout, reached.append, idle)

        return self.objective.of_step(self.world.before(self._fitting(sums, micro_batches, optimizer)))

    def _gradients(
        self,
        micro_batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        weight: float | None,
        idle: Sequence[Batch],
        objective: Objective,
    ) -> Made:
        """The first half of a step."""

        def made(reached: list[Batch]) -> Made:
            return self._make(micro_batches, reached, self.scale.value, weight, idle, objective)

        return self._fitting(made, micro_batches, optimizer)

    def _fitting(
        self, work: Callable[[list[Batch]], T], micro_batches: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> T:
        """Work on micro-batches, in as many parts as it takes to fit; it adds each one that it reaches to a list."""
        before = rng_state()
        while True:
            reached = list(micro_batches[:1])
            made = attempt(partial(work, reached))
            if not isinstance(made, OutOfMemory):
                return made
            self._forget(optimizer)
            if isinstance(optimizer, optim.InBackward) or self.shards is not None:
                how = "optimizer_in_backward" if self.shards is None else "the model in shards"
                raise TrainingError(
                    f"out of memory; with {how} a step cannot be repeated",
                    received=made.message,
                    fix="a smaller --batch-size; the last checkpoint is good",
                )
            rows = self._split(micro_batches, reached[-1], made, SAFE)
            restore_rng(before)
            self.report(
                f"out of memory: the step is repeated with micro-batches of at most {rows} rows; "
                "the loss stays the same"
            )

    def _make(
        self,
        micro_batches: Sequence[Batch],
        reached: list[Batch],
        scale: float,
        weight: float | None = None,
        idle: Sequence[Batch] = (),
        objective: Objective | None = None,
    ) -> Made:
        how = (self.layout, scale, objective or self.objective)
        pieces = self._pieces(micro_batches)
        return make_gradients(self.model, pieces, *how, on_batch=reached.append, weight=weight, idle=idle)

    def _pieces(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        return [piece for batch in micro_batches for piece in split(batch, self.parts)]

    def _split(self, micro_batches: Sequence[Batch], reached: Batch, failed: OutOfMemory, more: str) -> int:
        """Twice as many parts from here on; the number of rows that a part has at most.

        Raises:
            TrainingError: the batch that was reached is a single row.
        """
        if len(reached.rows) == 1:
            raise out_of_memory.row_does_not_fit(reached, self.source(reached.rows[0]), failed, more)
        self.parts *= 2
        return max(len(piece.rows) for piece in self._pieces(micro_batches))

    def _apply(self, made: Made, optimizer: torch.optim.Optimizer) -> StepResult:
        how = (self.max_grad_norm, self.scale.value, self.shards)
        done = attempt(partial(apply_gradients, self.model, made, optimizer, *how))
        if not isinstance(done, OutOfMemory):
            return done
        self._forget(optimizer)
        raise out_of_memory.states_do_not_fit(done, SAFE)

    @staticmethod
    def _forget(optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients and the memory of a failed step."""
        optimizer.zero_grad(set_to_none=True)
        out_of_memory.free()

    def rehearse(self, micro_batches: Sequence[Batch], state_bytes: int, phases: Phases) -> None:
        """Make the gradients of the largest step and drop them, so that a step that does not fit is found before
        hours of training. Random numbers are restored, and no weight changes; `parts` is what fits.

        Args:
            micro_batches: those of the step.
            state_bytes: bytes that the optimizer's states will take; on a GPU so many are held meanwhile.
            phases: sees what is allocated.

        Raises:
            TrainingError: a single row does not fit, or the optimizer's states do not.
        """
        before = rng_state()
        while True:
            reached: list[Batch] = []
            failed = attempt(partial(self._rehearse_once, micro_batches, reached, state_bytes, phases))
            self.model.zero_grad(set_to_none=True)
            restore_rng(before)
            if failed is None:
                return
            out_of_memory.free()
            if not reached:
                raise out_of_memory.states_do_not_fit(failed)
            rows = self._split(micro_batches, reached[-1], failed, "")
            self.report(
                f"out of memory in a rehearsal of the largest step: micro-batches have at most {rows} rows from the "
                "start; the loss stays the same"
            )

    def _rehearse_once(
        self, micro_batches: Sequence[Batch], reached: list[Batch], state_bytes: int, phases: Phases
    ) -> None:
        device = next(self.model.parameters()).device
        held = torch.empty(state_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        try:
            with phases.during("step"):
                self._make(micro_batches, reached, 1.0)
        finally:
            del held  # an error keeps this frame: it must not keep the bytes that the next attempt asks for

    def check_finite(self, done: StepResult, micro_batches: Sequence[Batch], bad: int, checkpoint: str) -> int:
        """How many steps in a row were not finite; their weights were not changed.

        Args:
            done: what the step gave.
            micro_batches: its rows.
            bad: how many before this one.
            checkpoint: the newest one that is good, for the message.

        Raises:
            TrainingError: MOST_BAD in a row.
        """
        if done.finite:
            return 0
        if bad + 1 < MOST_BAD:
            return bad + 1
        if self.shards is None:
            first, rows = first_non_finite(self.model, micro_batches, self.layout)
        else:  # which takes all processes
            first, rows = "not looked for in shards", tuple(row for batch in micro_batches for row in batch.rows)
        places = ", ".join(str(self.source(row)) for row in rows[:8])
        raise TrainingError(
            f"{MOST_BAD} steps in a row were not finite, so the run stops; none of them was applied",
            received=f"loss {done.loss}, gradient norm {done.grad_norm}; first non-finite: {first}; rows {places}",
            expected="finite losses and gradients",
            fix=f"a lower --lr, or --precision fp32; look at these rows; the last good checkpoint is {checkpoint}",
        )
