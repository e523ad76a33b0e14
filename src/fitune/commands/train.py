"""The training loop.

In: a RunConfig. Out: a run folder, and a Result. A run that is killed and resumed is, bit for bit, the unbroken one:
a checkpoint holds the trainable state, the optimizer, the random number generators and the step; the order of the rows
and the learning rate follow from the step alone.
"""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fitune.checks import guards, runchecks, stepchecks, textchecks
from fitune.checks.findings import raise_refused
from fitune.commands import resuming
from fitune.commands.prepare import Job, prepare, resolve
from fitune.commands.resuming import note
from fitune.core import begun, locks, processor
from fitune.core.config import RunConfig, build, merge
from fitune.core.errors import ConfigError, Interrupted, RunFolderError
from fitune.core.events import NAME, RUN_FOLDER, Silent, Watcher
from fitune.core.files import full_disk, json_text, write_atomic
from fitune.core.records import Conversation, Finding, StepRecord
from fitune.core.results import Answered, Result
from fitune.core.units import MIB
from fitune.data import given
from fitune.data.batches import in_order
from fitune.engine import environment, integrity, optim
from fitune.engine.checkpoint import Loaded, RunFolder, config_text
from fitune.engine.generation import SIDE_BY_SIDE, Sampling, answers, expected, read
from fitune.engine.loading import base_of
from fitune.engine.recovery import careful_step, check_finite, in_fewer, rehearse
from fitune.engine.step import LossScale, StepResult, held_out_loss
from fitune.memory import device as devices
from fitune.memory import forget_peak
from fitune.memory import plan as plans
from fitune.memory.closed import state_bytes
from fitune.memory.trace import STATES, Tracer, count
from fitune.models import adapters, determinism, handover, hub, methods, precision
from fitune.models.kernels.attention import chosen
from fitune.models.kernels.target import of
from fitune.models.model import causal_lm, compute_dtype, pick_device, trainable
from fitune.views import model_card as modelcard
from fitune.views import plan_page, report


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    watch: Watcher | None = None,
    outside: Mapping[str, int] | None = None,
) -> Result:
    """Run, or go on with, a training.

    Args:
        config: the settings; with `resume`, those of the run folder (see `resume_config`).
        resume: go on from the newest whole checkpoint of config.output.
        watch: is told what happens.
        outside: bytes beside the tensors, where a plan of this run was shown before: then there is one figure.

    Raises:
        FituneError: the run was refused, went wrong, or was interrupted (then it is saved).
    """
    watch = watch or Silent()
    try:
        with full_disk():
            return _train(config, resume, watch, outside)
    finally:
        watch.stop()


def _train(config: RunConfig, resume: bool, watch: Watcher, outside: Mapping[str, int] | None) -> Result:
    with ExitStack() as stack:
        taken, run = _take_folder(config, stack, watch)
        return _alone(run, taken, resume, watch, outside)


def _take_folder(config: RunConfig, stack: ExitStack, watch: Watcher) -> tuple[RunConfig, RunFolder]:
    """The settings, resolved, and the run's folder, which is this process's own until the stack is left."""
    while True:
        taken = resolve(config)
        run = RunFolder(str(taken.output))
        try:
            stack.enter_context(locks.held(run.path, watch.say))
        except locks.InUseError:
            if config.output is not None:
                raise
            continue  # another run took the name that was free
        return taken, run


def _alone(
    run: RunFolder, config: RunConfig, resume: bool, watch: Watcher, outside: Mapping[str, int] | None
) -> Result:
    """Train, as the one process that works in the folder."""
    again = not resume and begun.check(run.path)
    if resume and _is_finished(run, watch):
        resuming.pages_again(run)
        watch.say(
            f"{run.path}: this run is finished. To train it further: fitune train --adapter {run.path} --output NEW ..."
        )
        return Result(**run.read("result"), history=tuple(run.read_steps()))
    if again:  # the command that began a run and was stopped
        _is_finished(run, watch)
    with determinism.exact(pick_device(config.device)):
        since = processor.moment()
        job = prepare(config, watch, outside)
        job.findings += _load(job, since)
        _tell(job, watch)
        if again:
            resuming.check_same_settings(run, job.config)
            watch.say(f"{run.path}: this run was begun and not finished: going on with it")
            resume = True
        if resume:
            _check_same_data(run, job)
        forget_peak(job.tuned.device)
        known = run.read("measured") if resume and run.has("measured") else None
        parts = known["micro_batch_parts"] if known else _rehearse(job, watch)
        determinism.strict((known or job.measured or {}).get("deterministic", True))
        with _told_how_to_go_on(run):
            if not (resume and _has_begun(run)):
                _begin(run, job, watch)
            elif not again and run.read_config().model != job.config.model:
                integrity.replace(run, "config.yaml", config_text(job.config))  # the base was moved
            with _stop_on_signal(watch) as stopped:
                return _loop(run, job, watch, resume=resume, stopped=stopped, parts=parts)


