"""A run that goes on: from which checkpoint, and with what in it; and the best checkpoint, put back at the end.

In: a run folder. Out: weights, optimizer and random numbers put back, and what was found, as findings for the report.
The newest checkpoint that is whole, is of this run, and fits steps.jsonl is taken; one of another run is refused.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fitune.checks import guards, stepchecks
from fitune.checks.findings import raise_refused
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


def note(run: RunFolder, watch: Watcher, finding: Finding) -> None:
    """A check that was made while the run went on: for the report, and told where it is not well."""
    run.write("checks", [*_noted(run), asdict(finding)])
    if finding.level != "ok":
        watch.findings([finding])
    raise_refused([finding])


def _noted(run: RunFolder) -> list[dict[str, Any]]:
    """The checks so far. Their file grows while the run goes on, so it is sealed at the end alone."""
    path = run.path / "checks.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if isinstance(found, list) and all({"rule", "level", "text"} <= set(one) for one in found):
            return found
        told = "something else"
    except (OSError, ValueError, TypeError) as error:
        told = " ".join(str(error).split())[:200]
    raise RunFolderError(
        f"{path}: broken", received=told, expected="a list of checks", fix="remove it: only the report reads it"
    )


def pages_again(run: RunFolder) -> None:
    """The pages of a finished run, where they are gone: all that they show is there.

    Raises:
        RunFolderError: a folder lies in the place of one.
    """
    for page in (run.report, run.plan_page):
        if page.is_dir():
            raise RunFolderError(f"{page}: is a folder", expected="a page", fix="remove it: --resume makes it again")
    if not run.report.is_file():
        report.write(run)
    if not run.plan_page.is_file():
        write_atomic(run.plan_page, plan_page.page(Plan.from_dict(run.read("plan"), f"{run.path}: plan.json")))


def check_same_settings(run: RunFolder, config: RunConfig) -> None:
    """Raises RunFolderError where a run was begun in this folder by another command.

    Args:
        run: that is not finished.
        config: as this command has it, resolved.
    """
    stored, mine = integrity.settings(run.read_config()), integrity.settings(config)
    differing = [f"{name} {mine[name]} (the run has {stored[name]})" for name in mine if mine[name] != stored[name]]
    if differing:
        raise RunFolderError(
            f"{run.path}: holds a run that is not finished, by other settings; nothing of yours is overwritten",
            received="; ".join(differing),
            fix="choose another --output, or go on with that run: "
            f"fitune train --resume --output {shlex.quote(str(run.path))}",
        )


def problem(run: RunFolder, path: Path) -> str:
    """Why a checkpoint does not count; nothing, where it does.

    Raises:
        RunFolderError: it is whole, and of another run.
    """
    manifest = whole(path)
    if manifest is None:
        return f"not whole (no matching {MANIFEST})"
    if manifest.get("run") != run.identity:
        raise _foreign(run, path, manifest.get("run"))
    if manifest.get("step", _number(path)) != _number(path):
        return f"that of step {manifest['step']}"
    told = run.log_problem(_number(path), manifest.get("log"))
    return f"ahead of the log: {told}" if told else ""


def _number(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _foreign(run: RunFolder, path: Path, theirs: dict[str, str] | None) -> RunFolderError:
    mine = run.identity or {}
    differ = sorted(name for name in {*mine, *(theirs or {})} if mine.get(name) != (theirs or {}).get(name))
    if theirs is None:
        told = "it names no run"
    elif differ == ["id"]:
        told = "one of the same settings and data, but not this one"
    else:
        told = f"other {', '.join(name for name in differ if name != 'id')}"
    return RunFolderError(
        f"{path}: the checkpoint of another run",
        received=told,
        expected=f"run {mine.get('id', 'without a seal')}",
        fix="remove it; --resume goes on from the one before. Where the run's settings were changed: start a new run",
    )


def newest(run: RunFolder, *, with_best: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and of the newer ones why not.

    Args:
        run: whose seal was checked.
        with_best: the run ends with its best weights, so that checkpoint must be there too.

    Raises:
        RunFolderError: one is of another run, or whole ones are there and none fits a log that was changed.
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
    told = problem(run, place)
    return f"of no use: the best so far, {place.name}, is {told}" if told else ""


def restore(
    run: RunFolder, parameters: Parameters, optimizer: torch.optim.Optimizer, watch: Watcher, *, with_best: bool
) -> Loaded | None:
    """Put the newest checkpoint that fits back; says so. None: there is none, the run starts anew.

    Args:
        run: whose seal was checked.
        parameters, optimizer: get its values.
        watch: is told.
        with_best: as for `newest`.

    Raises:
        RunFolderError, TrainingError: no checkpoint can be gone on from, and the run is not to start anew.
    """
    path, reasons = newest(run, with_best=with_best)
    note(run, watch, guards.partial_checkpoint(path, reasons))
    if path is None:
        watch.say("no whole checkpoint yet: starting from the first step")
        return None
    loaded = run.load(path)
    note(run, watch, guards.resume_identity(loaded, parameters, len(run.read_steps())))
    put(loaded, parameters)
    optim.load_state(optimizer, parameters, loaded.optimizer, loaded.optimizer_scalars)
    same = restore_rng(loaded.rng)
    note(run, watch, stepchecks.resume_exact(loaded, parameters, optimizer))
    note(run, watch, _same_machine(run, parameters, random=same))
    watch.say(f"going on from {path.name}")
    return loaded


@torch.no_grad()
def put(loaded: Loaded, parameters: Parameters) -> None:
    """Give the parameters the values of a checkpoint."""
    for name, parameter in parameters.items():
        parameter.copy_(loaded.trainable[name])


def _same_machine(run: RunFolder, parameters: Parameters, *, random: bool) -> Finding:
    """Does the run go on where it began? Elsewhere it goes on, and its bits are others."""
    now = environment.describe(next(iter(parameters.values())).device)
    changed = environment.changes(run.read("environment"), now) if run.has("environment") else []
    changed += [] if random else ["the random numbers of a GPU cannot be put back"]
    if not changed:
        return Finding("resume-machine", "ok", "the same device and versions as at the start")
    text = (
        f"not the machine that it began on: {'; '.join(changed)}; the losses may differ from those of an unbroken run"
    )
    return Finding("resume-machine", "warn", text)


# ---- the best weights ----


def back_to_best(
    run: RunFolder,
    parameters: Parameters,
    best: tuple[int, float],
    measure: Callable[[], float | None],
    dtype: torch.dtype,
    watch: Watcher,
) -> float | None:
    """Put the weights with the best held-out loss back, and measure that loss again.

    Args:
        run: the run.
        parameters: get its values.
        best: step of the best checkpoint, and the held-out loss that was measured then.
        measure: the held-out loss of the model as it is now.
        dtype: that it is computed in.
        watch: is told.

    Returns:
        The loss that was measured again.

    Raises:
        RunFolderError: the checkpoint is damaged, or of another run.
        TrainingError: its loss is another than it was.
    """
    step, loss = best
    path = run.checkpoint(step)
    if told := problem(run, path):
        raise RunFolderError(
            f"{path}: the best checkpoint, which is to be the result, is {told}",
            fix=f"fitune train --resume --output {shlex.quote(str(run.path))}: goes on from a checkpoint before it, or "
            "from the start, and makes it again",
        )
    put(run.load(path), parameters)
    again = measure()
    note(run, watch, best_reloaded(step, loss, again, dtype))
    watch.say(f"the result is step {step}, with the best held-out loss, {loss:.4f}")
    return again


def best_reloaded(step: int, loss: float, again: float | None, dtype: torch.dtype) -> Finding:
    """The best weights, read back from the disk, have the held-out loss that they were chosen for."""
    if again == loss:
        return Finding("best-reloaded", "ok", f"step {step}, read back: the same held-out loss, {loss:.6f}")
    text = f"step {step}, read back, has a held-out loss of {again}, it was {loss}"
    if again is not None and math.isclose(again, loss, rel_tol=guards.SAME[dtype]):
        return Finding("best-reloaded", "ok", f"{text}: equal but for rounding")
    return Finding("best-reloaded", "refuse", text, "fitune train --resume goes on from a checkpoint before it")
