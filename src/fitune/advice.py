"""What fits, which of it to take, and why: the numbers behind `fitune plan` without a method and `train --fit`.

In: what is asked (a model's shape, data, a device, settings that stay). Out: suggestions, each planned exactly with the
largest batch that fits; what each memory saver would give here; and advice with its figures. Every figure of memory
comes from a plan, none from a rule of thumb; the old rules stand beside, to be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from fitune import evaluation, methods, weights
from fitune.config import build, merge
from fitune.console import Watcher
from fitune.errors import ConfigError, FituneError
from fitune.lengths import automatic
from fitune.memory import plan as plans
from fitune.memory import search
from fitune.memory.flops import counts, per_token, seconds
from fitune.planning import Asked, Rows, ask, look, work_of
from fitune.prepare import check_quantized
from fitune.store import lengths_of

SHOWN = 3  # suggestions


@dataclass(frozen=True)
class Suggestion:
    """A way that fits, planned exactly. settings: what to type beside what was given; batch_size: the largest that
    fits. use: rows to train with: no more than make throughput grow, and no more than there are."""

    name: str
    settings: dict[str, Any]
    batch_size: int
    use: int
    max_length: int
    plan: plans.Plan
    quality: float
    seconds: float | None
    enough: int | None

    @property
    def flags(self) -> str:
        """What to type."""
        return flags({**self.settings, "batch_size": self.use})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(replace(self, plan=None)), "plan": self.plan.as_dict(), "flags": self.flags}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Saver:
    """What one change to the settings would give: bytes by exact plans; work: times as much; cut: share of the rows
    that would lose tokens. cost: in words."""

    flag: str
    saves: int
    work: float
    cut: float
    cost: str

    @property
    def worth(self) -> float:
        """Bytes saved for what they cost: more work, cut rows, and something for any change."""
        return self.saves / (0.05 + (self.work - 1) + 10 * self.cut)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "worth": self.worth}


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
    watch: Watcher | None = None, shown: int = SHOWN, **settings: Any,
) -> Advised:  # fmt: skip
    """Search, settle and explain.

    Args:
        model, data, gpu, words, watch: as for `planning.plan`.
        shown: how many suggestions are planned exactly.
        settings: that are to stay.

    Raises:
        FituneError: as `planning.plan`; or nothing fits at all.
    """
    watch = watch or Watcher()
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    rows = look(asked, words, watch)
    watch.say("looking for what fits")
    found = _searched(asked, rows, settings)
    suggestions: list[Suggestion] = []
    # the arithmetic is on the safe side: where nothing fits by it, the nearest ways are planned too
    for candidate in _best(found.candidates, 2 * shown) or found.misses[:3]:
        watch.say(f"planning exactly: {candidate.name}")
        settled = settle(asked, rows, candidate)
        if settled is not None:
            suggestions.append(settled)
        if len(suggestions) == shown:
            break
    if not suggestions:
        raise _nothing_fits(asked, found)
    best = suggestions[0]
    return Advised(
        model=asked.name,
        where=asked.where.name,
        here=asked.where.here,
        budget=asked.where.budget or 0,
        combinations=found.combinations,
        suggestions=suggestions,
        candidates=found.candidates,
        savers=savers(with_settings(asked, {**best.settings, "batch_size": best.use}), rows, watch=watch),
        advice=list(_advice(asked, rows, best)),
        notes=[rows.note] if rows.note else [],
    )


def _searched(asked: Asked, rows: Rows, settings: Mapping[str, Any]) -> search.Found:
    lengths = lengths_of(rows.samples).astype(np.int64)
    shorter = sorted({int(np.percentile(lengths, share)) for share in (99, 95)} | {rows.max_length}, reverse=True)
    longest = [n for n in shorter if n <= rows.max_length] if "max_length" not in settings else [rows.max_length]
    stays = {k: v for k, v in settings.items() if k not in ("batch_size", "max_length")}
    return search.search(stays, asked.shape, lengths, labelled(rows), asked.where, longest)


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


def with_settings(asked: Asked, settings: Mapping[str, Any]) -> Asked:
    """The same question with other settings."""
    given = asked.config.model_dump(mode="json", exclude_unset=True)
    config = build(merge(given, settings))
    return replace(asked, config=config.model_copy(update={"data": asked.config.data}))


def exact(asked: Asked, rows: Rows, batch_size: int | None = None) -> plans.Plan:
    """The plan of a question; rows longer than its max_length are cut."""
    config = asked.config
    if batch_size is not None:
        config = config.model_copy(update={"batch_size": batch_size})
    longest = rows.max_length if config.max_length == "auto" else min(config.max_length, rows.max_length)
    known = replace(
        rows, samples=_cut(rows.samples, longest), held_out=_cut(rows.held_out, longest), max_length=longest
    )
    asked = replace(asked, config=config)
    return replace(plans.plan(work_of(asked, known), asked.where, name=asked.name), max_length=longest)


def _cut(samples: Any, longest: int) -> Any:
    """Rows of at most that length; where none is longer, the same."""
    if not len(samples) or int(lengths_of(samples).max()) <= longest:
        return samples
    return [sample if len(sample) <= longest else replace(sample, ids=sample.ids[:longest], mask=sample.mask[:longest])
            for sample in samples]  # fmt: skip


def settle(asked: Asked, rows: Rows, candidate: search.Candidate) -> Suggestion | None:
    """A candidate with the largest batch that fits by exact plans; None: not one row does after all."""
    wanted = with_settings(asked, candidate.settings)
    most = max(1, len(rows.samples))
    known: dict[int, plans.Plan] = {}

    def fits(batch: int) -> bool:
        if batch not in known:
            known[batch] = exact(wanted, rows, batch)
        return bool(known[batch].fits)

    low, high, batch = 0, most + 1, min(most, max(1, candidate.batch_size))
    while high - low > 1:
        low, high = (batch, high) if fits(batch) else (low, batch)
        if high - low <= 1:
            break
        batch = min(high - 1, max(low + 1, _next(known, low, high)))
    if low == 0:
        return None
    enough = candidate.enough
    return Suggestion(
        name=candidate.name,
        settings={**candidate.settings, "max_length": known[low].max_length},
        batch_size=low,
        use=min(low, max(enough or 8, 1), most),
        max_length=int(known[low].max_length or rows.max_length),
        plan=known[low],
        quality=candidate.quality,
        seconds=candidate.seconds,
        enough=enough,
    )


def _next(known: Mapping[int, plans.Plan], low: int, high: int) -> int:
    """The batch to try next: what a row takes beside what is loaded says how many there is room for."""
    batch = low or min(known)
    made = known[batch]
    fixed = made.phases[0].bytes + sum(made.outside.values())
    each = (made.needed - fixed) / batch
    if len(known) > 3 or each <= 0:
        return (low + high) // 2
    return int(batch + ((made.budget or 0) - made.needed) / each)


def _nothing_fits(asked: Asked, found: search.Found) -> ConfigError:
    nearest = [*found.misses[:3]]
    told = "; ".join(
        f"{one.name} with one row of {one.max_length:,} tokens: {plans.size(one.needed)}" for one in nearest
    )
    return ConfigError(
        f"nothing fits into {plans.size(asked.where.budget or 0)} ({asked.where.name}) with these settings",
        received=told or "no way of tuning agrees with what was given",
        fix="a smaller model, a shorter --max-length, or fewer settings that must stay",
    )


# ---- savers ----


def savers(asked: Asked, rows: Rows, *, watch: Watcher | None = None) -> list[Saver]:
    """What each memory saver would give, the best for its cost first; each is planned exactly."""
    now = exact(asked, rows)
    work = _work(asked, rows)
    found = []
    for settings, cost in _changes(asked, rows):
        try:
            other = with_settings(asked, settings)
            method = methods.find(other.config.method)
            check_quantized(other.config, method, asked.shape, torch.device(asked.where.kind))
            made = exact(other, rows)
        except FituneError:
            continue
        if watch is not None:
            watch.say(f"planned: {flags(settings)}")
        saved = now.needed - made.needed
        if saved > 0:
            cut = _cut_share(rows, made.max_length or rows.max_length)
            times = _work(other, rows) / work
            found.append(Saver(flags(settings), saved, round(max(1.0, times), 3), cut, cost))
    return sorted(found, key=lambda one: -one.worth)


def _changes(asked: Asked, rows: Rows) -> Iterator[tuple[dict[str, Any], str]]:
    config = asked.config
    if not config.checkpointing:
        yield {"checkpointing": True}, "blocks are computed again in the backward pass"
    if config.quant.name == "none":
        yield {"quant": {"name": "int8"}}, "products with 8-bit weights"
        yield {"quant": {"name": "nf4"}}, "4-bit weights keep 96 % of what is gained"
    elif config.quant.name == "int8":
        yield {"quant": {"name": "nf4"}}, "4-bit weights keep 96 % of what is gained"
    if config.batch_size > 1:
        half = max(1, config.batch_size // 2)
        times = config.accumulation * -(-config.batch_size // half)
        yield {"batch_size": half, "accumulation": times}, "the objective stays the same"
    lengths = lengths_of(rows.samples)
    shorter = int(np.percentile(lengths, 95))
    if shorter < rows.max_length:
        yield {"max_length": shorter}, f"cuts {_cut_share(rows, shorter):.1%} of the rows"
    if config.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "states in 8 bits"
    if config.precision == "fp32":
        yield {"precision": "bf16"}, "less exact; slow on a CPU without bf16"
    if config.method in ("full", "lora", "adapter"):
        yield {"method": "freeze", "lora": {}, "bottleneck": {}}, "trains the last two blocks alone"


def _cut_share(rows: Rows, longest: int) -> float:
    return float((lengths_of(rows.samples) > longest).mean())


def _work(asked: Asked, rows: Rows) -> float:
    """Operations of an epoch."""
    config = asked.config
    longest = rows.max_length if config.max_length == "auto" else config.max_length
    lengths = np.minimum(lengths_of(rows.samples).astype(np.int64), longest)
    model = plans.without_values(plans.Work(config, asked.shape, []))
    each = per_token(counts(model, config), lengths, labelled(rows), checkpointing=config.checkpointing)
    return each * float(lengths.sum())


def what_helps(
    model: str,
    *,
    data: Sequence[str],
    gpu: str | None,
    words: str | None,
    made: plans.Plan,
    settings: Mapping[str, Any],
) -> str:
    """What would make a plan fit that does not: each change with the bytes that it saves."""
    asked = ask(model, data=data, gpu=gpu, settings=settings)
    found = savers(asked, look(asked, words, Watcher()))
    told = ", ".join(f"`{one.flag}` saves {plans.size(one.saves)} ({one.cost})" for one in found[:5])
    return f"misses by {plans.size(-(made.spare or 0))}: {told or 'no saver helps here'}"


# ---- advice ----


def _advice(asked: Asked, rows: Rows, best: Suggestion) -> Iterator[Advice]:
    yield _tokens_against_parameters(rows, best)
    yield _against_the_machine(asked, rows, best)
    yield _old_rules(asked, best)
    yield _longest_row(rows, best)
    found = _domain(asked)
    if found is not None:
        yield found


def _tokens_against_parameters(rows: Rows, best: Suggestion) -> Advice:
    tokens = int(lengths_of(rows.samples).sum() * labelled(rows))
    trained, total = best.plan.trainable, best.plan.total
    enough = tokens >= total
    text = (
        f"direct tuning of all {total:,} parameters wants at least as many trained tokens; an epoch of this data has "
        f"{tokens:,}" + (": it can be tried" if enough else f", {total / max(1, tokens):,.0f} times too few")
    )
    text += f"; {best.name} trains {trained:,} parameters, {tokens / max(1, trained):,.2f} tokens for each"
    return Advice("data", text, {"tokens": tokens, "parameters": total, "trainable": trained})


def _against_the_machine(asked: Asked, rows: Rows, best: Suggestion) -> Advice:
    made = best.plan
    text = (
        f"{best.name} needs {plans.size(made.needed)} of {plans.size(made.budget or 0)} with {best.batch_size} rows of "
        f"at most {best.max_length:,} tokens"
    )
    work = _work(with_settings(asked, best.settings), rows)
    text += f"; an epoch is {work:,.3g} operations"
    time = _time(asked, work, quantized=made.quant != "none")
    if time is not None:
        text += f", about {_duration(time)} on {asked.where.name}"
    if best.enough is not None and best.batch_size > best.enough:
        text += f"; beyond {best.enough} rows throughput hardly grows"
    return Advice("machine", text, {"needed": made.needed, "budget": made.budget, "operations": work, "seconds": time})


def _time(asked: Asked, work: float, *, quantized: bool) -> float | None:
    rate = search.rate_of(asked.where, asked.config.precision)
    return seconds(work, rate, quantized=quantized, cpu=asked.where.kind == "cpu")


def _duration(time: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if time >= 2 * size:
            return f"{time / size:,.1f} {name}"
    return f"{time:,.0f} seconds"


def _old_rules(asked: Asked, best: Suggestion) -> Advice:
    total, trained = best.plan.total, best.plan.trainable
    by_batch, by_bytes = 6 * best.batch_size * total, 16 * total
    text = (
        f"the old rules say {plans.size(by_batch)} (6 x batch x parameters) and {plans.size(by_bytes)} (4 + 8 + 4 "
        f"bytes a parameter); the plan says {plans.size(best.plan.needed)}: 16 bytes go to the {trained:,} trained "
        "parameters alone, and activations depend on tokens, not on rows"
    )
    figures = {"six_times": by_batch, "sixteen_bytes": by_bytes, "plan": best.plan.needed}
    return Advice("old rules", text, figures)


def _longest_row(rows: Rows, best: Suggestion) -> Advice:
    lengths = lengths_of(rows.samples)
    auto = automatic(lengths, lengths, int(lengths.max()))
    p95, longest = int(np.percentile(lengths, 95)), int(lengths.max())
    text = (
        f"rows have {lengths.mean():,.0f} tokens on average, 95 % at most {p95:,}, the longest {longest:,}; max_length "
        f"{best.max_length:,} cuts {_cut_share(rows, best.max_length):.1%} of them (auto: {auto:,})"
    )
    return Advice("length", text, {"mean": float(lengths.mean()), "p95": p95, "longest": longest, "auto": auto})


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


__all__ = ["Advice", "Advised", "Saver", "Suggestion", "advise", "flags", "savers", "what_helps"]
