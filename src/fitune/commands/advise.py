"""What fits, which of it to take, and why: the numbers behind `fitune plan` without a method and `train --fit`.

In: a request (a model's config, data, a device, settings that stay). Out: suggestions, each planned exactly with the
largest batch that fits; what each memory saver would give here; and advice with its figures. Every figure of memory
comes from a plan, none from a rule of thumb; common rules of thumb stand beside, to be compared.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fitune.commands.exact import (
    Exact,
    below_all,
    labelled,
    largest_batch,
    parts,
    shorter_lengths,
)
from fitune.commands.planned_rows import rows_of
from fitune.commands.reasons import domain, reasons
from fitune.commands.request import Request, to_plan
from fitune.commands.savers import savers
from fitune.core import catalog
from fitune.core.as_flags import flags
from fitune.core.blocks import AUTO, named
from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.files import expand
from fitune.core.options import DataSource
from fitune.core.plan import Plan, size_text
from fitune.memory import search
from fitune.memory.advice import Advised, Suggestion
from fitune.memory.sharded import budget_of

SHOWN = 3  # suggestions
NEAREST = 3  # ways that are planned exactly where none fits by arithmetic


def advise(
    model: str, *, data: Sequence[object], gpu: str | None = None, tokenizer: str | None = None,
    watch: Watcher | None = None, only_best: bool = False, workers: int = 1, **settings: Any,
) -> Advised:  # fmt: skip
    """Search, settle and explain.

    Args:
        model, data, gpu, tokenizer, watch: as for `fitune.plan`.
        only_best: one suggestion is planned exactly, and no memory savers beside it.
        workers: processes that share each step; what is suggested fits into each.
        settings: that are to stay; batch_size and accumulation stay as their product.

    Raises:
        FituneError: as `fitune.plan`; or nothing fits at all.
    """
    watch, shown = watch or Silent(), 1 if only_best else SHOWN
    if settings.get("batch_tokens") is not None:
        raise ConfigError(
            "batch_tokens beside a search for the largest batch",
            expected="batch_size, the rows of an optimizer step",
            fix="leave --batch-tokens out; `fitune plan` with --method and `fitune train` without --fit take it",
        )
    request = replace(to_plan(model, data=data, gpu=gpu, settings=settings), processes=workers)
    if too_small := below_all(request.where):
        raise too_small
    of_domain = domain(request)  # first: it runs the model, and what the process holds afterwards is beside every plan
    exactly = Exact(request, rows_of(request, tokenizer, watch), settings)
    found = _searched(exactly, settings, watch)
    suggestions: list[Suggestion] = []
    refuted: list[search.Candidate] = []
    # where nothing fits by arithmetic, the nearest ways are planned too: it has a margin
    for candidate in _best(found.candidates, request.config) or found.misses[:NEAREST]:
        watch.progress("planning exactly", len(suggestions), shown)
        settled = settle(exactly, candidate)
        if settled is not None:
            suggestions.append(settled)
        else:
            refuted.append(candidate)
        if len(suggestions) == shown:
            break
    watch.progress("planning exactly", shown, shown)
    if not suggestions:
        raise _nothing_fits(request, found)
    best = suggestions[0]
    return Advised(
        model=request.name,
        command=_command(model, data, best) + _together(request),
        where=request.where.name,
        here=request.where.here,
        budget=best.plan.budget or 0,
        combinations=found.combinations,
        suggestions=suggestions,
        candidates=[one for one in found.candidates if one not in refuted],
        savers=savers(exactly, best.settings, watch=watch) if not only_best else [],
        advice=[*reasons(exactly, best), *([of_domain] if of_domain is not None else [])],
        notes=[exactly.rows.note] if exactly.rows.note else [],
    )


def _searched(exactly: Exact, settings: Mapping[str, object], watch: Watcher) -> search.Found:
    rows, ticker = exactly.rows, Ticker(watch, "methods", None)

    def progress(done: int, total: int) -> None:
        ticker.total = total
        ticker(done)

    shorter = [n for n in shorter_lengths(exactly) if "max_length" not in settings]
    stays = {k: v for k, v in settings.items() if k not in ("batch_size", "accumulation", "max_length")}
    request, lengths = exactly.request, [rows.max_length, *shorter]
    budget = budget_of(request.where.budget, request.where.kind, request.processes)
    found = search.search(
        stays,
        request.model_config,
        exactly.largest,
        labelled(rows),
        replace(request.where, budget=budget),
        lengths,
        progress,
    )
    ticker.end()
    return found


def _best(candidates: Sequence[search.Candidate], config: RunConfig) -> list[search.Candidate]:
    """The best of each method, with the longest rows; of one method a second only where it has room for more of the
    rows that are asked for."""
    found: list[search.Candidate] = []
    room: dict[str, int] = {}
    for one in candidates:
        method = one.settings["method"]
        if room.get(method, 0) < min(one.batch_size, config.batch_size):
            room[method] = one.batch_size
            found.append(one)
    return found


def settle(exactly: Exact, candidate: search.Candidate) -> Suggestion | None:
    """A candidate with the largest micro-batch that fits by exact plans, and as many of them for each optimizer step as
    give the rows that were asked for. None: not one row fits after all."""
    config, processes = exactly.request.config, exactly.request.processes
    wanted = min(len(exactly.rows.samples), config.batch_size * config.accumulation)
    most = min(config.batch_size, -(-wanted // processes))  # rows that a process has of a step
    alone = bool(candidate.settings.get("optimizer_in_backward", config.optimizer_in_backward))  # no accumulation then
    settings = {**candidate.settings, "max_length": min(candidate.max_length, exactly.rows.max_length)}
    # the arithmetic is some 4 % off; and which rows meet is chance
    likely = 2 * candidate.batch_size + 1
    sizes = {
        batch: {**settings, "batch_size": batch, "accumulation": 1 if alone else wanted // batch}
        for batch in parts(wanted, most, every=alone)
        if batch <= likely
    }
    found = _fitting(exactly, candidate, sizes)
    if found is None:
        return None
    settings, made = found
    batch = settings["batch_size"]
    guess = batch if made.recomputed and candidate.settings["checkpointing"] == AUTO else candidate.kept
    largest = max(batch, largest_batch(exactly, settings, max(batch, guess or candidate.batch_size)))
    settings = {name: value for name, value in settings.items() if name in exactly.given or not _default(name, value)}
    return Suggestion(
        name=candidate.name,
        settings=settings,
        changed=_changed(settings, exactly.given),
        micro_batch=settings["batch_size"],
        accumulation=settings.get("accumulation", 1),
        plan=made,
        largest_batch=largest,
        needed_at_largest=exactly.plan({**settings, "batch_size": largest}).needed,
        max_length=int(made.max_length or 0),
        quality=candidate.quality,
        seconds=exactly.seconds(settings),
        enough=candidate.enough,
    )


Fitting = tuple[dict[str, Any], Plan]  # settings and their plan


def _fitting(exactly: Exact, candidate: search.Candidate, sizes: Mapping[int, dict[str, Any]]) -> Fitting | None:
    """The settings that take the least time of those that fit: with the most rows in a micro-batch, or where it is left
    to the plan, with fewer rows or with blocks that are recomputed. None: none fits.

    Args:
        exactly: plans.
        candidate: whose settings these are.
        sizes: the settings by rows of a micro-batch, the most first.
    """
    left = candidate.settings["checkpointing"] == AUTO
    kept = None
    for batch, settings in sizes.items():
        settings = {**settings, "checkpointing": False} if left else settings
        if (made := exactly.plan(settings)).fits:
            kept = batch, (settings, made)
            break
    if not left:
        return kept[1] if kept else None
    # fewer rows cost no operations; but where they are too few a product takes as long as with enough of them
    larger = [batch for batch in sizes if kept is None or batch > kept[0]]
    if candidate.enough is None or (kept is not None and kept[0] >= candidate.enough):
        larger = [] if kept else larger[-1:]
    found = [kept[1]] if kept else []
    for batch in larger:
        made = exactly.plan(sizes[batch])
        which = {"checkpointing": named(made.recomputed), "offload": named(made.waiting)}
        found += [({**sizes[batch], **which}, made)] if made.fits else []

    def time(one: Fitting) -> tuple[bool, float]:
        few = max(1.0, (candidate.enough or 0) / one[0]["batch_size"])
        return bool(one[1].waiting), exactly.time(one[0]) * few

    return min(found, key=time, default=None)


def _default(name: str, value: object) -> bool:
    """Has a setting its default value?"""
    return name not in ("method", "batch_size") and bool(
        value == RunConfig.model_fields[name].default or value == {"name": "none"}
    )


def _changed(settings: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """What is not as it was given, group by group."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        there = given.get(name)
        if isinstance(value, Mapping):
            inner = _changed(value, there if isinstance(there, Mapping) else {"name": there} if there else {})
            found |= {name: inner} if inner else {}
        elif value != there:
            found[name] = value
    return found


