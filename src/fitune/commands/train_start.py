"""Before the first step: the largest step is rehearsed, and the run folder begins.

In: a run that is about to start. Out: what the rehearsal measured; the files that a run begins with, sealed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fitune.checks import runchecks, textchecks
from fitune.checks.findings import raise_refused
from fitune.commands.active_run import ActiveRun, measured_before
from fitune.commands.prepare import Job
from fitune.core.config import RunConfig
from fitune.core.files import write_atomic
from fitune.core.records import Finding
from fitune.data import given
from fitune.data.store import documents_of
from fitune.engine import environment, integrity
from fitune.engine.step_runner import StepRunner
from fitune.memory.closed import state_bytes
from fitune.memory.counted import count
from fitune.memory.trace import Tracer
from fitune.memory.usage import usage
from fitune.models import determinism, hub
from fitune.models.interfaces import causal_lm, decoder
from fitune.models.kernels.target import of
from fitune.models.parts import trainable
from fitune.models.switches import training
from fitune.views import plan_page


@dataclass(frozen=True)
class Rehearsal:
    """What the largest step took; measured.json.

    parts: bytes by category at its peak. micro_batch_parts: in how many parts a micro-batch fits. lacking: an operation
    that has no deterministic algorithm on this device, or nothing.
    """

    parts: dict[str, int]
    micro_batch_parts: int
    lacking: str = ""

    @property
    def deterministic(self) -> bool:
        """Every operation has a deterministic algorithm."""
        return not self.lacking

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "parts": self.parts, "micro_batch_parts": self.micro_batch_parts, "deterministic": self.deterministic,
        }  # fmt: skip

    def finding(self, device: object) -> Finding | None:
        """Warns where an operation has no deterministic algorithm, so that the same run again may differ; else None."""
        if self.deterministic:
            return None
        text = f"{self.lacking} has no deterministic algorithm on {device}: the same run again, or resumed, may differ"
        return Finding("deterministic", "warn", text)


def rehearse(job: Job, runner: StepRunner) -> Rehearsal:
    """The largest step, before anything is written: what it takes, and in how many parts a micro-batch fits.

    Args:
        job: the run.
        runner: of its steps; its `parts` are those that fit.

    Raises:
        TrainingError: a single row does not fit, or the optimizer's states do not.
    """
    determinism.strict(True)
    try:
        return _rehearse_once(job, runner)
    except RuntimeError as error:
        lacking = determinism.lacking(error)
        if lacking is None:
            raise
    determinism.strict(False)
    return _rehearse_once(job, runner, lacking)


def _rehearse_once(job: Job, runner: StepRunner, lacking: str = "") -> Rehearsal:
    model = job.tuned.model
    tracer = Tracer(of(job.tuned.device))
    tracer.at("load")
    count(model, tracer)
    tracer.at("")
    states = int(job.trainable * state_bytes(job.config))
    inside = tracer.inside(model, decoder(causal_lm(model)))
    with training(model), tracer, inside, _dropping(model, job.config):
        runner.rehearse(job.work.steps[-1], states, tracer)
    tracer.close()
    return Rehearsal(usage(tracer).peak.parts, runner.parts, lacking)


@contextmanager
def _dropping(model: nn.Module, config: RunConfig) -> Iterator[None]:
    """Inside, each gradient is dropped once it is there, where the optimizer will drop it in the backward pass."""
    trained = trainable(model).values() if config.optimizer_in_backward else ()
    hooks = [parameter.register_post_accumulate_grad_hook(_drop) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def begin(active: ActiveRun, rehearsal: Rehearsal | None) -> None:
    """Write, and measure, what a run begins with; seal it.

    Args:
        active: the run; its config and its findings are completed.
        rehearsal: of its largest step; None: the run folder has it from before the run was stopped.
    """
    run, job = active.folder, active.job
    run.create()
    job.config, moved = given.keep(job.config, run.path)
    job.data_sha256 = {moved.get(path, path): sha256 for path, sha256 in job.data_sha256.items()}
    run.write_config(job.config)
    run.write("environment", environment.describe(job.tuned.device))
    run.write("template", job.tuned.template.as_dict())
    job.tuned.tokenizer.save_pretrained(str(run.tokenizer))
    job.findings.append(runchecks.chat_parity(run, job.config, job.tuned.encoder, documents_of(job.loader.samples)))
    raise_refused(job.findings[-1:])
    run.write("plan", _plan(job))
    write_atomic(run.plan_page, plan_page.page(replace(job.plan, trainable=job.trainable, total=job.total)))
    findings = [asdict(finding) for finding in job.findings]
    run.write(
        "data",
        {"sha256": job.data_sha256, "inputs": job.inputs, "report": job.report.as_dict(), "findings": findings},
    )
    base = _measure_before(active)
    if rehearsal is not None:
        run.write("measured", rehearsal.as_dict())
    integrity.begin(run)
    if base is not None:
        active.checks.add(textchecks.base_loss(base, len(job.tuned.tokenizer)))


def _plan(job: Job) -> dict[str, object]:
    """For plan.json: the plan, with the model's parts and dtypes."""
    return {
        **job.plan.as_dict(),
        "trainable": job.trainable,
        "total": job.total,
        "parts": {name: {"trainable": trained, "total": total} for name, trained, total in job.groups()},
        "kept": [part.as_dict() for part in job.kept],
        "model_revision": hub.revision_of(Path(job.config.model)),
    }


def _measure_before(active: ActiveRun) -> float | None:
    """Held-out losses and sample answers before the first step; the loss of the base model, where it is that of
    answers."""
    measured = measured_before(active.job, active.world, active.watch.message)
    before, base = measured.start, measured.base
    losses = {"base_held_out_loss": base and base.loss, "held_out_loss": before and before.loss}
    rewards = {} if before is None or before.rewards is None else {"held_out_rewards": asdict(before.rewards)}
    active.folder.write("before", {**losses, **rewards, "answers": measured.answers})
    return base.loss if base is not None and base.rewards is None else None
