"""What fits, which of it to take, and why: the numbers behind `fitune plan` without a method and `train --fit`.

In: what is asked (a model's shape, data, a device, settings that stay). Out: suggestions, each planned exactly with the
largest batch that fits; what each memory saver would give here; and advice with its figures. Every figure of memory
comes from a plan, none from a rule of thumb; the old rules stand beside, to be compared.
"""

from __future__ import annotations

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
from fitune.memory import plan as plans
from fitune.memory import search, steps
from fitune.memory.flops import counts, per_token, seconds
from fitune.model import without_weights
from fitune.planning import Asked, Rows, ask, look, work_of
from fitune.prepare import check_quantized
from fitune.store import lengths_of

SHOWN = 3  # suggestions
NEAREST = 3  # ways that are planned exactly where none fits by arithmetic
CUT = (99, 95)  # percentiles of the lengths that may be cut to
HELPS = 6  # savers that a miss tells of
PATIENCE = 6  # plans, after which a batch is looked for by halves
MEETINGS = 1.25  # how much larger a batch may be whose largest micro-batch is smaller by chance


@dataclass(frozen=True)
class Suggestion:
    """A way that fits, planned exactly.

    settings: what to type beside what was given. micro_batch, accumulation: rows, and how many of them for each
    optimizer step: together as many rows as were asked for; they are in the settings. plan: of exactly these settings.
    largest_batch: the most rows of a micro-batch that fit with the same settings; needed_at_largest: bytes with it.
    """

    name: str
    settings: dict[str, Any]
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
        """What to type."""
        return flags(self.settings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(replace(self, plan=None)), "plan": self.plan.as_dict(), "flags": self.flags}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Saver:
    """What one change to the settings would give: bytes by exact plans; work: operations, times as many; cut: share of
    the rows that would lose tokens. cost: in words."""

    flag: str
    settings: dict[str, Any]
    saves: int
    work: float
    cut: float
    cost: str
    plan: plans.Plan

    @property
    def worth(self) -> float:
        """Bytes saved for what they cost: more work, cut rows, and something for any change."""
        return self.saves / (0.05 + max(0.0, self.work - 1) + 10 * self.cut)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(replace(self, plan=None)), "needed": self.plan.needed, "worth": self.worth}  # type: ignore[arg-type]


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
            "candidates": [asdict(one) for one in self.candidates],
            "savers": [one.as_dict() for one in self.savers],
            "advice": [one.as_dict() for one in self.advice],
            "notes": self.notes,
        }


def advise(
    model: str, *, data: Sequence[str], gpu: str | None = None, words: str | None = None,
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
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    if asked.config.batch_tokens is not None:
        raise ConfigError(
            "batch_tokens beside a search for the largest batch",
            expected="batch_size, the rows of an optimizer step",
            fix="leave --batch-tokens out, or name the --method for the plan of one run",
        )
    exactly = Exact(asked, look(asked, words, watch))
    found = _searched(exactly, settings, watch)
    suggestions: list[Suggestion] = []
    # the arithmetic is on the safe side: where nothing fits by it, the nearest ways are planned too
    for candidate in _best(found.candidates, 2 * shown) or found.misses[:NEAREST]:
        watch.say(f"planning exactly: {candidate.name}")
        settled = settle(exactly, candidate)
        if settled is not None:
            suggestions.append(settled)
        if len(suggestions) == shown:
            break
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
        candidates=found.candidates,
        savers=savers(exactly, best.settings, watch=watch) if with_savers else [],
        advice=list(_advice(exactly, best)),
        notes=[exactly.rows.note] if exactly.rows.note else [],
    )


class Exact:
    """Exact plans of one question with other settings, each made once.

    Args:
        asked: the question.
        rows: what is known of its data.
    """

    def __init__(self, asked: Asked, rows: Rows) -> None:
        self.asked, self.rows = asked, rows
        self.plans: dict[str, plans.Plan] = {}
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
            made = plans.plan(work_of(other, self.cut[longest]), other.where, name=other.name)
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

    def share_cut(self, longest: int) -> float:
        """Share of the rows that a length cuts."""
        return float((self.largest.lengths > longest).mean())


