"""What fits: every method in every precision, with the largest batch, by arithmetic.

In: settings that are given, the model's config, the lengths of the rows, a device. Out: candidates, the best first. The
memory of a phase is linear in the tokens of a micro-batch and in the number of blocks, so each method is traced
twice, on models of a few blocks, with two sizes of micro-batches each; the rest is arithmetic in batch, length and
depth. Where nobody says which blocks are recomputed it is done for none and for all of them, and what lies between is
linear in their number. What is shown to a user is planned exactly afterwards (commands/exact.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from fitune.core.blocks import AUTO, named
from fitune.core.config import RunConfig, merge, settings_only
from fitune.core.errors import ConfigError, FituneError
from fitune.core.units import MIB
from fitune.memory import chunks, device, flops, plan, steps
from fitune.memory.flops import Counts
from fitune.memory.usage import tops_of_steps
from fitune.models import attached, families, methods, precision, quant
from fitune.models.configs import without_weights
from fitune.models.interfaces import CausalLM
from fitune.models.kernels.target import Target

TOKENS = (1024, 4096)  # of the two micro-batches, four rows each: so many that activations outweigh single weights
MARGIN, SEGMENT = 1.03, 20 * MIB  # fragmentation, until a candidate is planned exactly: a share, and a segment
MOST = 4096  # rows of a micro-batch

# A way by its settings, and the name under which results/methods.json has what it reached.
WAYS: dict[str, tuple[dict[str, object], str]] = {
    "full": ({"method": "full"}, "full"),
    "full, 8-bit states": ({"method": "full", "optimizer": "adamw-8bit"}, "full"),
    "full, in the backward pass": (
        {
            "method": "full",
            "optimizer": "adafactor",
            "optimizer_in_backward": True,
            "max_grad_norm": 0.0,
            "accumulation": 1,
        },
        "full",
    ),
    "lora, all linear layers": ({"method": "lora", "lora": {"targets": "all-linear"}}, "lora, all-linear"),
    **{
        name: ({"method": name}, name)
        for name in ("lora", "adapter", "freeze", "tail", "prefix", "p-tuning", "prompt", "bitfit", "ia3")
    },
}
BAND = 0.03
LITTLE = 0.8  # a result below which a way is not looked at with every saver
UNKNOWN = 0.0  # the result of a way that was not measured
METHODS = {settings["method"] for settings, _ in WAYS.values()}


@cache
def measured() -> Mapping[str, Mapping[str, float]]:
    """What was measured on the bundled model, as scripts/pack_results.py packed it.

    `accuracy`: share of the questions of a held-out test that were answered right after tuning, by the names of
    results/methods.json. `gain_kept`: share of the gain that quantized weights kept, by quantizer.
    """
    values: Mapping[str, Mapping[str, float]] = json.loads(
        files("fitune").joinpath("measured.json").read_text(encoding="utf-8")
    )
    return values


@dataclass(frozen=True)
class Candidate:
    """A way that fits, or nearly. settings: as for RunConfig, beside what was given. batch_size: the largest that fits
    (0: not one row does); kept: the same with no block recomputed; needed: bytes with batch_size, by arithmetic.
    quality: of `measured`. seconds: of an epoch, with the fewest blocks recomputed with which a row fits."""

    name: str
    settings: dict[str, Any]
    batch_size: int
    kept: int
    max_length: int
    needed: int
    quality: float
    trainable: int
    flops_per_token: float
    seconds: float | None
    enough: int | None  # rows of a micro-batch at which throughput stops growing


@dataclass(frozen=True)
class Found:
    """The result of a search. combinations: of way, precision, savers, length and batch that were looked at."""

    candidates: list[Candidate]
    combinations: int
    misses: list[Candidate]


@dataclass(frozen=True)
class _Way:
    """A method with settings, by name, and its result on the bundled model."""

    name: str
    settings: dict[str, Any]
    quality: float

    @property
    def config(self) -> RunConfig:
        """Its settings, checked; a prompt given as text needs no tokenizer here."""
        return plan.without_prompt_text(settings_only(self.settings))


@dataclass(frozen=True)
class _Question:
    """What every way is asked: the rows, the share of their tokens that carries a label, the device, and the bytes that
    lie beside any model there."""

    rows: steps.Largest
    labelled: float
    where: device.Device
    outside: int


@dataclass(frozen=True)
class _Line:
    """Bytes of each phase: fixed, and for each token; weights are counted by the plan's own tracer."""

    phases: dict[str, tuple[float, float]]
    counts: Counts

    def bytes(self, tokens: int) -> dict[str, float]:
        """Of each phase, with so many tokens in a micro-batch."""
        return {phase: fixed + slope * tokens for phase, (fixed, slope) in self.phases.items()}


