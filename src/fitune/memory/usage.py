"""What a trace shows: the most of each phase, the peak and what it is made of, and the timeline.

In: a tracer that saw a run. Out: Usage, in bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fitune.core.plan import Holding, Moment, Point
from fitune.memory.storage import (
    CATEGORIES,
    CONSTANTS,
    GRADIENTS,
    STATES,
    TRAINABLE,
    WEIGHTS,
    Block,
)
from fitune.memory.trace import Tracer

POINTS = 160  # of a timeline
PHASES = ("load", "start", "forward", "loss", "backward", "update", "evaluation", "answers", "checkpoint")


@dataclass(frozen=True)
class Usage:
    """The most of each phase, the peak, what it is made of, and the timeline."""

    phases: list[Moment]
    peak: Moment
    largest: list[Holding]
    timeline: list[Point]


def usage(tracer: Tracer, *, without: str = "") -> Usage:
    """See Usage. without: a phase behind "load" that does not count; what it leaves counts as loaded."""
    spans = _spans(tracer)
    totals, tops = _totals(tracer, spans)
    if tops.pop(without, None) is not None:
        ends = [*(at for at, _ in spans[1:]), len(totals)]
        tops["load"] = max(end for (_, phase), end in zip(spans, ends, strict=True) if phase == without) - 1
    highest = max(tops, key=lambda phase: totals[tops[phase]])
    step = max(1, len(totals) // POINTS)
    points = sorted({max(range(at, min(at + step, len(totals))), key=totals.__getitem__)
                     for at in range(0, len(totals), step)} | set(tops.values()))  # fmt: skip
    parts = _parts_at(tracer, points)
    phases = [Moment(phase, totals[at], parts[at]) for phase, at in tops.items()]
    timeline = [Point(at / max(1, len(totals) - 1), _phase_at(spans, at), parts[at]) for at in points]
    return Usage(phases, next(m for m in phases if m.phase == highest), _largest(tracer, tops[highest]), timeline)


def _spans(tracer: Tracer) -> list[tuple[int, str]]:
    """(first event, phase) of each stretch of the course, by the names of PHASES."""
    found: list[tuple[int, str]] = [(0, "load")]
    for at, phase, region in tracer.course:
        name = (region or "forward") if phase == "step" else phase
        if name and name != found[-1][1]:
            found.append((at, name))
    return found


def _phase_at(spans: Sequence[tuple[int, str]], event: int) -> str:
    return next(phase for at, phase in reversed(spans) if at <= event)


def _totals(tracer: Tracer, spans: Sequence[tuple[int, str]]) -> tuple[list[int], dict[str, int]]:
    """Bytes after each event, and of each phase the event with the most."""
    totals: list[int] = []
    now = 0
    for _, size in tracer.events:
        now += size
        totals.append(now)
    tops: dict[str, int] = {}
    ends = [at for at, _ in spans[1:]] + [len(totals)]
    for (start, phase), end in zip(spans, ends, strict=True):
        if end > start:
            top = max(range(start, end), key=totals.__getitem__)
            if phase not in tops or totals[top] > totals[tops[phase]]:
                tops[phase] = top
    return totals, {phase: tops[phase] for phase in PHASES if phase in tops}


def tops_of_steps(tracer: Tracer) -> list[dict[str, int]]:
    """Of each step the most bytes by phase: forward, loss, backward, update."""
    found: list[dict[str, int]] = []
    now, course, phase = 0, iter([*tracer.course, (len(tracer.events) + 1, "", "")]), ""
    at, *names = next(course)
    for number, (_, size) in enumerate(tracer.events):
        while number >= at:
            if names[0] == "step" and not names[1]:
                found.append({})
            phase = {"step": names[1] or "forward", "update": "update"}.get(names[0], "")
            at, *names = next(course)
        now += size
        if phase and found:
            found[-1][phase] = max(now, found[-1].get(phase, 0))
    return found


def _parts_at(tracer: Tracer, events: Sequence[int]) -> dict[int, dict[str, int]]:
    """Bytes by category after each of some events."""
    now: Counter[str] = Counter()
    found: dict[int, dict[str, int]] = {}
    wanted = iter([*events, -1])
    target = next(wanted)
    for number, (key, size) in enumerate(tracer.events):
        now[tracer.blocks[key].kind] += size
        if number == target:
            found[number] = {name: now[name] for name in CATEGORIES if now[name]}
            target = next(wanted)
    return found


def _largest(tracer: Tracer, event: int, most: int = 12) -> list[Holding]:
    """What is there at an event: storages of the same kind together, the largest first."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for block in tracer.blocks:
        if block.born <= event and (block.freed is None or block.freed > event):
            name = _name(block)
            sizes[name] += block.bytes
            counts[name] += 1
    return [Holding(name, counts[name], size) for name, size in sizes.most_common(most)]


def _name(block: Block) -> str:
    if block.kind in (WEIGHTS, CONSTANTS, TRAINABLE, GRADIENTS, STATES):
        return block.kind
    where = block.module.rpartition(".")[2]
    return f"{block.kind}: {where + ' ' if where else ''}{block.op.rpartition('::')[2]}"
