"""fitune train: from settings to a run folder and a Result; and a run that goes on.

In: a RunConfig. Out: a run folder, and a Result. The parts of a run, in order: prepare.py (checked data, model and
plan), train_summary.py (what is shown), train_start.py (rehearsal, first files), train_loop.py (the steps), and
train_end.py (adapter, answers, report).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from fitune.commands import frozen, resuming, train_summary
from fitune.commands.active_run import ActiveRun, machine_load
from fitune.commands.follow import meet
from fitune.commands.prepare import Job, prepare
from fitune.commands.request import Request, to_train
from fitune.commands.sharing_out import CONFIG, check_shareable
from fitune.commands.signals import resumable, stop_on_signal
from fitune.commands.train_end import finish
from fitune.commands.train_loop import Training
from fitune.commands.train_start import Rehearsal, begin, rehearse
from fitune.core import begun, locks, processor
from fitune.core.clock import CHECKS, REHEARSAL, REQUEST, START, Clock
from fitune.core.config import RunConfig, build, merge, settings_only
from fitune.core.errors import ConfigError
from fitune.core.events import Silent, Watcher
from fitune.core.files import full_disk
from fitune.core.results import Result
from fitune.core.tracking import Callback, Tracker, as_tracker, tracked
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder, config_text
from fitune.engine.loading import base_of
from fitune.engine.loss_scale import LossScale
from fitune.engine.parallel import ALONE, World
from fitune.engine.step import Answers
from fitune.engine.step_runner import StepRunner
from fitune.memory import forget_peak
from fitune.models import determinism, precision
from fitune.models.devices import pick_device
from fitune.views import trackers
from fitune.views.run_records import result_of


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    watch: Watcher | None = None,
    outside: Mapping[str, int] | None = None,
    clock: Clock | None = None,
    world: World = ALONE,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Run, or go on with, a training.

    Args:
        config: the settings; with `resume`, those of the run folder (see `resume_config`).
        resume: go on from the newest whole checkpoint of config.output.
        watch: what happens is reported to it.
        outside: bytes beside the tensors, where a plan of this run was shown before: then there is one figure.
        clock: counts the seconds of its phases; None: from now on.
        world: the processes that share its steps; this one is the first of them.
        callbacks: trackers of the caller's own, beside those of the settings.

    Raises:
        FituneError: the run was refused, went wrong, or was interrupted (then it is saved).
    """
    watch, clock = watch or Silent(), clock or Clock()
    clock.ends(START)
    try:
        with full_disk(), ExitStack() as stack:
            request, run = _take_folder(config, stack, watch)
            request = replace(request, processes=world.size)
            clock.ends(REQUEST)
            settings = request.config.model_dump(mode="json")
            some = _trackers(request.config, callbacks)
            watch = stack.enter_context(tracked(run.path, some, settings, watch, run.read_steps))
            return _train(_Run(run, request, watch, clock, world), resume, outside)
    finally:
        watch.stop()
        world.publish_once(CONFIG, None)  # where it ended before: the others have nothing to do


def _take_folder(config: RunConfig, stack: ExitStack, watch: Watcher) -> tuple[Request, RunFolder]:
    """The checked request, and the run's folder, which is this process's own until the stack is left."""
    while True:
        request = to_train(config)
        run = RunFolder(str(request.config.output))
        try:
            stack.enter_context(locks.held(run.path, watch.message))
        except locks.InUseError:
            if config.output is not None:
                raise
            continue  # another run took the name that was free
        return request, run


def _trackers(config: RunConfig, callbacks: Sequence[Callback]) -> dict[str, Callable[[], Tracker]]:
    """What makes each tracker of a run, by name."""
    mine = {f"callback {n}": partial(as_tracker, one) for n, one in enumerate(callbacks, 1)}
    return {**trackers.made(config.track), **mine}


@dataclass(frozen=True)
class _Run:
    """A run whose folder is taken, and nothing prepared yet."""

    folder: RunFolder
    request: Request
    watch: Watcher
    clock: Clock
    world: World


def _train(begun_: _Run, resume: bool, outside: Mapping[str, int] | None) -> Result:
    """Train, as the one process that works in the folder."""
    run, request, watch = begun_.folder, begun_.request, begun_.watch
    again = not resume and begun.check(run.path)  # the same command once more, after it was stopped
    finished = (resume or again) and resuming.is_finished(run, watch)
    if resume and finished:
        resuming.pages_again(run)
        watch.message(
            f"{run.path}: this run is finished. To train it further: fitune train --adapter {run.path} --output NEW ..."
        )
        return replace(result_of(run), run=str(run.path), history=tuple(run.read_steps()))
    if again:
        request = resuming.with_its_blocks(run, request)
    with determinism.exact(pick_device(request.config.device)):
        since = processor.moment()
        job = prepare(request, watch, outside, begun_.clock, begun_.world)
        job.findings += machine_load(job, since)
        train_summary.show(job, watch)
        if again:
            resuming.check_same_settings(run, job.config)
            watch.message(f"{run.path}: this run was begun and not finished: going on with it")
        if resume or again:
            resuming.check_same_inputs(run, job.data_sha256, job.inputs)
        _publish(begun_.world, job)
        return _go(ActiveRun(run, job, watch, begun_.clock, begun_.world), resume=resume, again=again)