@dataclass(frozen=True)
class _Lines:
    """With no block recomputed, and with all of them; the same, where the settings say which. least, most: how many may
    be."""

    none: _Line
    all: _Line
    least: int = 0
    most: int = 0

    def bytes(self, tokens: int, again: int) -> float:
        """At the peak, with so many of the blocks recomputed: linear in their number, phase by phase."""
        part = again / max(1.0, self.none.counts.blocks * self.none.counts.share)
        without, with_ = self.none.bytes(tokens), self.all.bytes(tokens)
        return max((1 - part) * without[phase] + part * with_[phase] for phase in without)


def search(
    given: Mapping[str, Any], model_config: PretrainedConfig, rows: steps.Largest, labelled: float,
    where: device.Device, max_lengths: Sequence[int], progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:  # fmt: skip
    """See the module's text.

    Args:
        given: settings that are to stay: a method, a precision, ...
        model_config: the model's transformers config.
        rows: their lengths, and how they come together.
        labelled: share of the tokens that carry a label.
        where: it is to fit; its budget is known.
        max_lengths: that may be chosen, the longest first.
        progress: is called with the number of ways that are behind, and of all.

    Raises:
        FituneError: no way agrees with what is given; the method's own reason, where it has one.
    """
    outside = sum(plan.outside_of(where).values()) + (
        2 * device.calibration(where.name).workspace if where.kind == "cuda" else 0
    )
    found: list[Candidate] = []
    misses: list[Candidate] = []
    combinations = 0
    ways = list(_ways(given, model_config, where))
    if not ways:
        raise _no_way(given, model_config, where)
    question = _Question(rows, labelled, where, outside)
    for number, way in enumerate(ways):
        progress(number, len(ways))
        lines = _lines(way.config, model_config, where.target)
        if lines is None:
            continue
        for longest in max_lengths:
            one, tried = _candidate(question, way, lines, longest)
            combinations += tried
            (found if one.batch_size else misses).append(one)
    progress(len(ways), len(ways))
    return Found(sorted(found, key=_rank), combinations, sorted(misses, key=lambda one: one.needed))


def _rank(one: Candidate) -> tuple[float, float, float]:
    """Better results first, in bands; then what takes less time, or where nobody knows the device's rate less work;
    then longer rows."""
    return -round(one.quality / BAND), -one.max_length, one.seconds or one.flops_per_token


def _ways(given: Mapping[str, Any], model_config: PretrainedConfig, where: device.Device) -> Iterator[_Way]:
    """Every method that agrees with what was given, plain and quantized; none under two names. Which blocks are
    recomputed is left to the plan, where it is not given."""
    empty = without_weights(model_config)
    family = families.of(empty)
    computing = "bf16" if where.bf16 and where.kind == "cuda" else "fp16" if where.kind == "cuda" else "fp32"
    wanted_method = given.get("method")
    own: dict[str, tuple[dict[str, object], str]] = {}
    if wanted_method is not None and wanted_method not in METHODS:
        own[wanted_method] = {"method": wanted_method}, ""  # nobody measured it
    # who gives settings of a method means that method
    meant = {method.name for method in methods.TABLE.values() if method.options and method.options in given}
    seen: set[str] = set()
    accuracy, kept = measured()["accuracy"], measured()["gain_kept"]
    for name, (settings, result) in {**WAYS, **own}.items():
        quality = accuracy.get(result, UNKNOWN)
        if wanted_method is None and meant and settings["method"] not in meant:
            continue
        # of ways that reach little, one in full and one in few bits are enough
        little = quality < LITTLE and "method" not in given
        for quantizer in ("none", "nf4") if little else ("none", "int8", "nf4"):
            wanted = {
                **settings,
                "quant": {"name": quantizer},
                "precision": computing,
                "checkpointing": given.get("checkpointing", False if little else AUTO),
            }
            whole = merge(wanted, given)
            key = json.dumps(whole, sort_keys=True, default=str)
            if not _agree(wanted, whole) or key in seen or not _possible(whole, empty, family, where):
                continue
            seen.add(key)
            label = name if quantizer == "none" else f"{name} on {quantizer}"
            saver = ", checkpointing" if whole["checkpointing"] not in (False, AUTO) else ""
            yield _Way(label + saver, whole, quality * kept[quantizer])


def _agree(wanted: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Does what was given leave a way as it is? Its precision, and the accumulation that some need, may be others."""
    names = [one.get("name") if isinstance(one, Mapping) else one for one in (wanted["quant"], whole["quant"])]
    if names[0] != names[1]:
        return False
    for key, value in wanted.items():
        if key in ("quant", "precision"):
            continue
        there = whole[key]
        if isinstance(value, Mapping):
            if any(there.get(name) != inner for name, inner in value.items()):
                return False
        elif there != value:
            return False
    return True


def _no_way(given: Mapping[str, object], model_config: PretrainedConfig, where: device.Device) -> FituneError:
    """Why no way agrees with what was given."""
    try:
        config = settings_only(given)
        empty = without_weights(model_config)
        family = families.of(empty)
        methods.find(config.method).expected(empty, family, config)
    except FituneError as error:
        return error
    fixed = ", ".join(sorted(given)) or "nothing"
    return ConfigError(
        "no method agrees with all that is given",
        received=f"settings that must stay: {fixed}",
        fix="give fewer of them, or name the --method and plan that one run with `fitune plan`",
    )


def _possible(settings: Mapping[str, object], empty: CausalLM, family: families.Family, where: device.Device) -> bool:
    """Can the method be put on this model, quantized so?"""
    try:
        config = settings_only(settings)
        method = methods.find(config.method)
        method.check(config)
        expected = method.expected(empty, family, config)
        if config.quant.name != "none":
            there = methods.Quantized(quant.planned(empty, config.quant), config.quant.name, where.kind)
            return method.quant_problem(empty, family, config, there) is None
    except FituneError:
        return False
    return expected is None or bool(expected)


def _lines(config: RunConfig, model_config: PretrainedConfig, target: Target) -> _Lines | None:
    """None: this way cannot be traced."""
    if not isinstance(config.checkpointing, str):
        line = _line(config, model_config, target)
        return None if line is None else _Lines(line, line)
    none, all_ = (
        _line(config.model_copy(update={"checkpointing": how}), model_config, target) for how in (False, True)
    )
    if none is None or all_ is None:
        return None
    if config.checkpointing == AUTO:
        return _Lines(none, all_, 0, flops.recomputed(none.counts, True))
    number = flops.recomputed(none.counts, config.checkpointing)
    return _Lines(none, all_, number, number)


def _line(config: RunConfig, model_config: PretrainedConfig, target: Target) -> _Line | None:
    """Two traces of small models, and what they say of the whole one. None: this way cannot be traced."""
    depth = model_config.num_hidden_layers
    # blocks of the small models: those that the method names, and one or two of the others
    named = {"freeze": config.freeze.blocks, "tail": config.tail.blocks}.get(config.method, 0)
    depths = (min(depth, named + 1), named + 2)
    try:
        low = _small(config, model_config, depths[0], target)
        if depth <= depths[0]:
            return low
        high = _small(config, model_config, min(depths[1], depth), target)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, FituneError):
        return None
    share = float(depth - depths[0])

    def grown(a: float, b: float) -> float:
        return float(a + share * (b - a))

    phases = {
        phase: (grown(low.phases[phase][0], high.phases[phase][0]), grown(low.phases[phase][1], high.phases[phase][1]))
        for phase in low.phases
    }
    values = {f.name: grown(getattr(low.counts, f.name), getattr(high.counts, f.name)) for f in fields(Counts)}
    through = [one.counts.share * n for one, n in zip((low, high), depths, strict=True)]  # blocks, not their share
    return _Line(phases, Counts(**{**values, "share": min(1.0, grown(*through) / depth)}))


def _small(config: RunConfig, model_config: PretrainedConfig, depth: int, target: Target) -> _Line:
    """A model of that many blocks: bytes of each phase as a line in tokens."""
    config = config.model_copy(update={"offload": False})  # its blocks may not be there
    small = deepcopy(model_config)
    small.num_hidden_layers = depth
    if getattr(small, "layer_types", None):
        small.layer_types = list(model_config.layer_types)[:depth]
    # the loss goes in chunks: labels for one and a bit are enough, more take more time here and no more memory
    labels = chunks.least(config, small.vocab_size, target) // 4 + 8
    warm, *batches = (
        steps.made_up(4, tokens // 4, small.vocab_size, labels, config.wanted) for tokens in (32, *TOKENS)
    )
    layout = steps.likely_layout(config.layout, small)
    work = plan.Work(config, small, [[warm], *([batch] for batch in batches)], None, layout)
    model, tracer = plan.started(work, target)
    counted = flops.counts(model, config)
    attached.of(model).label_rows = "no"  # few rows have labels here, in a run perhaps all
    tops = tops_of_steps(plan.over(model, tracer, work, target, saves=False))[1:]
    slopes = {phase: (tops[1][phase] - tops[0][phase]) / (TOKENS[1] - TOKENS[0]) for phase in tops[0]}
    return _Line({p: (tops[0][p] - slopes[p] * TOKENS[0], slopes[p]) for p in slopes}, counted)


def _candidate(question: _Question, way: _Way, lines: _Lines, longest: int) -> tuple[Candidate, int]:
    """A way with rows of at most that length; and how many sizes of batches were looked at."""
    rows, where, config = question.rows, question.where, way.config
    cut = np.minimum(rows.lengths, longest)
    tried: set[int] = set()

    def needed(again: int, batch: int) -> int:
        tried.add(batch)
        most = lines.bytes(rows(batch, longest), again)
        return (int(most * MARGIN) + SEGMENT if where.kind == "cuda" else int(most)) + question.outside

    budget, most = where.budget or 0, min(MOST, len(rows.samples))
    kept, batch = (_largest(partial(needed, again), budget, most) for again in (lines.least, lines.most))
    # smaller micro-batches cost no operations, recomputed blocks do: as few as let a row fit
    again = next((n for n in range(lines.least, lines.most) if needed(n, 1) <= budget), lines.most)
    counts = lines.none.counts
    blocks = round(counts.blocks)
    which = named(range(blocks - again, blocks)) if config.checkpointing == AUTO else config.checkpointing
    work = flops.per_token(counts, cut, question.labelled, checkpointing=which) * float(cut.sum())
    rate = rate_of(where, config.precision)
    time = flops.seconds(work, rate, quantized=config.quant.name != "none", cpu=where.kind == "cpu")
    tokens = flops.saturating_tokens(rate, where.bandwidth, 2.0)
    found = Candidate(
        name=way.name,
        settings={**way.settings, "max_length": longest},
        batch_size=batch,
        kept=0 if config.checkpointing not in (False, AUTO) else kept,
        max_length=longest,
        needed=needed(lines.most, max(1, batch)),
        quality=way.quality,
        trainable=int(counts.trainable),
        flops_per_token=work / max(1.0, float(cut.sum())),
        seconds=time,
        enough=None if tokens is None else max(1, round(tokens / max(1.0, float(cut.mean())))),
    )
    return found, len(tried)


def rate_of(where: device.Device, name: str) -> float | None:
    """TFLOP/s of products in a precision: catalogued of a GPU, measured of this machine's CPU."""
    return precision.rates(torch.device("cpu"))[name] / 1e3 if where.kind == "cpu" else where.tflops


def _largest(needed: Callable[[int], int], budget: int, most: int) -> int:
    """The largest number of rows that fits; 0: none."""
    if needed(1) > budget:
        return 0
    low, high = 1, 2
    while high <= most and needed(high) <= budget:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= budget else (low, middle)
    return low


__all__ = ["Candidate", "Found", "search"]
