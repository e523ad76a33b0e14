"""`fitune plan`: what a run would take, before anything is downloaded or loaded.

In: a model by its name, config.json, folder or hub id, data if there is some, a device by its name or size. Out: the
plan. Of a hub's model only config.json is fetched. Where no tokenizer is at hand the lengths of rows are estimated from
their characters, and the plan says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fitune.commands.planned_rows import Rows, rows_of, work_of
from fitune.commands.request import Request, to_plan
from fitune.core.events import Silent, Watcher
from fitune.memory import plan as plans
from fitune.models import precision


def plan(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path | Mapping[str, Any]] = (),
    gpu: str | None = None,
    tokenizer: str | Path | None = None,
    watch: Watcher | None = None,
    workers: int = 1,
    **settings: Any,
) -> plans.Plan:
    """What a run would take.

    Args:
        model: a name of the catalog, a config.json, a model folder, or a hub id.
        data: files, folders or ids, as for `train`; none: every row is as long as max_length.
        gpu: a size (24GB), a GPU (rtx-4090), this-machine. Default: this machine.
        tokenizer: a tokenizer folder, for a model that is not here.
        watch: progress is reported to it.
        workers: processes that share each step; the plan is of the one that takes most.
        settings: as for `train`.

    Raises:
        FituneError: settings, model, data or device that cannot be.
    """
    return answer(model, data=data, gpu=gpu, tokenizer=tokenizer, watch=watch, workers=workers, **settings).plan


@dataclass(frozen=True)
class Answer:
    """A plan, with what it was made of: the request, what is known of its data, and the settings that were given."""

    request: Request
    rows: Rows
    plan: plans.Plan
    given: Mapping[str, Any]


def answer(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path | Mapping[str, object]] = (),
    gpu: str | None = None,
    tokenizer: str | Path | None = None,
    watch: Watcher | None = None,
    workers: int = 1,
    **settings: Any,
) -> Answer:
    """As `plan`, with what it was made of, so that nobody who asks on reads the data or traces the model again."""
    sources = [data] if isinstance(data, (str, Path)) else list(data)
    settings = {name: _plain(value) for name, value in settings.items()}
    request = to_plan(str(model), data=[_plain(source) for source in sources], gpu=gpu, settings=settings)
    request = replace(request, processes=workers)
    known = rows_of(request, tokenizer, watch or Silent())
    made = plans.plan(work_of(request, known), request.where, name=request.name)
    notes = [known.note] if known.note else []
    if request.where.kind == "cuda" and not request.where.bf16 and made.precision == "bf16":
        notes.append(f"bf16 {precision.EMULATED}: --precision auto")
    made = replace(made, notes=[*notes, *made.notes], max_length=known.max_length)
    return Answer(request, known, made, settings)


def _plain(value: object) -> Any:
    """A path as text, anything else as it is."""
    return str(value) if isinstance(value, Path) else value