def _nothing_fits(request: Request, found: search.Found) -> ConfigError:
    nearest = found.misses[:NEAREST]
    needed = "; ".join(
        f"{one.name} with one row of {one.max_length:,} tokens: {size_text(one.needed)}" for one in nearest
    )
    return ConfigError(
        f"nothing fits into {size_text(request.where.budget or 0)} ({request.where.name}) with these settings",
        received=needed or "ways that nearly fit, of which no exact plan does",
        fix="a smaller model, a shorter --max-length, or fewer settings that must stay",
    )


def _command(model: str, data: Sequence[object], best: Suggestion) -> str:
    """What to type; a model of the catalog by its id on the hub, one that is named by its config.json by its folder."""
    entry, path = catalog.get(model), expand(model)
    if entry is not None and not path.exists():
        model = entry.id
    elif path.is_file():
        model = str(path.parent)
    files = " ".join(shlex.quote(_path(source)) for source in data)
    return f"fitune train --model {shlex.quote(model)} --data {files} {flags(best.settings)}"


def _together(request: Request) -> str:
    """How several processes are started."""
    if request.processes == 1:
        return ""
    return f" --{'gpus' if request.where.kind == 'cuda' else 'workers'} {request.processes}"


def _path(source: object) -> str:
    """The path of a source, however it was named."""
    if isinstance(source, Mapping):
        source = DataSource.model_validate(source)
    return source.path if isinstance(source, DataSource) else str(source)
