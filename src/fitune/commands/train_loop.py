"""The training loop: steps, evaluations and checkpoints, from wherever the run stands to its end.

In: a run that has begun. Out: the last held-out loss; the run folder has the steps and the checkpoints. A run that is
killed and resumed is, bit for bit, the unbroken one: a checkpoint holds the trainable state, the optimizer, the random
number generators and the step; the order of the rows and the learning rate follow from the step alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from fitune.checks import guards, stepchecks
from fitune.commands import resuming
from fitune.commands.active_run import ActiveRun
from fitune.commands.sharing_out import Turn, share
from fitune.commands.signals import interrupted
from fitune.core import processor
from fitune.core.clock import BEFORE, CHECKPOINTS, EVALUATION, STEPS
from fitune.core.config import RunConfig
from fitune.core.files import json_text
from fitune.core.parse import parse
from fitune.core.records import Batch, StepRecord
from fitune.engine import integrity, optim
from fitune.engine.checkpoint import Loaded
from fitune.engine.held_out import HeldOut
from fitune.engine.loss_scale import LossScale
from fitune.engine.shards import Saved
from fitune.engine.step import StepResult
from fitune.engine.step_runner import StepRunner
from fitune.memory.storage import STATES
from fitune.models import methods
from fitune.models.attached import compute_dtype
from fitune.models.parts import trainable


@dataclass
class Progress:
    """How far a run is: what it must remember beside weights, optimizer, random numbers and the runner's state.

    step: optimizer steps made. best_step, best_loss: the evaluation with the lowest held-out loss. worse: evaluations
    since then. bad: steps in a row that were not finite.
    """

    step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    bad: int = 0

    def patience_is_over(self, config: RunConfig) -> bool:
        """Too many evaluations without a better loss."""
        return config.patience is not None and self.worse >= config.patience

    def evaluated(self, loss: float | None) -> None:
        """A held-out loss was measured at this step."""
        if loss is None:
            return
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss, self.worse = self.step, loss, 0
        else:
            self.worse += 1


@dataclass(frozen=True)
class _Saved:
    """What state.json of a checkpoint has beside the step. Older ones have no `next_rows`, `parts` or `scale`."""

    best: tuple[int | None, float | None]  # step and held-out loss
    worse: int = 0
    bad: int = 0
    parts: int = 1
    scale: LossScale = field(default_factory=LossScale)
    next_rows: str | None = None


@dataclass
class Training:
    """The steps of a run.

    Args:
        active: the run.
        runner: makes its steps.
        stopped: is set where the user asked to stop.
    """

    active: ActiveRun
    runner: StepRunner
    stopped: threading.Event

    def __post_init__(self) -> None:
        job = self.active.job
        self.config, self.model, self.total = job.config, job.tuned.model, job.total_steps
        self.parameters = trainable(self.model)
        self.optimizer = self._make(self.parameters)
        self.progress = Progress()
        self.runner.shards = self.active.shards
        self.saved: Saved | None = None  # of a model in shards: of a checkpoint, not yet dealt out
        self.next_rows: str | None = None  # digest of the rows of the next step, where a checkpoint named them
        self.with_best = self.config.final == "best" or self.config.patience is not None

    def run(self, *, resume: bool) -> float | None:
        """All steps that are left; the held-out loss of the weights that the run ends with.

        Args:
            resume: go on from the newest whole checkpoint.

        Raises:
            TrainingError: the run went wrong.
            Interrupted: the user asked to stop, and the run is saved.
        """
        active, watch = self.active, self.active.watch
        active.checks.add(guards.fp16_master(self.model, self.optimizer, active.job.lr, force=self.config.force))
        torch.manual_seed(self.config.seed)
        if resume:
            self._restore()
        active.folder.truncate_steps(self.progress.step)
        self._meet()
        started, bits = self.progress.step, guards.fingerprint(self.model)
        self.model.train()
        since = processor.moment()
        watch.start(self.total, started, str(active.job.tuned.device))
        active.clock.ends(BEFORE)
        try:
            self._loop(started, bits)
        finally:
            watch.stop()
        active.clock.ends(STEPS)
        active.check_machine_load(since)
        self._measure_states()
        active.checks.add(stepchecks.steps_applied(self.optimizer, active.folder.read_steps()))
        rate = guards.rate_that_moves(active.job.lr, self.progress.step - started, self.progress.step)
        active.checks.add(guards.frozen_intact(bits, self.model, rate, "at the end"))
        if self.runner.shards is not None:
            self.optimizer.state.clear()  # what comes now gathers blocks, and trains nothing
        if self.with_best:
            return self._back_to_best()
        active.world.decided({"again": False})
        return active.folder.read_steps()[-1].held_out_loss

    def _loop(self, started: int, bits: guards.Bits) -> None:
        """The steps from `started` on. bits: of all parameters before them."""
        active, progress, run = self.active, self.progress, self.active.folder
        end = progress.step if progress.patience_is_over(self.config) else self.total
        for epoch, micro_batches in active.job.loader.steps(progress.step, end):
            began = time.perf_counter()
            lr = optim.learning_rate(progress.step, self.total, active.job.lr, self.config.warmup)
            progress.step += 1
            optim.set_learning_rate(self.optimizer, lr)
            self._check_rows(micro_batches)
            with self._watched(progress.step - started):
                done = self._step(micro_batches)
            seconds = time.perf_counter() - began
            last = progress.step == self.total
            active.clock.ends(STEPS)
            due = progress.step % active.job.eval_every == 0 or last
            held_out = active.held_out() if due else None
            progress.evaluated(None if held_out is None else held_out.loss)
            active.clock.ends(EVALUATION)
            early = progress.patience_is_over(self.config)
            record = _record(done, step=progress.step, epoch=epoch, lr=lr, seconds=seconds, held_out=held_out)
            run.append_step(record)
            active.watch.step(record)
            if progress.step == started + 2 and done.finite:
                active.checks.add(guards.frozen_intact(bits, self.model, lr))
            progress.bad = self.runner.check_finite(done, micro_batches, progress.bad, run.newest_name())
            if self.runner.world.now.wish.is_set():  # another process was asked to stop
                self.stopped.set()
            due = progress.step % active.job.save_every == 0 or last or early or progress.best_step == progress.step
            saves, ends = self.stopped.is_set() or (due and not progress.bad), early or self.stopped.is_set()
            if self.runner.shards is not None:  # the others gather, and begin no step that this one does not
                self.runner.world.decided(Turn(saves, ends and not last, finished=early).as_dict())
            if saves:
                self._save()
            if self.runner.shards is None and ends and not last:
                self.runner.world.end(self.runner.summed(), self.runner.objective, finished=early)
            if early:
                active.watch.message(f"stopped early: no better held-out loss in {progress.worse} evaluations")
                break
            if self.stopped.is_set() and not last:
                raise interrupted(run, f"stopped after step {progress.step} of {self.total}, saved")

    def _meet(self) -> None:
        """Where there are other processes: they begin from here."""
        progress, scale = self.progress, self.runner.scale
        end = progress.step if progress.patience_is_over(self.config) else self.total
        how = {"step": progress.step, "end": end, "parts": self.runner.parts, "scale": [scale.value, scale.fine]}
        world = self.runner.world
        if self.runner.shards is not None:
            self.optimizer, _ = self.runner.shards.begin(self._make, how, self.saved)
            self.saved = None
        else:
            world.begin(self.parameters, self.optimizer, how)

    def _make(self, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        return optim.make(parameters, self.config, partial(methods.find(self.config.method).rates, self.config))

    def _step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step; of several processes each takes a share of its rows."""
        world, loader = self.runner.world, self.active.job.loader
        if world.size == 1:
            return self.runner.step(micro_batches, self.optimizer)
        world.seed(self.config.seed, self.progress.step - 1)
        return self.runner.step(*share(micro_batches, loader, world, self.runner.shards, self.optimizer))

    def _check_rows(self, micro_batches: Sequence[Batch]) -> None:
        """The first step of a resumed run has the rows that its checkpoint names."""
        if self.next_rows is not None:
            self.active.checks.add(stepchecks.row_order(self.next_rows, self.progress.step, micro_batches))
            self.next_rows = None

    @contextmanager
    def _watched(self, number: int) -> Iterator[None]:
        """Inside, each of the first steps of a process is watched, and refused before it is applied wrongly."""
        if number > stepchecks.WATCHED:
            yield
            return
        with stepchecks.step_equality(self.runner, self.optimizer) as found:
            yield
        for finding in found[-1:]:
            self.active.checks.add(finding, quiet=True)

    def _save(self) -> None:
        """A checkpoint of this step; those that are not needed any more are removed."""
        self.active.clock.ends(STEPS)
        progress, run = self.progress, self.active.folder
        saved = _Saved(
            best=(progress.best_step, progress.best_loss),
            worse=progress.worse,
            bad=progress.bad,
            parts=self.runner.parts,
            scale=self.runner.scale,
            next_rows=stepchecks.next_rows(self.active.job.loader, progress.step),
        )
        if self.runner.shards is None:
            run.save(progress.step, self.parameters, self.optimizer, asdict(saved))
        else:
            trained, states, scalars = self.runner.shards.contents(self.optimizer)
            run.save(progress.step, trained, (states, scalars), asdict(saved))
        run.prune(self.config.keep_last, progress.best_step, progress.step)
        self.active.clock.ends(CHECKPOINTS)

    def _restore(self) -> None:
        """Go on from the newest checkpoint that fits, where there is one."""
        optimizer = None if self.runner.shards is not None else self.optimizer
        loaded = resuming.restore(self.active.checks, self.parameters, optimizer, with_best=self.with_best)
        if loaded is not None:
            if self.runner.shards is not None:
                self.saved = Saved(loaded.trainable, loaded.optimizer, loaded.optimizer_scalars)
            saved = parse(_Saved, loaded.state, str(self.active.folder.checkpoint(loaded.step) / "state.json"))
            self.progress = Progress(loaded.step, *saved.best, worse=saved.worse, bad=saved.bad)
            self.next_rows = saved.next_rows
            self.runner.parts, self.runner.scale = saved.parts, saved.scale

    def _measure_states(self) -> None:
        """What the optimizer holds at the end; beside what the rehearsal took, which had none."""
        run = self.active.folder
        if run.has("measured"):
            states = (tensor for group in self.optimizer.state.values() for tensor in group.values())
            storages = [tensor.untyped_storage() for tensor in states if isinstance(tensor, torch.Tensor)]
            held = {storage.data_ptr(): storage.nbytes() for storage in storages}
            measured = {**run.read("measured"), "at_the_end": {STATES: sum(held.values())}}
            integrity.replace(run, "measured.json", json_text(measured))

    def _back_to_best(self) -> float | None:
        """Put the weights with the best held-out loss back; that loss, measured again where they were read back."""
        step, loss = self.progress.best_step, self.progress.best_loss
        here = step is None or loss is None or step == self.progress.step
        self.active.world.decided({"again": not here})
        if step is None or loss is None or here:
            return loss
        best = resuming.Best(step, loss, compute_dtype(self.model), self._put, self._again)
        return resuming.back_to_best(self.active.checks, best)

    def _put(self, loaded: Loaded) -> None:
        """All processes get the values of a checkpoint."""
        if self.runner.shards is None:
            resuming.put(loaded, self.parameters)
            self.active.world.spread(self.parameters)
        else:
            self.runner.shards.put(loaded.trainable)

    def _again(self) -> float | None:
        """The held-out loss of the weights as they are now."""
        found = self.active.held_out()
        return None if found is None else found.loss


def _record(
    done: StepResult, *, step: int, epoch: float, lr: float, seconds: float, held_out: HeldOut | None
) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=epoch,
        loss=done.loss,
        lr=lr,
        grad_norm=done.grad_norm,
        tokens=done.tokens,
        targets=done.targets,
        seconds=seconds,
        held_out_loss=None if held_out is None else held_out.loss,
        applied=done.finite,
        rewards=done.rewards,
        held_out_rewards=None if held_out is None else held_out.rewards,
    )