@contextmanager
def _told_how_to_go_on(run: RunFolder) -> Iterator[None]:
    """A second Ctrl-C, and one before the first step: what is there, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if not run.has_settings():
            raise
        newest = Path(run.newest_name()).name
        raise _interrupted(run, f"stopped at once, last checkpoint: {newest}") from None


def _is_finished(run: RunFolder, watch: Watcher) -> bool:
    """Is all there that a finished run has? Raises where something of the run is otherwise than it left it.

    What is gone of what the run made is made again: then the run is not finished.
    """
    there = [*integrity.BEGIN, *integrity.END]
    warned = integrity.check(run, there, missing=integrity.END)
    if warned is not None:
        if _has_begun(run):
            note(run, watch, warned)
        return run.has("result") and run.adapter.is_dir()
    return integrity.complete(run)


def _has_begun(run: RunFolder) -> bool:
    """Is all there that is written before the first step? What was killed before that begins anew."""
    return run.identity is not None or (run.has("before") and any(run.checkpoints.glob("step-*")))


def resume_config(output: str, given: dict[str, Any]) -> RunConfig:
    """The settings of a run that is to go on; what is given beside must agree with them.

    Raises:
        ConfigError: a setting differs from the run's.
    """
    run = RunFolder(output)
    integrity.check(run, (*integrity.BEGIN, *integrity.END), missing=integrity.END)
    stored = run.read_config()
    base = stored.model if run.has("result") else base_of(run, stored, given.get("model"))
    stored = stored.model_copy(
        update={"output": output, "model": base, "force": bool(given.get("force", stored.force))}
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


def _load(job: Job, since: processor.Moment) -> list[Finding]:
    """Where the CPU computes: is it free for it?"""
    if job.tuned.device.type != "cpu":
        return []
    return [environment.machine_load(processor.others(since), torch.get_num_threads(), processor.cores())]


def _tell(job: Job, watch: Watcher) -> None:
    """The run in eight lines, and all of its settings, parameters and checks for whoever wants them."""
    watch.summary(_summary(job))
    watch.settings(_settings(job))
    watch.groups(job.groups())
    watch.kept(job.kept)
    watch.plan(job.plan)
    watch.findings(job.findings)
    for line in job.report.notes:
        watch.say(f"{'note':{NAME}}{line}")
    watch.summary({RUN_FOLDER: str(job.config.output)})


def _summary(job: Job) -> dict[str, str]:
    """Model, data, method and steps, a short line each."""
    c, r = job.config, job.report
    files = [Path(source.path).name for source in c.sources()]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    share = r.trained_tokens / max(1, r.tokens)
    way = c.method if c.quant.name == "none" else f"{c.method} on {c.quant.kind if c.quant.name == 'nf4' else 'int8'}"
    adapter = "" if c.adapter is None else f", going on from {Path(c.adapter).name}"
    cost = f" (+{r.more():.0%} prompts repeated)" if r.repeated else ""
    passes = f"{round(job.total_steps / max(1, len(job.loader.epoch_steps(0))), 2):g}"
    return {
        "model": f"{Path(c.model).name}: {job.total:,} parameters, {c.precision} on {job.tuned.device}",
        "data": f"{files[0]}{more}: {r.kept:,} rows, {r.held_out:,} held out; {r.tokens:,} tokens{cost}, "
        f"{share:.0%} trained",
        "method": f"{way}{adapter}: {job.trainable:,} parameters ({job.trainable / job.total:.2%})",
        "steps": f"{job.total_steps:,} of {_batch(c)}{f' x {c.accumulation}' if c.accumulation > 1 else ''}, "
        f"{passes} {'epoch' if passes == '1' else 'epochs'}; learning rate {job.lr:g}",
    }


def _settings(job: Job) -> dict[str, str]:
    c = job.config
    return {
        "model": c.model,
        "data": ", ".join(source.path for source in c.sources()),
        "template": job.tuned.template.name,
        "attention": chosen(causal_lm(job.tuned.model), compute_dtype(job.tuned.model)),
        "loss": f"logits of {c.loss_rows:,} rows at once",
        "batch": f"{_batch(c)} x {c.accumulation}, {job.layout}, max length {c.max_length}",
        "row lengths": ", ".join(f"{name} {value:,.0f}" for name, value in job.report.lengths.items()),
        "steps": f"{job.total_steps} ({len(job.loader.epoch_steps(0))} in the first epoch)",
        "learning rate": f"{job.lr:g}, warm-up {c.warmup:.0%}, cosine to 0",
        "parameters": f"{job.trainable:,} trainable of {job.total:,} ({job.trainable / job.total:.4%})",
        "device": f"{job.tuned.device}, seed {c.seed}",
        "precision": precision.describe(c),
    }


def _batch(config: RunConfig) -> str:
    return f"{config.batch_tokens:,} tokens" if config.batch_tokens else f"{config.batch_size} rows"


def _begin(run: RunFolder, job: Job, watch: Watcher) -> None:
    """What is written, and measured, before the first step."""
    run.create()
    job.config, moved = given.keep(job.config, run.path)
    job.data_sha256 = {moved.get(path, path): sha256 for path, sha256 in job.data_sha256.items()}
    run.write_config(job.config)
    run.write("environment", environment.describe(job.tuned.device))
    run.write("template", job.tuned.template.as_dict())
    job.tuned.tokenizer.save_pretrained(str(run.tokenizer))
    job.findings.append(runchecks.chat_parity(run, job.config, job.tuned.encoder, job.loader.samples))
    raise_refused(job.findings[-1:])
    parts = {name: {"trainable": trained, "total": total} for name, trained, total in job.groups()}
    kept = [part.as_dict() for part in job.kept]
    plan = {
        **job.plan.as_dict(),
        "trainable": job.trainable,
        "total": job.total,
        "parts": parts,
        "kept": kept,
        "model_revision": hub.revision_of(Path(job.config.model)),
    }
    run.write("plan", plan)
    write_atomic(run.plan_page, plan_page.page(replace(job.plan, trainable=job.trainable, total=job.total)))
    findings = [asdict(finding) for finding in job.findings]
    run.write(
        "data",
        {"sha256": job.data_sha256, "inputs": job.inputs, "report": job.report.as_dict(), "findings": findings},
    )
    before = _held_out(job, watch)
    with adapters.disabled(job.tuned.model):
        base = before if methods.find(job.config.method).same_at_start else _held_out(job, watch)
        answers_of_base = _sample_answers(job, watch)
    run.write("before", {"base_held_out_loss": base, "held_out_loss": before, "answers": answers_of_base})
    if job.measured is not None:
        run.write("measured", job.measured)
    integrity.begin(run)
    if base is not None:
        note(run, watch, textchecks.base_loss(base, len(job.tuned.tokenizer)))


def _rehearse(job: Job, watch: Watcher) -> int:
    """The largest step, before anything is written: in how many parts a micro-batch fits. What it took is for the run
    folder, beside the plan. Where an operation has no deterministic algorithm, a finding says so, and the run goes on
    without."""
    determinism.strict(True)
    try:
        return _rehearse_once(job, watch, deterministic=True)
    except RuntimeError as error:
        operation = determinism.lacking(error)
        if operation is None:
            raise
    determinism.strict(False)
    text = (
        f"{operation} has no deterministic algorithm on {job.tuned.device}: the same run again, or resumed, may differ"
    )
    job.findings.append(Finding("deterministic", "warn", text))
    watch.findings(job.findings[-1:])
    return _rehearse_once(job, watch, deterministic=False)


def _rehearse_once(job: Job, watch: Watcher, *, deterministic: bool) -> int:
    model, device, training = job.tuned.model, job.tuned.device, job.tuned.model.training
    model.train()
    tracer = Tracer(of(device))
    tracer.at("load")
    count(model, tracer)
    tracer.at("")
    largest = job.work.steps[-1]
    states = int(job.trainable * state_bytes(job.config))
    with tracer, tracer.inside(model, causal_lm(model).base_model), _dropping(model, job.config):
        parts = rehearse(model, largest, job.layout, states, tracer, job.source, watch.say)
    tracer.close()
    model.train(training)
    peak = plans.usage(tracer).peak.parts
    job.measured = {"parts": peak, "micro_batch_parts": parts, "deterministic": deterministic}
    return parts


@contextmanager
def _dropping(model: Any, config: RunConfig) -> Iterator[None]:
    """Inside, gradients go as soon as they are there, where the optimizer will drop them in the backward pass."""
    trained = trainable(model).values() if config.optimizer_in_backward else ()
    hooks = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _measured_states(run: RunFolder, optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer holds in the end; beside what the rehearsal took, which had none."""
    if run.has("measured"):
        tensors = [t for states in optimizer.state.values() for t in states.values() if isinstance(t, torch.Tensor)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        measured = {**run.read("measured"), "at_the_end": {STATES: sum(held.values())}}
        integrity.replace(run, "measured.json", json_text(measured))


def _held_out(job: Job, watch: Watcher) -> float | None:
    if not job.held_out:
        return None
    held_out = job.held_out
    return in_fewer(
        lambda rows: held_out_loss(job.tuned.model, in_order(held_out, rows), job.layout),
        job.config.batch_size,
        "held-out rows",
        watch.say,
    )


def _answered(job: Job, row: Conversation, before: str, after: str) -> Answered:
    """The expected answer and both others without their thoughts; an answer that is nothing but a thought is kept."""
    first, then = (read(job.tuned, row.question(), text).content or text for text in (before, after))
    return Answered(row.prompt()[-1].content, expected(job.tuned, row).content, first, then)


def _sample_answers(job: Job, watch: Watcher) -> list[str]:
    asked = [row.question() for row in job.held_out_rows[: job.config.sample_prompts]]
    sampling = Sampling(max_new_tokens=job.config.sample_tokens)

    def answered(rows: int) -> list[str]:
        some = (asked[start : start + rows] for start in range(0, len(asked), rows))
        return [text for questions in some for text in answers(job.tuned, questions, sampling)]

    return in_fewer(answered, SIDE_BY_SIDE, "prompts answered", watch.say)


def _check_same_data(run: RunFolder, job: Job) -> None:
    if run.has("data") and list(run.read("data")["sha256"].values()) != list(job.data_sha256.values()):
        raise RunFolderError(
            f"{run.path}: the data files changed since this run began", fix="restore them, or start a new run"
        )
    stored = run.read("data").get("inputs", {}) if run.has("data") else {}
    changed = sorted(name for name, value in job.inputs.items() if stored.get(name, value) != value)
    if changed:
        raise RunFolderError(
            f"{run.path}: {', '.join(changed)} changed since this run began",
            fix="restore what lies in the model's folder, or start a new run",
        )


@dataclass
class _State:
    """What a run must remember beside weights, optimizer and random numbers; part of every checkpoint."""

    step: int = 0
    best: tuple[int | None, float | None] = (None, None)  # step and held-out loss
    worse: int = 0  # evaluations since then
    bad: int = 0  # steps in a row that were not finite
    parts: int = 1  # in which each micro-batch goes through the model, so that it fits
    scale: LossScale = field(default_factory=LossScale)  # of float16 losses

    def as_dict(self) -> dict[str, Any]:
        """For state.json, which has the step already."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    def patience_is_over(self, config: RunConfig) -> bool:
        """Too many evaluations without a better loss."""
        return config.patience is not None and self.worse >= config.patience

    def evaluated(self, loss: float | None) -> None:
        """A held-out loss was measured at this step."""
        if loss is None:
            return
        better = math.isfinite(loss) and (self.best[1] is None or loss < self.best[1])
        self.best, self.worse = ((self.step, loss), 0) if better else (self.best, self.worse + 1)


def _loop(run: RunFolder, job: Job, watch: Watcher, *, resume: bool, stopped: threading.Event, parts: int) -> Result:
    """Steps, evaluations and checkpoints, from wherever the run stands to its end."""
    config, model = job.config, job.tuned.model
    parameters = trainable(model)
    optimizer = optim.make(parameters, config, partial(methods.find(config.method).rates, config))
    note(run, watch, guards.fp16_master(model, optimizer, job.lr, force=config.force))
    torch.manual_seed(config.seed)
    with_best = config.final == "best" or config.patience is not None
    loaded = resuming.restore(run, parameters, optimizer, watch, with_best=with_best) if resume else None
    scale = LossScale(LossScale.START if precision.scaled(config) else 1.0)
    order = loaded.state.pop("next_rows", None) if loaded else None  # older checkpoints have none
    state = _restored(loaded) if loaded else _State(parts=parts, scale=scale)
    run.truncate_steps(state.step)
    started, bits = state.step, guards.fingerprint(model)
    model.train()
    since = processor.moment()
    watch.start(job.total_steps, state.step, str(job.tuned.device))
    try:
        end = state.step if state.patience_is_over(config) else job.total_steps
        for epoch, micro_batches in job.loader.steps(state.step, end):
            began = time.perf_counter()
            rate = optim.learning_rate(state.step, job.total_steps, job.lr, config.warmup)
            state.step += 1
            optim.set_rate(optimizer, rate)
            if order is not None:
                note(run, watch, stepchecks.row_order(order, state.step, micro_batches))
                order = None
            how = (config.max_grad_norm, job.layout, state.parts, state.scale, job.source, watch.say)
            with _first_steps(run, job, optimizer, state, state.step - started):
                done, state.parts = careful_step(model, micro_batches, optimizer, *how)
            seconds = time.perf_counter() - began
            last = state.step == job.total_steps
            loss = _held_out(job, watch) if state.step % job.eval_every == 0 or last else None
            state.evaluated(loss)
            early = state.patience_is_over(config)
            record = _record(state.step, epoch, done, rate, seconds, loss)
            run.append_step(record)
            watch.step(record)
            where = {"sources": job.source, "checkpoint": run.newest_name()}
            if state.step == started + 2 and done.finite:
                note(run, watch, guards.frozen_intact(bits, model, rate))
            state.bad = check_finite(model, state.bad, done, micro_batches, job.layout, where)
            due = state.step % job.save_every == 0 or last or early or state.best[0] == state.step
            if stopped.is_set() or (due and not state.bad):
                _save(run, job, optimizer, state)
            if early:
                watch.say(f"stopped early: no better held-out loss in {state.worse} evaluations")
                break
            if stopped.is_set() and not last:
                raise _interrupted(run, f"stopped after step {state.step} of {job.total_steps}, saved")
    finally:
        watch.stop()
    _note_load(run, job, watch, since)
    _measured_states(run, optimizer)
    note(run, watch, stepchecks.steps_applied(optimizer, run.read_steps()))
    whole_run = 2 * (state.step - started) > state.step  # of a short rest the learning rate may be next to zero
    note(run, watch, guards.frozen_intact(bits, model, job.lr if whole_run else 0, "at the end"))
    if with_best:
        return _finish(run, job, watch, _back_to_best(run, job, state, watch))
    return _finish(run, job, watch, run.read_steps()[-1].held_out_loss)


@contextmanager
def _first_steps(
    run: RunFolder, job: Job, optimizer: torch.optim.Optimizer, state: _State, number: int
) -> Iterator[None]:
    """Inside, each of the first two steps of a process is watched, and refused before it is applied wrongly."""
    if number > 2:
        yield
        return
    told: list[Finding] = []
    how = (job.config.max_grad_norm, lambda: state.scale.value, told)
    with stepchecks.step_equality(job.tuned.model, optimizer, *how):
        yield
    for finding in told[-1:]:
        note(run, Silent(), finding)


def _save(run: RunFolder, job: Job, optimizer: torch.optim.Optimizer, state: _State) -> None:
    """A checkpoint after the step that was made, and none of those that are not needed any more."""
    rows = {"next_rows": stepchecks.next_rows(job.loader, state.step)}
    run.save(state.step, trainable(job.tuned.model), optimizer, {**state.as_dict(), **rows})
    run.prune(job.config.keep_last, state.best[0], state.step)


def _note_load(run: RunFolder, job: Job, watch: Watcher, since: processor.Moment) -> None:
    """Was the CPU free while it ran? Told once: not again where it was not at the start."""
    warned = any(finding.rule == "machine-load" and finding.level == "warn" for finding in job.findings)
    for finding in _load(job, since):
        note(run, Silent() if warned else watch, finding)


def _interrupted(run: RunFolder, what: str) -> Interrupted:
    """One line: what was done, and how to go on."""
    return Interrupted(f"{what}. Resume with: fitune train --resume --output {shlex.quote(str(run.path))}")


def _record(
    step: int, epoch: float, done: StepResult, rate: float, seconds: float, held_out: float | None
) -> StepRecord:
    figures = (done.loss, rate, done.grad_norm, done.tokens, done.targets, seconds, held_out, done.finite)
    return StepRecord(step, epoch, *figures)


def _back_to_best(run: RunFolder, job: Job, state: _State, watch: Watcher) -> float | None:
    """Put the weights with the best held-out loss back; that loss, measured again where they were read back."""
    step, loss = state.best
    if step is None or loss is None or step == state.step:
        return loss
    measure, model = partial(_held_out, job, watch), job.tuned.model
    return resuming.back_to_best(run, trainable(model), (step, loss), measure, compute_dtype(model), watch)


def _restored(loaded: Loaded) -> _State:
    """What a checkpoint remembers beside weights, optimizer and random numbers."""
    state = {**loaded.state, "step": loaded.step, "best": tuple(loaded.state["best"])}
    return _State(**{**state, "scale": LossScale(**state.get("scale", {}))})


def _finish(run: RunFolder, job: Job, watch: Watcher, held_out: float | None) -> Result:
    """The adapter, the answers after, result.json and the report."""
    run.save_adapter(partial(adapters.save, job.tuned.model))
    saved = guards.saved_complete(job.tuned.model, run.adapter, guards.probe(job.loader.samples), job.layout)
    note(run, watch, saved)
    records, before = run.read_steps(), run.read("before")
    asked = job.held_out_rows[: job.config.sample_prompts]
    after = _sample_answers(job, watch)
    run.write(
        "answers",
        [
            _answered(job, row, old, new).as_dict()
            for row, old, new in zip(asked, before["answers"], after, strict=True)
        ],
    )
    seconds = sum(record.seconds for record in records)
    finite = [record for record in records if record.applied] or records
    result = Result(
        run=str(run.path),
        steps=len(records),
        first_loss=finite[0].loss,
        last_loss=finite[-1].loss,
        base_held_out_loss=before["base_held_out_loss"],
        held_out_loss_before=before["held_out_loss"],
        held_out_loss_after=held_out,
        trainable_parameters=job.trainable,
        total_parameters=job.total,
        real_tokens_per_second=sum(record.tokens for record in records) / max(seconds, 1e-9),
        peak_memory_mib=devices.peak_taken_mib(job.tuned.device),
        expected_memory_mib=job.plan.needed / MIB,
        seconds=seconds,
        history=tuple(records),
    )
    handed = handover.of_run(run.adapter, causal_lm(job.tuned.model), job.tuned.tokenizer, job.tuned.template)
    run.write("result", result.as_dict())
    modelcard.write(run.adapter, run.path.name, run, job.config, handed)
    for line in handed.warnings():
        watch.say(line)
    report.write(run)
    integrity.end(run)
    return result


@contextmanager
def _stop_on_signal(watch: Watcher) -> Iterator[threading.Event]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) set the event; a second one ends the program at once.
    What was ignored from the start stays so: `nohup`, the background of a script."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        watch.stopping()

    wanted = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]  # Windows has no SIGHUP
    heard = [number for number in wanted if number is not None and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
