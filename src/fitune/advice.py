"""What fits, which of it to take, and why: the numbers behind `fitune plan` without a method and `train --fit`.

In: what is asked (a model's shape, data, a device, settings that stay). Out: suggestions, each planned exactly with the
largest batch that fits; what each memory saver would give here; and advice with its figures. Every figure of memory
comes from a plan, none from a rule of thumb; the old rules stand beside, to be compared.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitune import catalog, evaluation, methods, weights
from fitune.config import RunConfig, build, merge
from fitune.console import Ticker, Watcher
from fitune.errors import ConfigError, FituneError
from fitune.memory import device as devices
from fitune.memory import plan as plans
from fitune.memory import search, steps
from fitune.memory.closed import state_bytes
from fitune.memory.flops import counts, per_token, seconds
from fitune.model import without_weights
from fitune.planning import Asked, Rows, ask, look, work_of
from fitune.precision import DTYPES
from fitune.prepare import check_quantized
from fitune.store import lengths_of

SHOWN = 3  # suggestions
NEAREST = 3  # ways that are planned exactly where none fits by arithmetic
CUT = (99, 95)  # percentiles of the lengths that may be cut to
HELPS = 6  # savers that a miss tells of
PATIENCE = 6  # plans, after which a batch is looked for by halves
MEETINGS = 1.25  # how much larger a batch may be whose largest micro-batch is smaller by chance


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """A way's figures for JSON, its quality by the name of what it is: a result of the bundled 2M model, not yours."""
    return {"result_of_bundled_2m_model" if name == "quality" else name: value for name, value in values.items()}


@dataclass(frozen=True)
class Suggestion:
    """A way that fits, planned exactly.

    settings: all of them, what was given among them; changed: of them those that are new, or other than given.
    micro_batch, accumulation: rows, and how many of them for each optimizer step: together as many rows as were asked
    for; they are in the settings. plan: of exactly these settings. largest_batch: the most rows of a micro-batch that
    fit with the same settings; needed_at_largest: bytes with it. quality: share of the questions of a test that the
    bundled model of 2 million parameters answered rightly after tuning so (search.WAYS).
    """

    name: str
    settings: dict[str, Any]
    changed: dict[str, Any]
    micro_batch: int
    accumulation: int
    plan: plans.Plan
    largest_batch: int
    needed_at_largest: int
    max_length: int
    quality: float
    seconds: float | None
    enough: int | None

    @property
    def flags(self) -> str:
        """What to type beside what was given."""
        return flags(self.changed)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = _named(asdict(replace(self, plan=None)))  # type: ignore[arg-type]
        return {**values, "plan": self.plan.as_dict(), "flags": self.flags}


@dataclass(frozen=True)
class Saver:
    """What one change to the settings would give: bytes by exact plans; time: of an epoch, times as much, by counted
    operations and the share of its rate that a device reaches; cut: share of the rows that would lose tokens. cost: in
    words."""

    flag: str
    settings: dict[str, Any]
    saves: int
    time: float
    cut: float
    cost: str
    plan: plans.Plan

    @property
    def worth(self) -> float:
        """Bytes saved for what they cost: more time, cut rows, and something for any change."""
        return self.saves / (0.05 + max(0.0, self.time - 1) + 10 * self.cut)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: value for name, value in vars(self).items() if name != "plan"}
        return {**values, "needed": self.plan.needed, "worth": self.worth}


@dataclass(frozen=True)
class Advice:
    """One piece of advice: what it is about, what it says, and the figures that it says it with."""

    about: str
    text: str
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Advised:
    """All of it. combinations: how many were looked at; misses: the nearest ways where nothing fits."""

    model: str
    command: str  # that trains so
    where: str
    here: bool  # is that this machine?
    budget: int
    combinations: int
    suggestions: list[Suggestion]
    candidates: list[search.Candidate]
    savers: list[Saver]
    advice: list[Advice]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "command": self.command,
            "where": self.where,
            "here": self.here,
            "budget": self.budget,
            "combinations": self.combinations,
            "suggestions": [one.as_dict() for one in self.suggestions],
            "candidates": [_named(asdict(one)) for one in self.candidates],
            "savers": [one.as_dict() for one in self.savers],
            "advice": [one.as_dict() for one in self.advice],
            "notes": self.notes,
        }


