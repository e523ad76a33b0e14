"""A run that is resumed: from which checkpoint, and what is restored; and the best checkpoint, restored at the end.

In: a run folder. Out: weights, optimizer and random numbers restored, and findings for the report. The newest
checkpoint that is complete, is of this run, and fits steps.jsonl is taken; one of another run is refused.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fitune.checks import guards, savedchecks, stepchecks
from fitune.commands.check_log import CheckLog
from fitune.commands.request import Request
from fitune.core.blocks import AUTO
from fitune.core.config import RunConfig
from fitune.core.errors import RunFolderError
from fitune.core.events import Watcher
from fitune.core.files import MANIFEST, whole, write_atomic
from fitune.core.plan import Plan
from fitune.core.records import Finding
from fitune.engine import environment, integrity, optim
from fitune.engine.checkpoint import Loaded, RunFolder, restore_rng
from fitune.views import plan_page, report

Parameters = Mapping[str, torch.nn.Parameter]


def is_finished(run: RunFolder, watch: Watcher) -> bool:
    """Has the run everything that a finished one has? What it made and is missing is made again: then it is not
    finished.

    Raises:
        RunFolderError: a file of the run is not as the run left it.
    """
    warned = integrity.check(run, [*integrity.BEGIN, *integrity.END], missing=integrity.END)
    if warned is not None:
        if has_begun(run):
            CheckLog(run, watch).add(warned)
        return run.has("result") and run.adapter.is_dir()
    return integrity.complete(run)


def has_begun(run: RunFolder) -> bool:
    """Is everything there that is written before the first step? A run that was killed before that begins anew."""
    return run.identity is not None or (run.has("before") and any(run.checkpoints.glob("step-*")))


def pages_again(run: RunFolder) -> None:
    """Write the pages of a finished run again, where they are missing.

    Raises:
        RunFolderError: there is a folder of that name.
    """
    for page in (run.report, run.plan_page):
        if page.is_dir():
            raise RunFolderError(f"{page}: is a folder", expected="a page", fix="remove it: --resume makes it again")
    if not run.report.is_file():
        report.write(run)
    if not run.plan_page.is_file():
        write_atomic(run.plan_page, plan_page.page(Plan.from_dict(run.read("plan"), f"{run.path}: plan.json")))


def with_its_blocks(run: RunFolder, request: Request) -> Request:
    """The request with the blocks that a run which was begun recomputes, where these are left to a plan: what is free
    now may be more or less than it was then."""
    stored = run.read_config()
    if request.config.checkpointing != AUTO:
        return request
    return request.changed(checkpointing=stored.checkpointing, offload=stored.offload)


def check_same_settings(run: RunFolder, config: RunConfig) -> None:
    """Raises RunFolderError where a run with other settings was begun in this folder.

    Args:
        run: that is not finished.
        config: as this command has it, resolved.
    """
    stored, mine = integrity.settings(run.read_config()), integrity.settings(config)
    differing = [f"{name} {mine[name]} (the run has {stored[name]})" for name in mine if mine[name] != stored[name]]
    if differing:
        raise RunFolderError(
            f"{run.path}: has an unfinished run with other settings; nothing is overwritten",
            received="; ".join(differing),
            fix="choose another --output, or go on with that run: "
            f"fitune train --resume --output {shlex.quote(str(run.path))}",
        )


def check_same_inputs(run: RunFolder, data_sha256: Mapping[str, str], inputs: Mapping[str, object]) -> None:
    """Raises RunFolderError where what decides a run was changed since it began.

    Args:
        run: that goes on.
        data_sha256: of each data file, as it is now.
        inputs: digests of base model, tokenizer, template and adapter, as they are now.
    """
    stored = run.read("data") if run.has("data") else {}
    if stored and list(stored["sha256"].values()) != list(data_sha256.values()):
        raise RunFolderError(
            f"{run.path}: the data files changed since this run began", fix="restore them, or start a new run"
        )
    known = stored.get("inputs", {})
    changed = sorted(name for name, value in inputs.items() if known.get(name, value) != value)
    if changed:
        raise RunFolderError(
            f"{run.path}: {', '.join(changed)} changed since this run began",
            fix="restore what lies in the model's folder, or start a new run",
        )


def problem(run: RunFolder, path: Path) -> str:
    """Why a checkpoint cannot be used; empty, where it can.

    Raises:
        RunFolderError: it is complete, and of another run.
    """
    manifest = whole(path)
    if manifest is None:
        return f"not complete (no matching {MANIFEST})"
    if manifest.get("run") != run.identity:
        raise _foreign(run, path, manifest.get("run"))
    if manifest.get("step", _number(path)) != _number(path):
        return f"that of step {manifest['step']}"
    reason = run.log_problem(_number(path), manifest.get("log"))
    return f"ahead of the log: {reason}" if reason else ""


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _foreign(run: RunFolder, path: Path, theirs: dict[str, str] | None) -> RunFolderError:
    mine = run.identity or {}
    differ = sorted(name for name in {*mine, *(theirs or {})} if mine.get(name) != (theirs or {}).get(name))
    if theirs is None:
        received = "it names no run"
    elif differ == ["id"]:
        received = "one of the same settings and data, but not this one"
    else:
        received = f"other {', '.join(name for name in differ if name != 'id')}"
    return RunFolderError(
        f"{path}: the checkpoint of another run",
        received=received,
        expected=f"run {mine.get('id', 'without a seal')}",
        fix="remove it; --resume goes on from the one before. Where the run's settings were changed: start a new run",
    )


def newest(run: RunFolder, *, with_best: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and why each newer one is not used.

    Args:
        run: whose seal was checked.
        with_best: the run ends with its best weights, so that checkpoint must be there too.

    Raises:
        RunFolderError: one is of another run; or steps.jsonl was changed, and no complete checkpoint fits it.
    """
    reasons: list[str] = []
    changed = False
    for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
        reason = problem(run, path)
        if not reason and with_best:
            reason = _best_problem(run, path)
        if not reason:
            return path, reasons
        reasons.append(f"{path.name} {reason}")
        changed |= "other lines" in reason
    if changed:
        raise RunFolderError(
            f"{run.steps}: was changed, and no checkpoint is from before the change",
            received="; ".join(reasons[:5]),
            fix=f"restore it from a copy; to begin again from the first step, remove {run.checkpoints} and --resume",
        )
    return None, reasons


