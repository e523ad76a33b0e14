"""A memory plan as a page that needs nothing from elsewhere: verdict, drawings, tables and notes.

In: a plan. Out: HTML; and the bars of several plans, for the page of the advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from fitune.core.plan import Plan, Point
from fitune.views.charts import NARROW, WIDE
from fitune.views.pages import render
from fitune.views.plan import (
    CATEGORIES,
    GREYS,
    LOOKS,
    OUTSIDE,
    Unit,
    grid,
    look_of,
    needed_parts,
    outside_of,
    percent,
    phases_of,
    stack_of,
    unit_of,
    verdict,
)
from fitune.views.stacked import Course, Layer, Limit, Part, Peak, Span, StackedBar, area_chart, stacked_bars


def page(plan: Plan) -> str:
    """The plan as a page that needs nothing from elsewhere: verdict, drawings, tables and notes."""
    name = plan.model.replace("\\", "/").rpartition("/")[2]
    quant = "" if plan.quant == "none" else f", frozen weights as {plan.quant}"
    rows = f", rows up to {plan.max_length:,} tokens" if plan.max_length else ""
    device = plan.gpu or plan.device
    how = "traced" if plan.how == "trace" else f"by closed forms{_because(plan)}"
    return render(
        "plan",
        title=f"fitune: memory of {plan.method} on {name}",
        subtitle=f"{plan.precision}{quant}{rows}, {device}; {how}",
        numbers=_numbers(plan),
        verdict=verdict(plan).replace(" %", "\N{NO-BREAK SPACE}%"),
        level="" if plan.fits is None else "ok" if plan.fits else "refuse",
        bars=[_bars(plan, width) for width in (WIDE, NARROW)],
        timeline=[over_time(plan, width) for width in (WIDE, NARROW)] if len(plan.timeline) > 1 else [],
        grid=grid(plan),
        looks=LOOKS,
        held=_held(plan),
        closed=_closed(plan),
        largest=plan.largest,
        unit=unit_of(plan),
        notes=plan.notes,
    )


def _because(plan: Plan) -> str:
    return f" ({plan.why})" if plan.why else ""


def _numbers(plan: Plan) -> list[tuple[str, str]]:
    unit, share = unit_of(plan), plan.trainable / max(plan.total, 1)
    numbers = [("needed", unit.named(plan.needed))]
    if plan.budget is not None and plan.spare is not None:
        name = "to spare" if plan.spare >= 0 else "missing"
        numbers += [("budget", unit.named(plan.budget)), (name, unit.named(abs(plan.spare)))]
    return [
        *numbers,
        (f"trained, {percent(share, '.2f')} of all", f"{plan.trainable:,}"),
        (f"tokens at once, in {plan.rows:,} {'row' if plan.rows == 1 else 'rows'}", f"{plan.tokens:,}"),
    ]


def _limit(budget: int | None, unit: Unit) -> Limit | None:
    return None if budget is None else Limit(f"budget {unit.named(budget)}", budget / unit.size)


def _bar(label: str, sizes: Mapping[str, int], unit: Unit, *, strong: bool = False) -> StackedBar:
    parts = [Part(name, sizes.get(name, 0) / unit.size, look_of(name).variable) for name in [*LOOKS, *GREYS]]
    return StackedBar(label, parts, strong)


def needed_bars(plans: Mapping[str, Plan], width: int, *, label: str) -> str:
    """What each of some plans for one device needs, by what it is needed for.

    Args:
        plans: by their names; the first is printed bold.
        width: of the drawing.
        label: what it shows, for those who cannot see it.
    """
    return bars_of({name: needed_parts(plan) for name, plan in plans.items()}, plans, width, label=label)


def bars_of(parts: Mapping[str, Mapping[str, int]], plans: Mapping[str, Plan], width: int, *, label: str) -> str:
    """The same of some of their parts, by the plans' names."""
    first = next(iter(plans.values()))
    unit = max((unit_of(plan) for plan in plans.values()), key=lambda one: one.size)
    return stacked(parts, first.budget, unit, width, label=label)