def _publish(world: World, job: Job) -> None:
    """Where there are other processes: what they prepare, which `follow` reads.

    Raises:
        ConfigError: this run cannot be shared.
    """
    if world.size > 1:
        check_shareable(job.config, job.tuned.device)
        world.log_to(RunFolder(str(job.config.output)).path, all_of_it=False)
        world.publish_once(CONFIG, job.config.model_dump(mode="json"))


def _go(active: ActiveRun, *, resume: bool, again: bool) -> Result:
    """The run itself: rehearsal, first files, steps, and the end.

    Args:
        active: all that the run needs, checked.
        resume: --resume was given.
        again: the same command was given once more.
    """
    run, job = active.folder, active.job
    going_on = resume or again
    runner = _runner(active)
    forget_peak(job.tuned.device)
    active.clock.ends(CHECKS)
    rehearsal = _rehearsed(active, runner, known=going_on and run.has("measured"))
    active.clock.ends(REHEARSAL)
    if active.world.size > 1:
        active.world.publish("deterministic", not torch.is_deterministic_algorithms_warn_only_enabled())
        meet(active.world, job)
    anew = not (going_on and resuming.has_begun(run))
    active.world.decided({"anew": anew})
    with resumable(run), _below(active, runner):
        if anew:
            begin(active, rehearsal)
        elif resume and run.read_config().model != job.config.model:
            integrity.replace(run, "config.yaml", config_text(job.config))  # the base model was moved
        with stop_on_signal(active.watch) as stopped:
            return finish(active, Training(active, runner, stopped).run(resume=going_on))


def _runner(active: ActiveRun) -> StepRunner:
    job, report = active.job, active.watch.message
    scale = LossScale(LossScale.START if precision.scaled(job.config) else 1.0)
    how = (job.layout, job.config.max_grad_norm, job.source, report)
    return StepRunner(job.tuned.model, *how, scale=scale, objective=job.objective, world=active.world)


@contextmanager
def _below(active: ActiveRun, runner: StepRunner) -> Iterator[None]:
    """Inside, the runner keeps what frozen blocks give for later epochs, where the plan says so. Not where processes
    share the steps: a row goes to another process in another epoch."""
    job = active.job
    alone = active.world.size == 1
    states = frozen.states(job.plan, job.config, job.loader, active.watch.message) if alone else None
    if states is None:
        yield
        return
    try:
        runner.objective = Answers(states)
        yield
    finally:
        states.close()


def _rehearsed(active: ActiveRun, runner: StepRunner, *, known: bool) -> Rehearsal | None:
    """The rehearsal of the largest step; None where it is known from before the run was stopped, or where the model
    will be in shards. In all cases the
    runner splits micro-batches as it found, and algorithms are deterministic where all operations have one."""
    job = active.job
    if known:
        measured = active.folder.read("measured")
        runner.parts = measured["micro_batch_parts"]
        determinism.strict(measured.get("deterministic", True))
        return None
    if job.shards is not None:  # whole gradients are what shards are there to avoid
        determinism.strict(job.tuned.device.type == "cpu")
        return None
    rehearsal = rehearse(job, runner)
    determinism.strict(rehearsal.deterministic)
    warning = rehearsal.finding(job.tuned.device)
    if warning is not None:
        job.findings.append(warning)
        active.watch.findings([warning])
    return rehearsal


# settings of this stretch of a run that goes on
OF_THIS = ("force", "parallel", "collective_timeout", "track", "track_project")


def resume_config(output: str, given: Mapping[str, object]) -> RunConfig:
    """The settings of a run that is to go on.

    Args:
        output: its folder.
        given: settings beside `--resume`, which must agree with the run's.

    Raises:
        ConfigError: a setting differs from the run's.
    """
    run = RunFolder(output)
    integrity.check(run, (*integrity.BEGIN, *integrity.END), missing=integrity.END)
    stored = run.read_config()
    moved = given.get("model")
    base = stored.model if run.has("result") else base_of(run, stored, None if moved is None else str(moved))
    here = settings_only({name: given[name] for name in OF_THIS if name in given})
    stored = stored.model_copy(
        update={"output": output, "model": base, **{name: getattr(here, name) for name in OF_THIS if name in given}}
    )
    # the run has them resolved, and its data is checked by its SHA-256; where prepared data is kept, and whether a run
    # that may not fit is tried, decides nothing
    others = {name: value for name, value in given.items() if name not in integrity.PLACES}
    wanted = build(merge(stored.model_dump(mode="json"), others))
    differing = [
        f"{name} {getattr(wanted, name)} (the run has {getattr(stored, name)})"
        for name in RunConfig.model_fields
        if getattr(wanted, name) != getattr(stored, name)
    ]
    if differing:
        raise ConfigError(
            f"{output}: a resumed run keeps its settings, and ends where it was to end",
            received="; ".join(differing),
            fix="leave these flags out; to go on from a finished run, by other settings or for more steps, start a new "
            f"one from what it tuned: fitune train --adapter {output} --output NEW ...",
        )
    return stored