def _best_problem(run: RunFolder, path: Path) -> str:
    best = json.loads((path / "state.json").read_text(encoding="utf-8"))["best"][0]
    if best is None or best == _number(path):
        return ""
    place = run.checkpoint(best)
    reason = problem(run, place)
    return f"not usable: the best so far, {place.name}, is {reason}" if reason else ""


def restore(
    checks: CheckLog, parameters: Parameters, optimizer: torch.optim.Optimizer | None, *, with_best: bool
) -> Loaded | None:
    """Restore the newest checkpoint that fits, and report it. None: there is none, the run starts anew.

    Args:
        checks: of the run, whose seal was checked.
        parameters, optimizer: get its values. None: the model is in shards, and they are dealt out later.
        with_best: as for `newest`.

    Raises:
        RunFolderError, TrainingError: no checkpoint can be used, and the run must not start anew.
    """
    run = checks.run
    path, reasons = newest(run, with_best=with_best)
    checks.add(savedchecks.partial_checkpoint(path, reasons))
    if path is None:
        checks.watch.message("no complete checkpoint yet: starting from the first step")
        return None
    loaded = run.load(path)
    checks.add(savedchecks.resume_identity(loaded, parameters, len(run.read_steps())))
    if optimizer is not None:
        put(loaded, parameters)
        optim.load_state(optimizer, parameters, loaded.optimizer, loaded.optimizer_scalars)
    same = restore_rng(loaded.rng)
    checks.add(stepchecks.resume_exact(loaded, parameters, optimizer))
    checks.add(resume_machine(run, parameters, random=same))
    checks.watch.message(f"going on from {path.name}")
    return loaded


@torch.no_grad()
def put(loaded: Loaded, parameters: Parameters) -> None:
    """Give the parameters the values of a checkpoint."""
    for name, parameter in parameters.items():
        parameter.copy_(loaded.trainable[name])


def resume_machine(run: RunFolder, parameters: Parameters, *, random: bool) -> Finding:
    """Is this the machine that the run began on? Elsewhere it goes on too, but its results may differ."""
    now = environment.describe(next(iter(parameters.values())).device)
    changed = environment.changes(run.read("environment"), now) if run.has("environment") else []
    changed += [] if random else ["the random numbers of a GPU cannot be restored"]
    if not changed:
        return Finding("resume-machine", "ok", "the same device and versions as at the start")
    text = (
        f"another machine than at the start: {'; '.join(changed)}; the losses may differ from those of an unbroken run"
    )
    return Finding("resume-machine", "warn", text)


# ---- the best weights ----


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest held-out loss.

    step: of its checkpoint. loss: that was measured there. dtype: that it is computed in. put: gives the model the
    values of a checkpoint. measure: gives the held-out loss of the model as it is now.
    """

    step: int
    loss: float
    dtype: torch.dtype
    put: Callable[[Loaded], None]
    measure: Callable[[], float | None]


def back_to_best(checks: CheckLog, best: Best) -> float | None:
    """Restore the weights with the best held-out loss; that loss, measured again.

    Args:
        checks: of the run.
        best: the evaluation.

    Raises:
        RunFolderError: the checkpoint is damaged, or of another run.
        TrainingError: its loss differs from the one that was measured before.
    """
    run = checks.run
    path = run.checkpoint(best.step)
    if reason := problem(run, path):
        raise RunFolderError(
            f"{path}: the best checkpoint, which would be the result, is {reason}",
            fix=f"fitune train --resume --output {shlex.quote(str(run.path))}: goes on from a checkpoint before it, or "
            "from the start, and makes it again",
        )
    best.put(run.load(path))
    again = best.measure()
    checks.add(best_reloaded(best, again))
    checks.watch.message(f"the result is step {best.step}, with the best held-out loss, {best.loss:.4f}")
    return again


def best_reloaded(best: Best, again: float | None) -> Finding:
    """The best weights, read from the disk, have the held-out loss that they were chosen for."""
    step, loss = best.step, best.loss
    if again == loss:
        return Finding("best-reloaded", "ok", f"step {step}, read back: the same held-out loss, {loss:.6f}")
    text = f"step {step}, read back, has a held-out loss of {again}, it was {loss}"
    if again is not None and math.isclose(again, loss, rel_tol=guards.SAME[best.dtype]):
        return Finding("best-reloaded", "ok", f"{text}: equal but for rounding")
    return Finding("best-reloaded", "refuse", text, "fitune train --resume goes on from a checkpoint before it")
