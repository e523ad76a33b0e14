"""The training loop.

In: a RunConfig. Out: a run folder, and a Result. A run that is killed and resumed is, bit for bit, the unbroken one:
a checkpoint holds the trainable state, the optimizer, the random number generators and the step; the order of the rows
and the learning rate follow from the step alone.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from fitune import adapters, environment, methods, optim, report
from fitune.batches import in_order
from fitune.checkpoint import RunFolder, restore_rng
from fitune.config import RunConfig, build, merge
from fitune.console import Watcher
from fitune.errors import ConfigError, Interrupted, RunFolderError
from fitune.generation import Sampling, answers
from fitune.memory import peak_mib
from fitune.model import trainable
from fitune.prepare import Job, prepare, resolve
from fitune.records import StepRecord
from fitune.step import held_out_loss, training_step


@dataclass(frozen=True)
class Result:
    """What a run reached. Losses are per target token."""

    run: str
    steps: int
    first_loss: float
    last_loss: float
    held_out_loss_before: float | None
    held_out_loss_after: float | None
    trainable_parameters: int
    total_parameters: int
    real_tokens_per_second: float
    peak_memory_mib: float
    expected_memory_mib: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def train(config: RunConfig, *, resume: bool = False, watch: Watcher | None = None) -> Result:
    """Run, or go on with, a training.

    Args:
        config: the settings; with `resume`, those of the run folder (see `resume_config`).
        resume: go on from the newest whole checkpoint of config.output.
        watch: is told what happens.

    Raises:
        FituneError: the run was refused, went wrong, or was interrupted (then it is saved).
    """
    watch = watch or Watcher()
    config = resolve(config)
    run = RunFolder(str(config.output))
    if resume and run.has("result"):
        watch.say(f"{run.path}: this run is finished")
        return Result(**run.read("result"))
    if not resume:
        run.check_free()
    with _deterministic():
        job = prepare(config, watch)
        _tell(job, watch)
        if resume:
            _check_same_data(run, job)
        if not (resume and run.has("before")):
            _begin(run, job)
        with _stop_on_signal() as stopped:
            return _loop(run, job, watch, resume=resume, stopped=stopped)


def resume_config(output: str, given: dict[str, Any]) -> RunConfig:
    """The settings of a run that is to go on; what is given beside must agree with them.

    Raises:
        ConfigError: a setting differs from the run's.
    """
    stored = RunFolder(output).read_config().model_copy(update={"output": output})
    # the run has them resolved, and its data is checked by its SHA-256; where prepared data is kept decides nothing
    paths = ("output", "model", "data", "eval_data", "adapter", "cache")
    others = {name: value for name, value in given.items() if name not in paths}
    wanted = build(merge(stored.model_dump(mode="json"), others))
    differing = [
        f"{name} {getattr(wanted, name)} (the run has {getattr(stored, name)})"
        for name in RunConfig.model_fields
        if getattr(wanted, name) != getattr(stored, name)
    ]
    if differing:
        raise ConfigError(
            f"{output}: a resumed run keeps its settings", received="; ".join(differing), fix="leave these flags out"
        )
    return stored


def _tell(job: Job, watch: Watcher) -> None:
    """Settings, checks, parameters and memory, before anything happens."""
    c = job.config
    watch.settings(
        {
            "model": c.model,
            "data": ", ".join(source.path for source in c.sources()),
            "output": c.output,
            "method": c.method,
            "batch": f"{_batch(c)} x {c.accumulation}, {job.layout}, max length {c.max_length}",
            "steps": f"{job.total_steps} ({len(job.loader.epoch_steps(0))} in the first epoch)",
            "learning rate": f"{job.lr:g}, warm-up {c.warmup:.0%}, cosine to 0",
            "parameters": f"{job.trainable:,} trainable of {job.total:,} ({job.trainable / job.total:.4%})",
            "device": f"{job.tuned.device}, {c.precision}, seed {c.seed}",
        }
    )
    watch.groups(job.groups())
    watch.findings(job.findings)
    watch.memory(job.memory.parts())


def _batch(config: RunConfig) -> str:
    return f"{config.batch_tokens:,} tokens" if config.batch_tokens else f"{config.batch_size} rows"


def _begin(run: RunFolder, job: Job) -> None:
    """What is written, and measured, before the first step."""
    run.create()
    run.write_config(job.config)
    run.write("environment", environment.describe())
    run.write("template", job.tuned.template.as_dict())
    job.tuned.tokenizer.save_pretrained(str(run.tokenizer))
    parts = {name: {"trainable": trained, "total": total} for name, trained, total in job.groups()}
    plan = {"expected_mib": job.memory.parts(), "trainable": job.trainable, "total": job.total, "parts": parts}
    run.write("plan", plan)
    findings = [asdict(finding) for finding in job.findings]
    run.write("data", {"sha256": job.data_sha256, "report": job.report.as_dict(), "findings": findings})
    run.write("before", {"held_out_loss": _held_out(job), "answers": _sample_answers(job)})


def _held_out(job: Job) -> float | None:
    if not job.held_out:
        return None
    return held_out_loss(job.tuned.model, in_order(job.held_out, job.config.batch_size), job.layout)


def _sample_answers(job: Job) -> list[str]:
    asked = [row.question() for row in job.held_out_rows[: job.config.sample_prompts]]
    return answers(job.tuned, asked, Sampling(max_new_tokens=job.config.sample_tokens)) if asked else []


def _check_same_data(run: RunFolder, job: Job) -> None:
    if run.has("data") and run.read("data")["sha256"] != job.data_sha256:
        raise RunFolderError(
            f"{run.path}: the data files changed since this run began", fix="restore them, or start a new run"
        )


def _loop(run: RunFolder, job: Job, watch: Watcher, *, resume: bool, stopped: threading.Event) -> Result:
    """Steps, evaluations and checkpoints, from wherever the run stands to its end."""
    config, model = job.config, job.tuned.model
    parameters = trainable(model)
    optimizer = optim.make(parameters, config, partial(methods.find(config.method).rates, config))
    torch.manual_seed(config.seed)
    start, best = _restore(run, parameters, optimizer, watch) if resume else (0, (None, None))
    run.truncate_steps(start)
    model.train()
    watch.start(job.total_steps, start, job.tuned.device)
    try:
        for step, (epoch, micro_batches) in enumerate(job.loader.steps(start, job.total_steps), start + 1):
            began = time.perf_counter()
            rate = optim.learning_rate(step - 1, job.total_steps, job.lr, config.warmup)
            optim.set_rate(optimizer, rate)
            done = training_step(model, micro_batches, optimizer, config.max_grad_norm, job.layout)
            seconds = time.perf_counter() - began
            last = step == job.total_steps
            loss = _held_out(job) if step % job.eval_every == 0 or last else None
            if loss is not None and (best[1] is None or loss < best[1]):
                best = (step, loss)
            record = StepRecord(
                step, epoch, done.loss, rate, done.grad_norm, done.tokens, done.targets, seconds, held_out_loss=loss
            )
            run.append_step(record)
            watch.step(record)
            if step % job.save_every == 0 or last or best[0] == step or stopped.is_set():
                run.save(step, parameters, optimizer, {"best": best})
                run.prune(config.keep_last, best[0])
            if stopped.is_set() and not last:
                raise Interrupted(
                    f"stopped after step {step} of {job.total_steps}; everything is saved in {run.path}",
                    fix=f"go on with: fitune train --resume --output {run.path}",
                )
    finally:
        watch.stop()
    return _finish(run, job)


def _restore(
    run: RunFolder, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, watch: Watcher
) -> tuple[int, tuple[int | None, float | None]]:
    """Put the newest whole checkpoint back; says so. Without one the run starts anew."""
    whole = run.whole_checkpoints()
    if not whole:
        watch.say("no whole checkpoint yet: starting from the first step")
        return 0, (None, None)
    loaded = run.load(whole[0])
    if loaded.trainable.keys() != parameters.keys():
        raise RunFolderError(f"{whole[0]}: holds other parameters than this run", fix="start a new run")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded.trainable[name])
    optim.load_state(optimizer, parameters, loaded.optimizer, loaded.optimizer_scalars)
    restore_rng(loaded.rng)
    watch.say(f"going on from {whole[0].name}")
    return loaded.step, tuple(loaded.state["best"])


def _finish(run: RunFolder, job: Job) -> Result:
    """The adapter, the answers after, result.json and the report."""
    run.save_adapter(partial(adapters.save, job.tuned.model))
    records, before = run.read_steps(), run.read("before")
    asked = job.held_out_rows[: job.config.sample_prompts]
    after = _sample_answers(job)
    run.write(
        "answers",
        [
            {"prompt": row.prompt()[-1].content, "expected": row.answer(), "before": old, "after": new}
            for row, old, new in zip(asked, before["answers"], after, strict=True)
        ],
    )
    seconds = sum(record.seconds for record in records)
    result = Result(
        run=str(run.path),
        steps=len(records),
        first_loss=records[0].loss,
        last_loss=records[-1].loss,
        held_out_loss_before=before["held_out_loss"],
        held_out_loss_after=records[-1].held_out_loss,
        trainable_parameters=job.trainable,
        total_parameters=job.total,
        real_tokens_per_second=sum(record.tokens for record in records) / max(seconds, 1e-9),
        peak_memory_mib=peak_mib(job.tuned.device),
        expected_memory_mib=job.memory.total,
        seconds=seconds,
    )
    run.write("result", result.as_dict())
    report.write(run)
    return result


@contextmanager
def _deterministic() -> Iterator[None]:
    """Inside, torch uses algorithms that give the same bits every time."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Inside, Ctrl-C and SIGTERM set the event; a second one ends the program at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