def stacked(parts: Mapping[str, Mapping[str, int]], budget: int | None, unit: Unit, width: int, *, label: str) -> str:
    """Bytes by what they are for, a bar for each name, and a budget where it is near enough to be drawn."""
    most = max(sum(sizes.values()) for sizes in parts.values())
    limit = _limit(budget, unit)
    if limit is not None and limit.value * unit.size > 20 * most:  # so far away that the bars could not be seen
        limit = None
    bars = [_bar(name, sizes, unit, strong=name == next(iter(parts))) for name, sizes in parts.items()]
    return stacked_bars(bars, label=label, unit=unit.name, form=unit.form, limit=limit, width=width)


def _bars(plan: Plan, width: int) -> str:
    unit = unit_of(plan)
    bars = [_bar(phase.phase, stack_of(phase.parts), unit) for phase in phases_of(plan)]
    label = "memory by phase and category, and what is needed in all"
    bars.append(_bar("needed", needed_parts(plan), unit, strong=True))
    return stacked_bars(bars, label=label, unit=unit.name, form=unit.form, limit=_limit(plan.budget, unit), width=width)


def over_time(plan: Plan, width: int, *, tensors: bool = False) -> str:
    """What is held over the course of a run, by category, as a drawing of that width; tensors: those alone."""
    unit, points = unit_of(plan), plan.timeline
    beside = {} if tensors else {OUTSIDE: outside_of(plan)}
    stacks = [{**stack_of(point.parts), **beside} for point in points]
    layers = [Layer(name, [s[name] / unit.size for s in stacks], look_of(name).variable) for name in stacks[0]]
    at = [point.at for point in points]
    totals = [sum(stack.values()) - stack.get(OUTSIDE, 0) for stack in stacks]
    top = max(range(len(totals)), key=totals.__getitem__)
    peak = Peak(at[top], totals[top] / unit.size, f"peak of tensors {unit.named(plan.peak.bytes)}")
    return area_chart(
        Course(layers, at, _spans(points), None if tensors else _limit(plan.budget, unit), peak),
        label="memory over the course of the run, by category",
        unit=unit.name,
        form=unit.form,
        width=width,
    )


def _spans(points: Sequence[Point]) -> list[Span]:
    starts = [(name, next(iter(some)).at) for name, some in groupby(points, key=lambda point: point.phase)]
    ends = [start for _, start in starts[1:]] + [points[-1].at]
    return [Span(name, start, end) for (name, start), end in zip(starts, ends, strict=True)]


def _held(plan: Plan) -> list[tuple[str, str]]:
    """What the device must hold, of which `needed` is the last line."""
    rows = {
        "allocated at most": plan.allocated,
        "reserved by the allocator": plan.reserved,
        "reserved with expandable segments": plan.reserved_expandable,
        "least that the allocator gets by with": plan.smallest,
        **{f"outside: {name}": size for name, size in plan.outside.items()},
        "needed": plan.needed,
    }
    return [(name, unit_of(plan).cell(size)) for name, size in rows.items() if size is not None]


def _closed(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(category, closed form, most of a phase in the trace, difference) of what both or one of them has."""
    if plan.how != "trace" or not plan.closed:
        return []
    cell, rows = unit_of(plan).cell, []
    stacks = [stack_of(phase.parts) for phase in phases_of(plan)]
    for name in dict.fromkeys([*CATEGORIES, *plan.closed]):
        closed, traced = plan.closed.get(name), max(stack.get(name, 0) for stack in stacks)
        if closed or traced:
            off = percent((closed - traced) / traced, "+z.1f") if traced and closed is not None else ""
            rows.append((name, "" if closed is None else cell(closed), cell(traced), off))
    return rows