def advise(
    model: str, *, data: Sequence[Any], gpu: str | None = None, words: str | None = None,
    watch: Watcher | None = None, shown: int = SHOWN, with_savers: bool = True, **settings: Any,
) -> Advised:  # fmt: skip
    """Search, settle and explain.

    Args:
        model, data, gpu, words, watch: as for `planning.plan`.
        shown: how many suggestions are planned exactly.
        with_savers: is each memory saver to be planned beside the best?
        settings: that are to stay; batch_size and accumulation stay as their product.

    Raises:
        FituneError: as `planning.plan`; or nothing fits at all.
    """
    watch = watch or Watcher()
    if settings.get("batch_tokens") is not None:
        raise ConfigError(
            "batch_tokens beside a search for the largest batch",
            expected="batch_size, the rows of an optimizer step",
            fix="leave --batch-tokens out; `fitune plan` with --method and `fitune train` without --fit take it",
        )
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    if too_small := below_all(asked.where):
        raise too_small
    domain = _domain(asked)  # first: it runs the model, and what the process holds afterwards is beside every plan
    exactly = Exact(asked, look(asked, words, watch), settings)
    found = _searched(exactly, settings, watch)
    suggestions: list[Suggestion] = []
    refuted: list[search.Candidate] = []
    # where nothing fits by arithmetic, the nearest ways are planned too: it has a margin
    for candidate in _best(found.candidates, asked.config) or found.misses[:NEAREST]:
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
        raise _nothing_fits(asked, found)
    best = suggestions[0]
    return Advised(
        model=asked.name,
        command=_command(model, data, best),
        where=asked.where.name,
        here=asked.where.here,
        budget=asked.where.budget or 0,
        combinations=found.combinations,
        suggestions=suggestions,
        candidates=[one for one in found.candidates if one not in refuted],
        savers=savers(exactly, best.settings, watch=watch) if with_savers else [],
        advice=[*_advice(exactly, best), *([domain] if domain is not None else [])],
        notes=[exactly.rows.note] if exactly.rows.note else [],
    )


class Exact:
    """Exact plans of one question with other settings, each made once.

    Args:
        asked: the question.
        rows: what is known of its data.
        given: the settings that were given, as they were.
    """

    def __init__(self, asked: Asked, rows: Rows, given: Mapping[str, Any]) -> None:
        self.asked, self.rows, self.given = asked, rows, given
        self.plans: dict[str, plans.Plan] = {}
        self.outside = plans.outside_of(
            asked.where
        )  # once: plans differ by what their settings take, and by that alone
        self.cut: dict[int, Rows] = {rows.max_length: rows}
        padded = steps.likely_layout(asked.config.layout, asked.shape) == "padded"
        self.largest = steps.Largest(rows.samples, asked.config, padded=padded)

    def plan(self, settings: Mapping[str, Any]) -> plans.Plan:
        """With settings beside what was given; rows that are too long for them are cut."""
        other = self.with_settings(settings)
        config = other.config
        key = config.model_dump_json()
        if key not in self.plans:
            longest = self.longest(config)
            if longest not in self.cut:
                samples, held_out = _cut(self.rows.samples, longest), _cut(self.rows.held_out, longest)
                self.cut[longest] = replace(self.rows, samples=samples, held_out=held_out, max_length=longest)
            work = work_of(other, self.cut[longest])
            made = plans.plan(work, other.where, name=other.name, outside=self.outside)
            self.plans[key] = replace(made, max_length=longest)
        return self.plans[key]

    def longest(self, config: RunConfig) -> int:
        """The most tokens of a row with these settings."""
        most = self.rows.max_length
        return most if config.max_length == "auto" else min(config.max_length, most)

    def with_settings(self, settings: Mapping[str, Any]) -> Asked:
        """The same question with other settings."""
        given = self.asked.config.model_dump(mode="json", exclude_unset=True)
        config = build(merge(given, settings))
        return replace(self.asked, config=config.model_copy(update={"data": self.asked.config.data}))

    def work(self, settings: Mapping[str, Any]) -> float:
        """Operations of an epoch."""
        config = self.with_settings(settings).config
        lengths = np.minimum(self.largest.lengths, self.longest(config))
        model = plans.without_values(plans.Work(config, self.asked.shape, []))
        found = counts(model, config)
        each = per_token(found, lengths, labelled(self.rows), checkpointing=config.checkpointing)
        return each * float(lengths.sum())

    def time(self, settings: Mapping[str, Any]) -> float:
        """Of an epoch, in units that are the same for all settings on this device."""
        other, work = self.with_settings(settings), self.work(settings)
        quantized, cpu = other.config.quant.name != "none", other.where.kind == "cpu"
        rate = search.rate_of(other.where, other.config.precision) or 1.0
        return seconds(work, rate, quantized=quantized, cpu=cpu) or work

    def share_cut(self, longest: int) -> float:
        """Share of the rows that a length cuts."""
        return float((self.largest.lengths > longest).mean())


