"""Task two of the page: the memory that a run takes, while its settings are moved.

In: a model, data, settings, a device. Out: the bar of memory, by closed forms at once, and by the trace as soon as it
is there; what fits instead: the same as `fitune plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fitune.checks import early
from fitune.commands import plan as planning
from fitune.commands.advise import advise
from fitune.commands.planned_rows import rows_of, work_of
from fitune.commands.request import to_plan
from fitune.commands.ui.settings import Wanted, command, flags
from fitune.core.blocks import AUTO
from fitune.core.config import RunConfig
from fitune.core.events import Silent
from fitune.data.batches import rounded
from fitune.engine import optim
from fitune.memory import chunks, device
from fitune.memory import plan as plans
from fitune.memory.closed import closed
from fitune.models import methods
from fitune.views.charts import NARROW
from fitune.views.plan import OUTSIDE, look_of, needed_parts, stack_of, unit_for
from fitune.views.plan_page import stacked

CARD = 560  # width of the drawing beside the settings


class Planned(Wanted):
    """A plan that is asked for. quick: by closed forms, without a trace."""

    quick: bool = False


def choices() -> dict[str, object]:
    """What can be chosen, and the defaults."""
    default = RunConfig(model="-", data=["-"])
    names = ("method", "precision", "batch_size", "accumulation", "epochs", "max_steps", "warmup", "optimizer", "seed")
    return {
        "methods": [{"name": one.name, "trains": one.trains, "lr": one.default_lr} for one in methods.TABLE.values()],
        "quantizers": ["none", "int8", "nf4"],
        "optimizers": list(optim.TABLE),
        "objectives": ["sft", "dpo", "ipo", "kto", "orpo", "simpo"],
        "gpus": [{"name": one.name, "mib": one.memory_mib} for one in device.gpus().values()],
        "defaults": {**{name: getattr(default, name) for name in names}, "rank": default.lora.rank},
    }


def plan(wanted: Planned) -> dict[str, object]:
    """What the run takes.

    Raises:
        FituneError: a model, data, settings or a device that cannot be.
    """
    _check(wanted)
    shown = _quick(wanted) if wanted.quick else _exact(wanted)
    return {**shown, "commands": {"plan": plan_command(wanted), "train": train_command(wanted)}}


def _check(wanted: Wanted) -> None:
    early.together(lambda: early.model_or_config(wanted.model), *early.each(early.data, *wanted.data))


def _settings(wanted: Wanted) -> dict[str, Any]:
    return {**wanted.settings, **({"eval_data": wanted.eval_data} if wanted.eval_data else {})}


def _exact(wanted: Wanted) -> dict[str, object]:
    made = planning.plan(wanted.model, data=wanted.data, gpu=wanted.gpu, **_settings(wanted))
    return {
        "how": made.how, "needed": made.needed, "budget": made.budget, "fits": made.fits, "peak": made.peak.phase,
        **_drawn(needed_parts(made), made.outside, made.budget),
        "phases": {moment.phase: moment.bytes for moment in made.phases},
        "trainable": made.trainable, "total": made.total, "tokens": made.tokens, "rows": made.rows,
        "max_length": made.max_length, "device": made.gpu or made.device, "precision": made.precision,
        "notes": made.notes,
    }  # fmt: skip


def _quick(wanted: Wanted) -> dict[str, object]:
    """The same by closed forms, in some tenths of a second."""
    request = to_plan(wanted.model, data=wanted.data, gpu=wanted.gpu, settings=_settings(wanted))
    known = rows_of(request, None, Silent())
    work, where = work_of(request, known), request.where
    least = chunks.least(work.config, int(work.model_config.vocab_size), where.target)
    again = False if work.config.checkpointing == AUTO else work.config.checkpointing
    config = work.config.model_copy(update={"loss_rows": least, "checkpointing": again})
    model, batch = plans.without_values(replace(work, config=config)), work.largest
    forms = closed(model, config, rounded(len(batch.ids)), batch.targets, where.target)
    outside = plans.outside_of(where, config.precision)
    parts = {**stack_of(forms), OUTSIDE: sum(outside.values())}
    needed = sum(parts.values())
    return {
        "how": "closed form", "needed": needed, "budget": where.budget, "peak": "loss",
        **_drawn(parts, outside, where.budget),
        "fits": None if where.budget is None else needed <= where.budget, "phases": {}, "tokens": len(batch.ids),
        "rows": len(batch.rows), "max_length": known.max_length, "device": where.name, "precision": config.precision,
        "notes": [known.note] if known.note else [],
    }  # fmt: skip


def _drawn(parts: Mapping[str, int], outside: Mapping[str, int], budget: int | None) -> dict[str, object]:
    """Bytes by what they are for, for a table: what lies outside of tensors one by one; their colours; and the bar of
    all plans, for a screen and for a phone."""
    inside = {name: size for name, size in parts.items() if name != OUTSIDE}
    unit = unit_for(sum(parts.values()))
    return {
        "parts": {**inside, **outside},
        "colours": {name: look_of(name if name in inside else OUTSIDE).variable for name in (*inside, *outside)},
        "drawn": [stacked({"needed": parts}, budget, unit, width, label="memory") for width in (CARD, NARROW)],
    }


def advice(wanted: Wanted) -> dict[str, object]:
    """What fits, the best first, and why.

    Raises:
        FituneError: as `plan`; or nothing fits.
    """
    _check(wanted)
    stays = {name: value for name, value in _settings(wanted).items() if name in KEPT}
    found = advise(wanted.model, data=wanted.data, gpu=wanted.gpu, **stays)
    return {
        "where": found.where,
        "suggestions": [
            {"name": one.name, "settings": one.settings, "needed": one.plan.needed, "seconds": one.seconds}
            for one in found.suggestions
        ],
        "advice": [one.text for one in found.advice],
        "command": command("plan", wanted.model, *_target(wanted), *flags(stays)),
    }


KEPT = ("objective", "batch_size", "accumulation", "max_length", "eval_data", "epochs", "seed")


def _target(wanted: Wanted) -> list[str]:
    of_data = ["--data", *wanted.data] if wanted.data else []
    return [*of_data, *(["--gpu", wanted.gpu] if wanted.gpu else [])]


def plan_command(wanted: Wanted) -> str:
    """The command that prints the plan."""
    return command("plan", wanted.model, *_target(wanted), *flags(wanted.settings, eval_data=wanted.eval_data))


def train_command(wanted: Wanted, output: str = "") -> str:
    """The command that trains so."""
    return command(*train_arguments(wanted, output))


def train_arguments(wanted: Wanted, output: str) -> list[str]:
    """The same as arguments."""
    settings = flags(wanted.settings, data=wanted.data, eval_data=wanted.eval_data)
    return ["train", "--model", wanted.model, *settings, *(["--output", output] if output else [])]
