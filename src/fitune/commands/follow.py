"""A process of a run that is not process 0: it makes its share of each step, and writes nothing.

In: what process 0 resolved. Out: nothing; it ends with the run. It prepares the same job from the same files (the data
from the cache, which process 0 has filled), starts from the tensors of process 0, and applies the same updates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch

from fitune.checks import routercheck, stepchecks
from fitune.commands.active_run import answers_of, held_out_of, measured_before
from fitune.commands.prepare import Job, prepare
from fitune.commands.request import to_train
from fitune.commands.sharing_out import CONFIG, Turn, share
from fitune.commands.signals import passed_on
from fitune.core.config import build
from fitune.core.events import Silent
from fitune.core.files import json_text
from fitune.core.records import Batch
from fitune.data.store import documents_of
from fitune.engine import environment, optim
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loss_scale import LossScale
from fitune.engine.parallel import EndedError, World
from fitune.engine.shards import attend
from fitune.engine.step_runner import StepRunner
from fitune.models import determinism, methods
from fitune.models.devices import pick_device
from fitune.models.parts import trainable


def follow(world: World) -> None:
    """Take part in a run until it ends.

    Raises:
        FituneError: this process cannot go on; the others then stop, too.
    """
    given = world.published(CONFIG)
    if given is None:
        return  # the run was over before its first step
    log = partial(world.log_to, RunFolder(str(given["output"])).path, all_of_it=True)
    apart = given["parallel"] == "shard"  # then process 0 prepares at the same time, and may find what refuses the run
    if not apart:
        log()
    request = to_train(build(given))
    # whether it fits was decided before
    request = replace(request.changed(force=True), processes=world.size)
    with determinism.exact(pick_device(request.config.device)):
        job = prepare(request, Silent(), world=world)
        if apart:
            log()
        determinism.strict(bool(world.published("deterministic")))
        meet(world, job)
        with_steps(world, job)


def meet(world: World, job: Job) -> None:
    """Connect, and compare what the processes work on.

    Raises:
        TrainingError: another process has other settings, data, weights or versions.
    """
    device = job.tuned.device
    world.connect(device, job.config.collective_timeout)
    about = environment.describe(device)
    shapes = {name: [*parameter.shape, str(parameter.dtype)] for name, parameter in trainable(job.tuned.model).items()}
    same = {
        "settings": job.config.model_copy(update={"force": True}).model_dump(mode="json"),
        "data": sorted(job.data_sha256.values()),
        "model": job.inputs,
        "versions": [about["python"], about["packages"]],
        "trained tensors": shapes,
        "steps": [job.total_steps, len(job.loader.samples), job.layout],
    }
    digests = {name: hashlib.sha256(json_text(value).encode()).digest() for name, value in same.items()}
    world.check_same(digests)
    if job.shards is None:
        world.spread(trainable(job.tuned.model))


def with_steps(world: World, job: Job) -> None:
    """What process 0 does, from its first evaluation to the last answer: this process has a share of each."""
    report = Silent().message
    if world.decided()["anew"]:
        measured_before(job, world, report)
    shards = job.shards
    if not _steps(world, job):
        return
    if world.decided()["again"]:  # the best weights, where they are not the last ones
        if shards is None:
            world.spread(trainable(job.tuned.model))
        else:
            shards.put({})
        held_out_of(job, world, report)
    if shards is not None:
        shards.attend_saving()
        # the blocks of a mixture are gathered once more for what process 0 looks at
        routercheck.router_load(job.tuned.model, documents_of(job.loader.samples), job.layout)
    answers_of(job, world, report)


def _steps(world: World, job: Job) -> bool:
    """The steps, from where process 0 begins; is the run finished behind them?"""
    config, model = job.config, job.tuned.model
    make = partial(optim.make, config=config, rates=partial(methods.find(config.method).rates, config))
    shards = job.shards
    if shards is not None:
        optimizer, begun = shards.begin(make, {})
    else:
        parameters = trainable(model)
        optimizer = make(parameters)
        begun = world.begin(parameters, optimizer, {})
    runner = StepRunner(
        model, job.layout, config.max_grad_norm, job.source, lambda _: None,
        parts=begun["parts"], scale=LossScale(*begun["scale"]), objective=job.objective, world=world, shards=shards,
    )  # fmt: skip
    model.train()
    try:
        with passed_on(world.now.wish):
            for number, (_, step) in enumerate(job.loader.steps(begun["step"], begun["end"]), begun["step"]):
                watched = number - begun["step"] < stepchecks.WATCHED
                with stepchecks.step_equality(runner, optimizer) if watched else nullcontext():
                    _step(job, runner, optimizer, number, step)
    except EndedError as ended:
        optimizer.state.clear()
        return ended.finished
    optimizer.state.clear()
    return True


def _step(job: Job, runner: StepRunner, optimizer: torch.optim.Optimizer, number: int, step: Sequence[Batch]) -> None:
    """One step, from 0, and what comes after it.

    Raises:
        EndedError: process 0 has ended the run.
    """
    config, world, shards = job.config, runner.world, runner.shards
    optim.set_learning_rate(optimizer, optim.learning_rate(number, job.total_steps, job.lr, config.warmup))
    world.seed(config.seed, number)
    runner.step(*share(step, job.loader, world, shards, optimizer))
    if (number + 1) % job.eval_every == 0 or number + 1 == job.total_steps:
        held_out_of(job, world, Silent().message)
    if shards is not None:
        turn = Turn(**world.decided())
        if turn.saves:
            trained, states, _ = shards.contents(optimizer)
            attend(trained)
            attend(states)
        if turn.ends:
            raise EndedError(finished=turn.finished)