def _cut(samples: Any, longest: int) -> Any:
    """Rows of at most that length; where none is longer, the same."""
    if not len(samples) or int(lengths_of(samples).max()) <= longest:
        return samples
    return [sample if len(sample) <= longest else replace(sample, ids=sample.ids[:longest], mask=sample.mask[:longest])
            for sample in samples]  # fmt: skip


def _searched(exactly: Exact, settings: Mapping[str, Any], watch: Watcher) -> search.Found:
    rows, ticker = exactly.rows, Ticker(watch, "looking for what fits", None)

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


def _best(candidates: Sequence[search.Candidate], most: int) -> list[search.Candidate]:
    """The best of each way and precision, with the longest rows."""
    seen: dict[tuple[str, str], search.Candidate] = {}
    for one in candidates:
        key = (one.name.split(",")[0], str(one.settings["quant"]))
        seen.setdefault(key, one)
    return list(seen.values())[:most]


def settle(exactly: Exact, candidate: search.Candidate) -> Suggestion | None:
    """A candidate with the largest micro-batch that fits by exact plans, and as many of them for each optimizer step as
    give the rows that were asked for. None: not one row fits after all."""
    config = exactly.asked.config
    wanted = config.batch_size * config.accumulation
    alone = bool(candidate.settings.get("optimizer_in_backward", config.optimizer_in_backward))  # no accumulation then
    settings = {**candidate.settings, "max_length": min(candidate.max_length, exactly.rows.max_length)}
    rows = len(exactly.rows.samples)
    largest, tried = max(1, candidate.batch_size), set[int]()
    while True:
        # gradients of several micro-batches lie beside the next one, which can take room
        accumulation = 1 if alone else -(-min(wanted, rows) // largest)
        if accumulation in tried:  # by now the larger one of two is enough
            accumulation = max(tried)
        settings["accumulation"] = accumulation
        largest = _largest_batch(exactly, settings, largest)
        if largest == 0:
            return None
        if accumulation in tried or alone or -(-min(wanted, rows) // largest) == accumulation:
            break
        tried.add(accumulation)
    batch = min(largest, -(-wanted // accumulation), rows)
    settings["batch_size"] = batch
    if accumulation == config.accumulation and "accumulation" not in candidate.settings:
        del settings["accumulation"]  # as it was given
    made = exactly.plan(settings)
    if not made.fits:  # the larger one fits by the chance of which rows meet
        settings["batch_size"] = largest
        made = exactly.plan(settings)
    return Suggestion(
        name=candidate.name,
        settings=settings,
        micro_batch=settings["batch_size"],
        accumulation=accumulation,
        plan=made,
        largest_batch=largest,
        needed_at_largest=exactly.plan({**settings, "batch_size": largest}).needed,
        max_length=int(made.max_length or 0),
        quality=candidate.quality,
        seconds=candidate.seconds,
        enough=candidate.enough,
    )


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


def _nothing_fits(asked: Asked, found: search.Found) -> ConfigError:
    nearest = found.misses[:NEAREST]
    told = "; ".join(
        f"{one.name} with one row of {one.max_length:,} tokens: {plans.size(one.needed)}" for one in nearest
    )
    return ConfigError(
        f"nothing fits into {plans.size(asked.where.budget or 0)} ({asked.where.name}) with these settings",
        received=told or "no way of tuning agrees with what was given",
        fix="a smaller model, a shorter --max-length, or fewer settings that must stay",
    )


# ---- savers ----


def savers(exactly: Exact, settings: Mapping[str, Any], *, watch: Watcher | None = None) -> list[Saver]:
    """What each memory saver would give beside settings, the best for its cost first; each is planned exactly."""
    now = exactly.plan(settings)
    work = exactly.work(settings)
    found = []
    for change, cost in _changes(exactly, exactly.with_settings(settings).config):
        made = _planned(exactly, {**settings, **change})
        if made is None:
            continue
        if watch is not None:
            watch.say(f"planned: {flags(change)}")
        saved = now.needed - made.needed
        if saved > 0:
            times = exactly.work({**settings, **change}) / work
            cut = exactly.share_cut(made.max_length or exactly.rows.max_length)
            found.append(Saver(flags(change), change, saved, round(times, 3), cut, cost, made))
    return sorted(found, key=lambda one: -one.worth)


def _planned(exactly: Exact, settings: Mapping[str, Any]) -> plans.Plan | None:
    """The plan of settings; None: they cannot go together."""
    try:
        other = exactly.with_settings(settings)
        check_quantized(other.config, methods.find(other.config.method), other.shape, torch.device(other.where.kind))
        return exactly.plan(settings)
    except FituneError:
        return None


def _changes(exactly: Exact, config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    if not config.checkpointing:
        yield {"checkpointing": True}, "blocks are computed again in the backward pass"
    if config.quant.name == "none":
        yield {"quant": {"name": "int8"}}, "products with 8-bit weights"
    if config.quant.name in ("none", "int8"):
        yield {"quant": {"name": "nf4"}}, f"4-bit weights keep {search.KEPT['nf4']:.0%} of what is gained"
    if config.batch_size > 1 and not config.optimizer_in_backward:
        for rows in sorted({config.batch_size // 2, 1}, reverse=True):
            times = -(-config.accumulation * config.batch_size // rows)
            yield {"batch_size": rows, "accumulation": times}, "the objective stays the same"
    for shorter in _shorter(exactly):
        if shorter < exactly.longest(config):
            yield {"max_length": shorter}, f"cuts {exactly.share_cut(shorter):.1%} of the rows"
    if config.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "states in 8 bits"
    if config.precision == "fp32":
        yield {"precision": "bf16"}, "less exact; slow on a CPU without bf16"
    if config.method in ("full", "lora", "adapter"):
        yield {"method": "freeze"}, "trains the last two blocks alone"


@dataclass(frozen=True)
class Help:
    """What would make a plan fit that does not. missing: bytes; savers: each alone; together: those that do it, with
    what is needed then; None: all of them are not enough."""

    missing: int
    savers: list[Saver]
    together: dict[str, Any] | None

    @property
    def text(self) -> str:
        """For people."""
        each = ", ".join(f"`{one.flag}` saves {plans.size(one.saves)} ({one.cost})" for one in self.savers[:HELPS])
        told = f"misses by {plans.size(self.missing)}: {each or 'no saver helps here'}"
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
    model: str, *, data: Sequence[str], gpu: str | None, words: str | None, settings: Mapping[str, Any]
) -> Help:
    """What would make a plan fit that does not: each change with the bytes that it saves, and which of them do it."""
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    exactly = Exact(asked, look(asked, words, Watcher()))
    now = exactly.plan({})
    missing = -(now.spare or 0)
    found = savers(exactly, {})
    return Help(missing, found, _together(exactly, found, missing))


def _together(exactly: Exact, found: Sequence[Saver], missing: int) -> dict[str, Any] | None:
    """The best saver that is enough, else the best ones one after the other until they are."""
    alone = next((one for one in found if one.saves >= missing), None)
    taken: dict[tuple[str, ...], Saver] = {}  # by what they set: of two lengths the one that saves more
    for one in [alone] if alone is not None else found:
        other = taken.get(tuple(one.settings))
        if (alone is None and "method" in one.settings) or (other is not None and other.saves >= one.saves):
            continue
        taken[tuple(one.settings)] = one
        changes = {name: value for saver in taken.values() for name, value in saver.settings.items()}
        made = _planned(exactly, changes)
        if made is not None and made.fits:
            return {"settings": changes, "flags": flags(changes), "needed": made.needed}
    return None


# ---- advice ----


def _advice(exactly: Exact, best: Suggestion) -> Iterator[Advice]:
    yield _tokens_against_parameters(exactly, best)
    yield _against_the_machine(exactly, best)
    yield _old_rules(best)
    yield _longest_row(exactly, best)
    found = _domain(exactly.asked)
    if found is not None:
        yield found


def _tokens_against_parameters(exactly: Exact, best: Suggestion) -> Advice:
    tokens = int(exactly.largest.lengths.sum() * labelled(exactly.rows))
    trained = best.plan.trainable
    total = sum(p.numel() for p in without_weights(exactly.asked.shape).parameters())
    enough = tokens >= total
    text = (
        f"direct tuning of all {total:,} parameters wants at least as many trained tokens; an epoch of this data has "
        f"{tokens:,}" + (": it can be tried" if enough else f", {total / max(1, tokens):,.0f} times too few")
    )
    text += f"; {best.name} trains {trained:,} parameters, {tokens / max(1, trained):,.2f} tokens for each"
    return Advice("data", text, {"tokens": tokens, "parameters": total, "trainable": trained})


def _against_the_machine(exactly: Exact, best: Suggestion) -> Advice:
    made, where, batch, times = best.plan, exactly.asked.where, best.micro_batch, best.accumulation
    text = (
        f"{best.name} needs {plans.size(made.needed)} of {plans.size(made.budget or 0)} with micro-batches of {batch} "
        f"rows of at most {best.max_length:,} tokens{f', {times} for each step' if times > 1 else ''}"
    )
    if best.largest_batch > batch:
        text += f"; {best.largest_batch} rows would fit ({plans.size(best.needed_at_largest)})"
    work = exactly.work(best.settings)
    text += f"; an epoch is {work:,.3g} operations"
    time = _time(exactly.with_settings(best.settings), work, quantized=made.quant != "none")
    if time is not None:
        text += f", about {_duration(time)} on {where.name}"
    if best.enough is not None:
        text += f"; throughput hardly grows beyond {best.enough} row{'s' * (best.enough > 1)} of a micro-batch"
    return Advice("machine", text, {"needed": made.needed, "budget": made.budget, "operations": work, "seconds": time})


def _time(asked: Asked, work: float, *, quantized: bool) -> float | None:
    rate = search.rate_of(asked.where, asked.config.precision)
    return seconds(work, rate, quantized=quantized, cpu=asked.where.kind == "cpu")


def _duration(time: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if time >= 2 * size:
            return f"{time / size:,.1f} {name}"
    return f"{time:,.0f} seconds" if time >= 2 else "a second or two"


def _old_rules(best: Suggestion) -> Advice:
    total, trained, rows = best.plan.total, best.plan.trainable, best.micro_batch
    by_batch, by_bytes = 6 * rows * total, 16 * total
    text = (
        f"the old rules say {plans.size(by_batch)} (6 x batch x parameters, with {rows} rows) and "
        f"{plans.size(by_bytes)} (4 + 8 + 4 bytes a parameter); the plan says {plans.size(best.plan.needed)}: 16 bytes "
        f"go to the {trained:,} trained parameters alone, and activations depend on tokens, not on rows"
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
        paths = [source.path for source in asked.config.sources()]
        loss = evaluation.evaluate(str(folder), paths, take=64, answer=False).scores.loss
    except FituneError:
        return None
    near = "near to what it knows" if loss < 1.5 else "some way from what it knows" if loss < 3 else "far from it"
    text = f"the base's loss on 64 rows of the data is {loss:.2f} nats a token: {near}; where it is low, adapters do"
    return Advice("domain", text, {"loss": loss})


# ---- words ----


def _command(model: str, data: Sequence[str], best: Suggestion) -> str:
    """What to type; a model of the catalog by its id on the hub, one that is named by its config.json by its folder."""
    entry, path = catalog.get(model), Path(model).expanduser()
    if entry is not None and not path.exists():
        model = entry.id
    elif path.is_file():
        model = str(path.parent)
    files = " ".join(shlex.quote(str(source)) for source in data)
    return f"fitune train --model {shlex.quote(model)} --data {files} {best.flags}"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as one types them."""
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "quant":
            kind = value["name"] if isinstance(value, Mapping) else value
            words += [] if kind == "none" else ["--quant", str(kind)]
        elif isinstance(value, Mapping):
            words += [f"{flag}.{key.replace('_', '-')} {inner}" for key, inner in value.items()]
        elif value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words.append(f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
    return " ".join(words)


__all__ = ["Advice", "Advised", "Exact", "Help", "Saver", "Suggestion", "advise", "flags", "savers", "what_helps"]
