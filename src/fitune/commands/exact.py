"""Exact plans of one question with other settings: which batches fit, and how settings are typed.

In: what is asked, its rows, the settings that were given. Out: plans, each made once; the largest batch that fits; and
flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fitune.commands.planned_rows import Rows, laid_out, work_of
from fitune.commands.request import Request
from fitune.core.blocks import AUTO, named
from fitune.core.config import RunConfig, build, merge
from fitune.core.errors import ConfigError
from fitune.core.plan import size_text
from fitune.data.pairs import Pairs
from fitune.data.store import lengths_of
from fitune.memory import device as devices
from fitune.memory import plan as plans
from fitune.memory import search, steps
from fitune.memory.flops import Counts, counts, per_token, seconds

CUT = (99, 95)  # percentiles of the lengths that may be cut to


# settings that put no weights into a model, at any value that all questions can share
NO_WEIGHTS = {"batch_size": 1, "accumulation": 1, "max_length": "auto", "optimizer": "adamw", "loss_rows": "auto",
              "checkpointing": False, "offload": False}  # fmt: skip


PATIENCE = 6  # plans, after which a batch is looked for by halves


MEETINGS = 1.25  # how much larger a batch may be whose largest micro-batch is smaller by chance


class Exact:
    """Exact plans of one question with other settings, each made once.

    Args:
        request: what is asked for.
        rows: what is known of its data.
        given: the settings that were given, as they were.
        made: the plan of these settings, where it is there already.
    """

    def __init__(
        self, request: Request, rows: Rows, given: Mapping[str, object], made: plans.Plan | None = None
    ) -> None:
        self.request, self.rows, self.given = request, rows, given
        self.plans: dict[str, plans.Plan] = {}
        self.counted: dict[str, Counts] = {}
        # once: plans differ by what their settings take, and by that alone
        self.outside = made.outside if made is not None else plans.outside_of(request.where, request.config.precision)
        self.cut: dict[int, Rows] = {rows.max_length: rows}
        layout = steps.likely_layout(request.config.layout, request.model_config)
        self.largest = steps.Largest(laid_out(rows.samples, layout), request.config, padded=layout == "padded")
        if made is not None:
            self.plans[self._key(self.with_settings({}).config)] = made

    def plan(self, settings: Mapping[str, Any]) -> plans.Plan:
        """With settings beside what was given; rows that are too long for them are cut."""
        other = self.with_settings(settings)
        longest = self.longest(other.config)
        key = self._key(other.config)
        if key not in self.plans:
            if longest not in self.cut:
                samples, held_out = _cut(self.rows.samples, longest), _cut(self.rows.held_out, longest)
                self.cut[longest] = replace(self.rows, samples=samples, held_out=held_out, max_length=longest)
            work = work_of(other, self.cut[longest])
            if other.config.checkpointing == AUTO:
                made = plans.fitted(work, other.where, lambda how: self.plan({**settings, **how}))
            else:
                made = plans.plan(work, other.where, name=other.name, outside=self.outside)
            self.plans[key] = replace(made, max_length=longest)
        return self.plans[key]

    def _key(self, config: RunConfig) -> str:
        """What decides a plan: a length that is named and the same length by itself are one question."""
        return config.model_copy(update={"max_length": self.longest(config)}).model_dump_json()

    def longest(self, config: RunConfig) -> int:
        """The most tokens of a row with these settings."""
        most = self.rows.max_length
        return most if config.max_length == "auto" else min(config.max_length, most)

    def with_settings(self, settings: Mapping[str, object]) -> Request:
        """The same question with other settings."""
        given = self.request.config.model_dump(mode="json", exclude_unset=True)
        config = build(merge(given, settings))
        return replace(self.request, config=config.model_copy(update={"data": self.request.config.data}))

    def work(self, settings: Mapping[str, object]) -> float:
        """Operations of an epoch."""
        config = self.with_settings(settings).config
        lengths = np.minimum(self.largest.lengths, self.longest(config))
        which = named(self.plan(settings).recomputed) if config.checkpointing == AUTO else config.checkpointing
        each = per_token(self._counts(config), lengths, labelled(self.rows), checkpointing=which)
        return each * float(lengths.sum())

    def _counts(self, config: RunConfig) -> Counts:
        """Weights of the model, by what puts them there: how many rows go through it, and how, is another question."""
        key = config.model_copy(update=NO_WEIGHTS).model_dump_json()
        if key not in self.counted:
            model = plans.without_values(plans.Work(config, self.request.model_config, []))
            self.counted[key] = counts(model, config)
        return self.counted[key]

    def seconds(self, settings: Mapping[str, object]) -> float | None:
        """Of an epoch; None: nobody knows the rate of this device."""
        other = self.with_settings(settings)
        quantized, cpu = other.config.quant.name != "none", other.where.kind == "cpu"
        rate = search.rate_of(other.where, other.config.precision)
        found = seconds(self.work(settings), rate, quantized=quantized, cpu=cpu)
        # processes on CPUs share the cores that the rate is of
        return found if found is None or cpu else found / other.processes

    def time(self, settings: Mapping[str, object]) -> float:
        """Of an epoch, in units that are the same for all settings on this device."""
        other, work = self.with_settings(settings), self.work(settings)
        quantized, cpu = other.config.quant.name != "none", other.where.kind == "cpu"
        return self.seconds(settings) or seconds(work, 1.0, quantized=quantized, cpu=cpu) or work

    def share_cut(self, longest: int) -> float:
        """Share of the rows that a length cuts."""
        return float((self.largest.lengths > longest).mean())


def _cut(samples: Any, longest: int) -> Any:
    """Rows of at most that length; where none is longer, the same."""
    if isinstance(samples, Pairs):
        return samples.of(_cut(samples.samples, longest))
    if not len(samples) or int(lengths_of(samples).max()) <= longest:
        return samples
    return [sample if len(sample) <= longest else sample.part(slice(0, longest)) for sample in samples]


def shorter_lengths(exactly: Exact) -> list[int]:
    """Lengths that cut few rows, the longest first."""
    found = {int(np.percentile(exactly.largest.lengths, share)) for share in CUT}
    return sorted((length for length in found if 2 <= length < exactly.rows.max_length), reverse=True)


def labelled(rows: Rows) -> float:
    """Share of the tokens that carry a label."""
    if rows.report is not None and rows.report.tokens:
        return rows.report.trained_tokens / rows.report.tokens
    return 0.9


def parts(rows: int, most: int, *, every: bool = False) -> list[int]:
    """Micro-batches that so many rows of a step can be made of without one more or less, the largest first; `every`:
    a step is one micro-batch, so any number will do, the nearest below first."""
    return [part for part in range(min(rows, most), 0, -1) if every or rows % part == 0]


def largest_batch(exactly: Exact, settings: Mapping[str, Any], guess: int) -> int:
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
    taken_beside = ", ".join(f"{name} {size_text(taken)}" for name, taken in beside.items())
    default = where.kind == "cuda" and devices.calibration(where.name).measured is None
    return ConfigError(
        f"{size_text(where.budget)} ({where.name}) is less than what lies beside any model",
        received=taken_beside + (", a default on the safe side" if default else ""),
        fix="a larger --gpu" + ("; where the GPU is, `fitune plan --calibrate` measures it" if default else ""),
    )