def _cut(samples: Any, longest: int) -> Any:
    """Rows of at most that length; where none is longer, the same."""
    if not len(samples) or int(lengths_of(samples).max()) <= longest:
        return samples
    return [sample if len(sample) <= longest else sample.part(slice(0, longest)) for sample in samples]


def _searched(exactly: Exact, settings: Mapping[str, Any], watch: Watcher) -> search.Found:
    rows, ticker = exactly.rows, Ticker(watch, "ways of tuning", None)

    def tell(done: int, total: int) -> None:
        ticker.total = total
        ticker(done)

    shorter = [n for n in _shorter(exactly) if "max_length" not in settings]
    stays = {k: v for k, v in settings.items() if k not in ("batch_size", "accumulation", "max_length")}
    asked, lengths = exactly.asked, [rows.max_length, *shorter]
    found = search.search(stays, asked.shape, exactly.largest, labelled(rows), asked.where, lengths, tell)
    ticker.end()
    return found


def _shorter(exactly: Exact) -> list[int]:
    """Lengths that cut few rows, the longest first."""
    found = {int(np.percentile(exactly.largest.lengths, share)) for share in CUT}
    return sorted((length for length in found if 2 <= length < exactly.rows.max_length), reverse=True)


def labelled(rows: Rows) -> float:
    """Share of the tokens that carry a label."""
    if rows.report is not None and rows.report.tokens:
        return rows.report.trained_tokens / rows.report.tokens
    return 0.9


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
    config = exactly.asked.config
    wanted = min(len(exactly.rows.samples), config.batch_size * config.accumulation)
    alone = bool(candidate.settings.get("optimizer_in_backward", config.optimizer_in_backward))  # no accumulation then
    settings = {**candidate.settings, "max_length": min(candidate.max_length, exactly.rows.max_length)}
    for batch in _parts(wanted, config.batch_size, every=alone):
        # what arithmetic says is some 4 % off; and which rows meet is chance
        if batch > 2 * candidate.batch_size + 1:
            continue
        settings |= {"batch_size": batch, "accumulation": 1 if alone else wanted // batch}
        made = exactly.plan(settings)
        if made.fits:
            break
    else:
        return None
    largest = max(batch, _largest_batch(exactly, settings, max(batch, candidate.batch_size)))
    settings = {name: value for name, value in settings.items() if name in exactly.given or not _default(name, value)}
    return Suggestion(
        name=candidate.name,
        settings=settings,
        changed=_changed(settings, exactly.given),
        micro_batch=settings["batch_size"],
        accumulation=1 if alone else wanted // batch,
        plan=made,
        largest_batch=largest,
        needed_at_largest=exactly.plan({**settings, "batch_size": largest}).needed,
        max_length=int(made.max_length or 0),
        quality=candidate.quality,
        seconds=candidate.seconds,
        enough=candidate.enough,
    )


def _parts(rows: int, most: int, *, every: bool = False) -> list[int]:
    """Micro-batches that so many rows of a step can be made of without one more or less, the largest first; `every`:
    a step is one micro-batch, so any number will do, the nearest below first."""
    return [part for part in range(min(rows, most), 0, -1) if every or rows % part == 0]


def _default(name: str, value: Any) -> bool:
    """Is a setting as it is where nobody says anything?"""
    return name not in ("method", "batch_size") and bool(
        value == RunConfig.model_fields[name].default or value == {"name": "none"}
    )


def _changed(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
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


def _largest_batch(exactly: Exact, settings: Mapping[str, Any], guess: int) -> int:
    """The most rows of a micro-batch with which settings fit, by exact plans; 0: none."""
    most, longest = len(exactly.rows.samples), int(settings["max_length"])
    known: dict[int, plans.Plan] = {}

    def fits(batch: int) -> bool:
        known[batch] = exactly.plan({**settings, "batch_size": batch})
        return bool(known[batch].fits)

    low, high, batch = 0, most + 1, min(most, max(1, guess))
    while True:
        low, high = (batch, high) if fits(batch) else (low, batch)
        if high - low <= 1:
            break
        batch = min(high - 1, max(low + 1, _next(exactly, known, low, high, longest)))
    # more rows may make a smaller largest micro-batch: which rows meet is chance
    for more in range(min(most, int(MEETINGS * low) + 2), low, -1):
        if more not in known and exactly.largest(more, longest) < exactly.largest(high, longest) and fits(more):
            return more
    return low


def _next(exactly: Exact, known: Mapping[int, plans.Plan], low: int, high: int, longest: int) -> int:
    """The batch to try next: where the line through the two plans nearest to the budget meets it."""
    if len(known) > PATIENCE:
        return (low + high) // 2
    there = sorted(known, key=lambda batch: abs(known[batch].spare or 0))[:2]
    points = [(exactly.largest(batch, longest), known[batch].needed) for batch in there]
    nearest = known[there[0]]
    (tokens, needed), (others, taken) = points[0], (0, nearest.phases[0].bytes + sum(nearest.outside.values()))
    if len(points) > 1 and points[1][0] != tokens:
        others, taken = points[1]
    each = (needed - taken) / (tokens - others)
    if each <= 0:
        return (low + high) // 2
    room = tokens + ((nearest.budget or 0) - needed) / each
    fitting, beyond = low, high
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if exactly.largest(middle, longest) <= room else (fitting, middle)
    return fitting


def below_all(where: devices.Device) -> ConfigError | None:
    """The error for a budget of which nothing is left for a model."""
    beside = plans.outside_of(where)
    if where.budget is None or where.budget > sum(beside.values()):
        return None
    told = ", ".join(f"{name} {plans.size(taken)}" for name, taken in beside.items())
    default = where.kind == "cuda" and devices.calibration(where.name).measured is None
    return ConfigError(
        f"{plans.size(where.budget)} ({where.name}) is less than what lies beside any model",
        received=told + (", a default on the safe side" if default else ""),
        fix="a larger --gpu" + ("; where the GPU is, `fitune plan --calibrate` measures it" if default else ""),
    )


def _nothing_fits(asked: Asked, found: search.Found) -> ConfigError:
    nearest = found.misses[:NEAREST]
    told = "; ".join(
        f"{one.name} with one row of {one.max_length:,} tokens: {plans.size(one.needed)}" for one in nearest
    )
    return ConfigError(
        f"nothing fits into {plans.size(asked.where.budget or 0)} ({asked.where.name}) with these settings",
        received=told or "ways that nearly fit, of which no exact plan does",
        fix="a smaller model, a shorter --max-length, or fewer settings that must stay",
    )


# ---- savers ----


def savers(exactly: Exact, settings: Mapping[str, Any], *, watch: Watcher | None = None) -> list[Saver]:
    """What each memory saver would give beside settings, the best for its cost first; each is planned exactly."""
    watch, found = watch or Watcher(), []
    changes = list(_changes(exactly, exactly.with_settings(settings).config))
    for done, (change, cost) in enumerate(changes):
        watch.progress("planning memory savers", done, len(changes))
        one = _saver(exactly, settings, change, cost)
        if one is not None and one.saves > 0:
            found.append(one)
    watch.progress("planning memory savers", len(changes), len(changes))
    return sorted(found, key=lambda one: -one.worth)


def _saver(exactly: Exact, settings: Mapping[str, Any], change: dict[str, Any], cost: str) -> Saver | None:
    made = _planned(exactly, {**settings, **change})
    if made is None:
        return None
    time = exactly.time({**settings, **change}) / exactly.time(settings)
    cut = exactly.share_cut(made.max_length or exactly.rows.max_length)
    return Saver(flags(change), change, exactly.plan(settings).needed - made.needed, round(time, 3), cut, cost, made)


def _planned(exactly: Exact, settings: Mapping[str, Any]) -> plans.Plan | None:
    """The plan of settings; None: they cannot go together."""
    try:
        other = exactly.with_settings(settings)
        method = methods.find(other.config.method)
        check_quantized(other.config, method, other.shape, torch.device(other.where.kind))
        return exactly.plan(settings)
    except FituneError:
        return None


SAME = "the objective stays the same"


def _changes(exactly: Exact, config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    if not config.checkpointing:
        yield {"checkpointing": True}, "blocks are computed again in the backward pass"
    if config.quant.name == "none":
        yield {"quant": {"name": "int8"}}, "8-bit weights are made plain for each product"
    if config.quant.name in ("none", "int8"):
        yield (
            {"quant": {"name": "nf4"}},
            f"4-bit weights kept {search.KEPT['nf4']:.0%} of the gain of the bundled 2M model",
        )
    if config.batch_size > 1 and not config.optimizer_in_backward:
        yield _smaller(config, config.batch_size // 2), SAME
    for shorter in _shorter(exactly):
        if shorter < exactly.longest(config):
            yield {"max_length": shorter}, f"cuts {exactly.share_cut(shorter):.1%} of the rows"
    if config.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "states in 8 bits"
    if config.precision == "fp32":
        yield {"precision": "bf16"}, "less exact; slow on a CPU without bf16"
    if config.method in ("full", "lora", "adapter"):
        yield {"method": "freeze"}, "trains the last two blocks alone"


def _smaller(config: RunConfig, rows: int) -> dict[str, Any]:
    """Micro-batches of at most so many rows, and as many of them as keep the rows of a step."""
    wanted = config.accumulation * config.batch_size
    batch = _parts(wanted, rows)[0]
    return {"batch_size": batch, "accumulation": wanted // batch}


@dataclass(frozen=True)
class Help:
    """What would make a plan fit that does not. missing: bytes; savers: each alone; together: those that do it, with
    what is needed then; None: all of them are not enough. never: why nothing can."""

    missing: int
    savers: list[Saver]
    together: dict[str, Any] | None
    never: str = ""

    @property
    def text(self) -> str:
        """For people."""
        told = f"misses by {plans.size(self.missing)}"
        if self.never:
            return f"{told}: {self.never}"
        each = ", ".join(f"`{one.flag}` saves {plans.size(one.saves)} ({one.cost})" for one in self.savers[:HELPS])
        told += f": {each or 'no saver helps here'}"
        if self.together is not None:
            return f"{told}; with `{self.together['flags']}` it needs {plans.size(self.together['needed'])} and fits"
        if not self.savers:
            return told
        return f"{told}; all together are not enough: without --method, fitune plan looks through every way"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "missing": self.missing,
            "savers": [one.as_dict() for one in self.savers],
            "together": self.together,
            "text": self.text,
        }


def what_helps(
    model: str, *, data: Sequence[Any], gpu: str | None, words: str | None, settings: Mapping[str, Any]
) -> Help:
    """What would make a plan fit that does not: each change with the bytes that it saves, and which of them do it."""
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    exactly = Exact(asked, look(asked, words, Watcher()), settings)
    now = exactly.plan({})
    missing = -(now.spare or 0)
    never = below_all(asked.where)
    if never is not None:
        return Help(missing, [], None, " ".join(str(never).split()))
    found = savers(exactly, {})
    return Help(missing, found, _together(exactly, found, missing))


def _together(exactly: Exact, found: Sequence[Saver], missing: int) -> dict[str, Any] | None:
    """The mildest change that is enough: more and smaller micro-batches, where some rows fit; else the best saver that
    is enough alone; else the best ones one after the other, with micro-batches of one row, until they are."""
    config = exactly.asked.config
    smaller = config.batch_size > 1 and not config.optimizer_in_backward and config.batch_tokens is None
    if smaller:
        rows, tried = config.batch_size // 2, set[int]()
        while rows not in tried:  # the more micro-batches, the more gradients lie beside
            tried.add(rows)
            change = _smaller(config, rows)
            most = _largest_batch(exactly, {**change, "max_length": exactly.longest(config)}, rows)
            if most == 0:
                break
            rows = min(config.batch_size - 1, most)
            if (found_ := _enough(exactly, _smaller(config, rows))) is not None:
                return found_
    alone = next((one for one in found if one.saves >= missing), None)
    if alone is not None:
        return _enough(exactly, alone.settings)
    taken: dict[tuple[str, ...], dict[str, Any]] = {}  # by what they set: of two lengths the shorter one in the end
    if smaller:
        taken["batch_size", "accumulation"] = _smaller(config, 1)
    for one in found:
        key = tuple(one.settings)
        if "method" in one.settings or key == ("batch_size", "accumulation"):
            continue
        taken[key] = one.settings
        enough = _enough(exactly, {name: value for change in taken.values() for name, value in change.items()})
        if enough is not None:
            return enough
    return None


def _enough(exactly: Exact, changes: dict[str, Any]) -> dict[str, Any] | None:
    made = _planned(exactly, changes)
    if made is None or not made.fits:
        return None
    return {"settings": changes, "flags": flags(changes), "needed": made.needed}


# ---- advice ----


def _advice(exactly: Exact, best: Suggestion) -> Iterator[Advice]:
    yield _tokens_against_parameters(exactly, best)
    yield _against_the_machine(exactly, best)
    yield _old_rules(exactly, best)
    yield _longest_row(exactly, best)


def _tokens_against_parameters(exactly: Exact, best: Suggestion) -> Advice:
    tokens = int(exactly.largest.lengths.sum() * labelled(exactly.rows))
    about = exactly.rows.report is None  # lengths are estimated
    tokens = int(float(f"{tokens:.1e}")) if about else tokens
    trained = best.plan.trainable
    total = sum(p.numel() for p in without_weights(exactly.asked.shape).parameters())
    text = (
        f"direct tuning of all {total:,} parameters wants at least as many trained tokens; an epoch of this data has "
        f"{'about ' * about}{tokens:,}"
    )
    text += ": it can be tried" if tokens >= total else f", {_rounded(total / max(1, tokens))} times too few"
    text += f"; {best.name} trains {trained:,} parameters, {_rounded(tokens / max(1, trained))} tokens for each"
    return Advice("data", text, {"tokens": tokens, "parameters": total, "trainable": trained})


def _rounded(value: float) -> str:
    """With two digits that count."""
    return f"{float(f'{value:.1e}'):,.12g}"


def _against_the_machine(exactly: Exact, best: Suggestion) -> Advice:
    made, where, batch, times = best.plan, exactly.asked.where, best.micro_batch, best.accumulation
    text = (
        f"{best.name} needs {plans.size(made.needed)} of {plans.size(made.budget or 0)} with micro-batches of {batch} "
        f"rows of at most {best.max_length:,} tokens{f', {times} for each step' if times > 1 else ''}"
    )
    if best.largest_batch > batch:
        every = " (all there are)" * (best.largest_batch == len(exactly.rows.samples))
        text += f"; {best.largest_batch} rows{every} would fit, with {plans.size(best.needed_at_largest)}"
    work = exactly.work(best.settings)
    text += f"; an epoch is {work:,.3g} operations"
    if best.seconds is not None:
        text += f", about {_duration(best.seconds)} on {where.name}"
    if best.enough is not None:
        text += f"; throughput hardly grows beyond {best.enough} row{'s' * (best.enough > 1)} of a micro-batch"
    figures = {"needed": made.needed, "budget": made.budget, "operations": work, "seconds": best.seconds}
    return Advice("machine", text, figures)


def _duration(time: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if time >= 2 * size:
            return f"{time / size:,.1f} {name}"
    return f"{time:,.0f} seconds" if time >= 2 else "a second or two"


def _old_rules(exactly: Exact, best: Suggestion) -> Advice:
    total, trained, rows = best.plan.total, best.plan.trainable, best.micro_batch
    by_batch, by_bytes = 6 * rows * total, 16 * total
    config = exactly.with_settings(best.settings).config
    each = 2 * DTYPES[config.trainable_dtype].itemsize + state_bytes(config)  # itself, its gradient, its states
    text = (
        f"the old rules say {plans.size(by_batch)} (6 x batch x parameters, with {rows} rows) and "
        f"{plans.size(by_bytes)} (4 + 8 + 4 bytes a parameter); the plan says {plans.size(best.plan.needed)}: "
        f"{_rounded(each)} bytes go to each of the {trained:,} trained parameters alone, and activations depend on "
        "tokens, not on rows"
    )
    figures = {"six_times": by_batch, "sixteen_bytes": by_bytes, "plan": best.plan.needed}
    return Advice("old rules", text, figures)


def _longest_row(exactly: Exact, best: Suggestion) -> Advice:
    told, rows = exactly.rows.lengths, exactly.rows
    chosen = {choice.name: choice for choice in rows.choices}
    cut = chosen["chosen"].cut if best.max_length == rows.max_length else exactly.share_cut(best.max_length)
    text = (
        f"rows have {told['mean']:,.0f} tokens on average, 95 % at most {told['p95']:,}, the longest {told['max']:,}; "
        f"max_length {best.max_length:,} cuts {cut:.1%} of them (auto: {chosen['auto'].max_length:,})"
    )
    return Advice(
        "length", text, {**told, "max_length": best.max_length, "cut": cut, "auto": chosen["auto"].max_length}
    )


SMALL = 4 * 2**30  # bytes of weights that are read for one piece of advice
NEAR, FAR = 1.5, 3.0  # nats a token


def _domain(asked: Asked) -> Advice | None:
    """How far the data is from what the base knows: its loss on it, where weights are at hand and not large."""
    folder = asked.folder
    if folder is None:
        return Advice(
            "domain",
            "direct tuning is for domains far from general use; once the weights are here, `fitune eval MODEL --data F "
            "--loss-only` measures how far: the base's loss on the data",
            {},
        )
    try:
        weights.check(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if not size or size > SMALL:
            return None
        config = asked.config
        found = evaluation.evaluate(
            str(folder), config.sources(), take=64, answer=False, template=config.template, device=config.device
        )
    except FituneError:
        return None
    loss = found.scores.loss
    if loss < NEAR:
        text = "low: the data is near to what the base knows, and adapters with few parameters do"
    elif loss < FAR:
        text = "the data is some way from what the base knows: more rank, or more layers, may pay"
    else:
        text = "high: the data is far from what the base knows, which is what direct tuning with many tokens is for"
    text = f"the base's loss on {found.rows} rows of the data is {loss:.2f} nats a token, {text}"
    return Advice("domain", text, {"loss": loss, "rows": found.rows})


# ---- words ----


def _command(model: str, data: Sequence[Any], best: Suggestion) -> str:
    """What to type; a model of the catalog by its id on the hub, one that is named by its config.json by its folder."""
    entry, path = catalog.get(model), Path(model).expanduser()
    if entry is not None and not path.exists():
        model = entry.id
    elif path.is_file():
        model = str(path.parent)
    files = " ".join(shlex.quote(str(source)) for source in data)
    return f"fitune train --model {shlex.quote(model)} --data {files} {flags(best.settings)}"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as one types them in a shell."""
    words: list[str] = []
    for name, value in _leaves(settings):
        flag = f"--{name.replace('_', '-')}"
        if name == "quant.name":
            words += ["--quant", value]
        elif value is True:
            words.append(flag)
        elif isinstance(value, (str, int, float)) and value is not False:
            words += [flag, str(value)]
        else:  # lists and mappings have forms of their own as flags; here all go the same way
            words += ["--set", f"{name}={json.dumps(value, ensure_ascii=False)}"]
    return " ".join(shlex.quote(str(word)) for word in words)


GROUPS = ("map", "fill", "peft", "ranks")  # mappings whose keys are no settings


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if above == "" and name == "quant" and isinstance(value, str):
            yield "quant.name", value
        elif isinstance(value, Mapping) and name not in GROUPS:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


__all__ = ["Advice", "Advised", "Exact", "Help", "Saver", "Suggestion", "advise", "flags", "savers", "what_helps"]
