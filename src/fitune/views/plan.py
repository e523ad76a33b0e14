"""A memory plan as a person sees it: sentences, tables and drawings in the terminal, and a page.

In: a plan, a plain mapping as JSON has it; its sizes are bytes. Out: a verdict, renderables for rich, an HTML page. The
words are the same everywhere. What is drawn besides tensors is grey: what else the allocator has given out (workspaces,
and sizes rounded up), fragmentation (what it reserves beyond that), and what lies outside of the allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fitune.views.charts import (
    BEYOND,
    NARROW,
    WIDE,
    Layer,
    Limit,
    Part,
    Peak,
    Span,
    StackedBar,
    area_chart,
    stacked_bars,
)
from fitune.views.pages import render

Plan = Mapping[str, Any]


@dataclass(frozen=True)
class Look:
    """How a category is drawn: its variable in the page, its colour in a terminal, its letter where there are none.

    The colours differ for people who see no red, green or blue too, most of all those of neighbours.
    """

    variable: str
    colour: str
    letter: str


LOOKS = {  # in the order of stacking
    "frozen weights": Look("--frozen", "#6674e8", "W"),
    "quantization constants": Look("--constants", "#a5dcf7", "Q"),
    "trainable weights": Look("--trainable", "#2f9e57", "T"),
    "gradients": Look("--gradients", "#eadb8a", "G"),
    "optimizer states": Look("--states", "#c968bb", "O"),
    "activations": Look("--activations", "#5fd0bd", "A"),
    "logits and loss": Look("--loss", "#a83a72", "L"),
    "dequantized and cast weights": Look("--plain", "#f08d9b", "D"),
    "temporaries": Look("--temporaries", "#b3b342", "x"),
}
CATEGORIES = tuple(LOOKS)
BESIDE, FRAGMENTATION, OUTSIDE = "workspaces and rounding", "fragmentation", "outside"
TEMPORARIES = "temporaries"
GREYS = {
    BESIDE: Look("--beside", "#c4c7cc", "+"),
    FRAGMENTATION: Look("--fragmentation", "#9a9da3", "%"),
    OUTSIDE: Look("--outside", "#6b7078", "#"),
}
SMALL = 0.0005  # of the peak: what is never more joins the temporaries in a table
BLOCKS = " ▁▂▃▄▅▆▇█"
MIB, GIB = 2**20, 2**30
PLACES = {
    "load": "while the model is loaded",
    "start": "while the method is put on the model",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "checkpoint": "while a checkpoint is written",
}


# ---- sizes ----
@dataclass(frozen=True)
class Unit:
    """One unit for all sizes of a plan. places: decimals in text; tables of GiB have one more."""

    name: str
    size: int
    places: int

    @property
    def form(self) -> str:
        """The format of a value in text."""
        return f",.{self.places}f"

    def text(self, size: float) -> str:
        """A number of bytes in this unit, without its name."""
        return f"{size / self.size:{self.form}}"

    def cell(self, size: float) -> str:
        """The same for a table: - for nothing, and never 0 for something."""
        places = self.places + (self.size == GIB)
        least = 10.0**-places
        small = 0 < size / self.size < least / 2
        return "-" if not size else f"<{least:.{places}f}" if small else f"{size / self.size:,.{places}f}"

    def named(self, size: float) -> str:
        """A number of bytes with the unit; from 10 GiB on that is GiB."""
        unit = GIBS if size >= 10 * GIB else self
        return f"{unit.text(size)} {unit.name}"


GIBS = Unit("GiB", GIB, 1)


def unit_of(plan: Plan) -> Unit:
    """GiB from 10 GiB on, else MiB with as many decimals as the size of the plan gives a meaning."""
    size = max(plan["needed"], plan["peak"]["bytes"])
    return GIBS if size >= 10 * GIB else Unit("MiB", MIB, 0 if size >= 1000 * MIB else 1 if size >= 10 * MIB else 2)


def _stack(parts: Mapping[str, int], kept: Sequence[str] = CATEGORIES) -> dict[str, int]:
    """Bytes by category, in the order of stacking; what is not kept or has another name is temporary."""
    stack = dict.fromkeys([name for name in CATEGORIES if name in kept or name == TEMPORARIES], 0)
    for name, size in parts.items():
        stack[name if name in stack else TEMPORARIES] += size
    return stack


def _phases(plan: Plan) -> list[Mapping[str, Any]]:
    return list(plan.get("phases") or [plan["peak"]])


def _outside(plan: Plan) -> int:
    return sum(int(size) for size in plan["outside"].values())


def _fragmentation(plan: Plan) -> int:
    return max(int(plan["needed"]) - int(plan["allocated"]) - _outside(plan), 0)


def _all(plan: Plan) -> dict[str, int]:
    """What the plan needs, by what it is needed for."""
    stack = _stack(plan["peak"]["parts"])
    beside = max(int(plan["allocated"]) - sum(stack.values()), 0)
    return {**stack, BESIDE: beside, FRAGMENTATION: _fragmentation(plan), OUTSIDE: _outside(plan)}


def _look(name: str) -> Look:
    return LOOKS.get(name) or GREYS[name]


# ---- words ----
def verdict(plan: Plan) -> str:
    """What the plan needs, whether that fits its budget, and what it is at the peak: one sentence without a full stop.

    Sizes are MiB or GiB, as they are told.
    """
    return "; ".join(part for part in (_needs(plan), _fits(plan), _where(plan)) if part)


def _needs(plan: Plan) -> str:
    unit = unit_of(plan)
    added = {"fragmentation": _fragmentation(plan), "outside": _outside(plan)}
    told = [f"{unit.text(size)} {name}" for name, size in added.items() if unit.text(size).strip("0.")]
    text = f"needs {unit.named(plan['needed'])}"
    allocated = f"at most {unit.text(plan['allocated'])} allocated"
    return f"{text} ({' + '.join([allocated, *told])})" if told else text


def _fits(plan: Plan) -> str:
    if plan["fits"] is None or plan["budget"] is None:
        return ""
    unit = unit_of(plan)
    budget, off = unit.named(plan["budget"]), unit.named(abs(plan["spare"]))
    return f"fits into {budget} with {off} to spare" if plan["fits"] else f"misses {budget} by {off}"


def _where(plan: Plan) -> str:
    peak = plan["peak"]
    place = PLACES.get(peak["phase"], f"in the {peak['phase']}")
    shares = {name: size / max(peak["bytes"], 1) for name, size in _stack(peak["parts"]).items()}
    most = sorted(shares, key=lambda name: -shares[name])[:3]
    told = [f"{name} {_percent(shares[name], '.0f')}" for name in most if shares[name] >= 0.1]
    return f"the peak is {place}" + (f": {', '.join(told)}" if told else "")


def _percent(share: float, form: str) -> str:
    return f"{100 * share:{form}} %"


# ---- tables ----
@dataclass(frozen=True)
class Grid:
    """The most of each phase by category; rows of zeros are left out, small ones are temporary."""

    unit: Unit
    phases: list[str]
    rows: list[tuple[str, list[int]]]
    total: list[int]
    peak: int | None  # which column


def grid(plan: Plan) -> Grid:
    """The figures of `plan_table`, in bytes."""
    phases = _phases(plan)
    stacks = [_stack(phase["parts"]) for phase in phases]
    least = SMALL * plan["peak"]["bytes"]
    kept = [name for name in CATEGORIES if max(stack[name] for stack in stacks) >= least]
    stacks = [_stack(phase["parts"], kept) for phase in phases]
    rows = [(name, [stack[name] for stack in stacks]) for name in stacks[0]]
    names = [str(phase["phase"]) for phase in phases]
    peak = names.index(plan["peak"]["phase"]) if plan["peak"]["phase"] in names else None
    total = [phase["bytes"] for phase in phases]
    return Grid(unit_of(plan), names, [row for row in rows if any(row[1])], total, peak)


def plan_table(plan: Plan) -> Table:
    """A row for each category, a column for each phase, and what they are together; the peak's column is marked."""
    shown = grid(plan)
    cell = shown.unit.cell
    table = Table(title=f"memory by phase, {shown.unit.name}", title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for number, name in enumerate(shown.phases):
        style = "bold yellow" if number == shown.peak else ""
        table.add_column(escape(name), justify="right", no_wrap=True, style=style, header_style=style or "bold")
    for name, sizes in shown.rows:
        table.add_row(f"[on {LOOKS[name].colour}] [/] {name}", *map(cell, sizes))
    table.add_row("total", *map(cell, shown.total), style="bold")
    return table


def compare_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What was predicted beside what was measured.

    Args:
        rows: each with `what` it is, and `predicted` and `measured` bytes. The difference is predicted less measured,
            in percent of what was measured.
    """
    table = Table(title="predicted and measured, MiB", title_justify="left", box=None, pad_edge=False)
    table.add_column("", style="cyan")
    for name in ("predicted", "measured", "difference", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        off = (predicted - measured) / MIB
        percent = f"{100 * (predicted - measured) / measured:+z.1f}" if measured else "-"
        sizes = (f"{predicted / MIB:,.1f}", f"{measured / MIB:,.1f}", f"{off:+z,.1f}")
        table.add_row(escape(str(row["what"])), *sizes, percent)
    return table


# ---- drawings in the terminal ----
@dataclass(frozen=True)
class Pens:
    """What a console can show. plain: letters take the place of colours; ascii: nothing but letters."""

    plain: bool
    ascii: bool

    def full(self, name: str) -> tuple[str, str]:
        """(character, style) of a cell that a category fills."""
        look = _look(name)
        return (look.letter, "") if self.plain else ("█", look.colour)

    def sign(self, text: str, instead: str) -> str:
        """A character, or another where only ASCII goes."""
        return instead if self.ascii else text


@dataclass(frozen=True)
class Drawing:
    """A renderable that is drawn when it is known what its console can show."""

    draw: Callable[[Pens], Text]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        plain = console.color_system is None or console.no_color or options.ascii_only
        yield self.draw(Pens(plain, options.ascii_only))


def plan_bar(plan: Plan, width: int) -> Drawing:
    """What the plan needs as one bar, with its budget marked and a legend below.

    Args:
        width: in columns.
    """
    return Drawing(lambda pens: _draw_bar(plan, width, pens))


def _draw_bar(plan: Plan, width: int, pens: Pens) -> Text:
    unit, parts, budget = unit_of(plan), _all(plan), plan["budget"]
    most = max(sum(parts.values()), 1)
    high = budget if budget and most < budget <= BEYOND * most else most
    text = Text(no_wrap=True, overflow="crop")
    if budget:
        text.append(_budget_above(unit.named(budget), budget / high, width, pens) + "\n")
    edge = done = 0
    for name, size in parts.items():
        edge += size
        until = round(edge / high * width)
        letter, style = pens.full(name)
        text.append(letter * (until - done), style)
        done = until
    text.append(pens.sign("·", ".") * (width - done) + "\n", "dim")
    return text.append(_legend(parts, unit, width, pens))


def _budget_above(budget: str, share: float, width: int, pens: Pens) -> str:
    """The line that points down to the budget, which is at `share` of the width."""
    if share > 1:
        return f"budget {budget} {pens.sign('→', '>')}".rjust(width)
    at = min(int(share * width), width - 1)
    words = f"budget {budget}"
    beside = len(words) + 1 <= at
    return f"{words} {pens.sign('▼', 'v')}".rjust(at + 1) if beside else " " * at + f"{pens.sign('▼', 'v')} {words}"


def _legend(parts: Mapping[str, int], unit: Unit, width: int, pens: Pens, lead: str = "") -> Text:
    """Name and size of each category that is not zero, in lines of `width`."""
    entries = [Text(f"{lead}{unit.name}:")]
    for name in (name for name, size in parts.items() if size):
        letter, style = pens.full(name)
        sign = ("■" if style else letter, style)
        entries.append(Text.assemble(sign, f" {name} {unit.cell(parts[name])}"))
    lines = [entries[0]]
    for entry in entries[1:]:
        if len(lines[-1]) + 2 + len(entry) > width:
            lines.append(entry)
        else:
            lines[-1] = Text.assemble(lines[-1], "  ", entry)
    return Text("\n").join(lines)


def plan_timeline(plan: Plan, width: int, height: int) -> Drawing:
    """The course of the run as stacked columns, with its phases below and the budget as a line, where that is near.

    Args:
        width: in columns, the axis among them.
        height: of the columns, in lines; the peak's mark and the names of phases come on top of that.
    """
    return Drawing(lambda pens: _draw_timeline(plan, width, height, pens))


def _draw_timeline(plan: Plan, width: int, height: int, pens: Pens) -> Text:
    if len(plan.get("timeline") or []) < 2:
        return Text("no timeline: the plan is made by closed forms")
    unit, budget = unit_of(plan), plan["budget"]
    left = max(len(unit.text(plan["needed"])), len(unit.text(budget or 0)) if budget else 0, 4) + 1
    columns = _columns(plan["timeline"], width - left - 1)
    stacks = [{**_stack(point["parts"]), OUTSIDE: _outside(plan)} for point in columns]
    totals = [sum(stack.values()) for stack in stacks]
    most = max(totals)
    high = max(most, budget) if budget and budget <= BEYOND * most else most
    line = min(int(budget / high * height), height - 1) if budget and budget <= high else None
    levels = [_levels(stack, height * 8 / high) for stack in stacks]
    top = max(range(len(totals)), key=totals.__getitem__)
    text = Text(no_wrap=True, overflow="crop")
    mark = f"peak of tensors {unit.named(plan['peak']['bytes'])}"
    text.append(_peak_above(mark, left + 1 + top, width, pens) + "\n", "bold")
    axis = {height - 1: unit.text(high), 0: "0"} | ({line: unit.text(budget)} if line is not None else {})
    for row in reversed(range(height)):
        text.append(axis.get(row, "").rjust(left - 1) + " " + pens.sign("│", "|"), "dim")
        for cells in levels:
            text.append(*_cell(cells, row, row == line, pens))
        text.append("\n")
    text.append(_names_below([point["phase"] for point in columns], left + 1, pens))
    there = {name: max(stack[name] for stack in stacks) for name in stacks[0]}
    text.append("\n")
    return text.append(_legend(there, unit, width, pens, "the most of each, "))


def _columns(timeline: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """For each of `count` equal stretches its largest point, so that no peak is lost; else the last one before it."""
    found: list[Mapping[str, Any] | None] = [None] * count
    for point in timeline:
        at = min(int(point["at"] * count), count - 1)
        there = found[at]
        if there is None or sum(point["parts"].values()) > sum(there["parts"].values()):
            found[at] = point
    last, columns = timeline[0], []
    for point_or_none in found:
        last = point_or_none or last
        columns.append(last)
    return columns


def _levels(stack: Mapping[str, int], scale: float) -> list[tuple[str, int, int]]:
    """(category, from, to) in eighths of a line."""
    levels, edge = [], 0
    for name, size in stack.items():
        start, edge = edge, edge + size
        levels.append((name, round(start * scale), round(edge * scale)))
    return levels


def _cell(levels: Sequence[tuple[str, int, int]], row: int, limit: bool, pens: Pens) -> tuple[str, str]:
    """(character, style) of one cell: at most two categories can share it, or one and nothing."""
    inside = [(name, min(end, 8 * row + 8) - max(start, 8 * row)) for name, start, end in levels]
    inside = [(name, eighths) for name, eighths in inside if eighths > 0]
    filled = sum(eighths for _, eighths in inside)
    if limit and not (pens.plain and filled >= 4):
        back = f" on {_look(max(inside, key=_second)[0]).colour}" if filled >= 4 else ""
        return pens.sign("╌", "-"), f"bold red{back}"
    if not inside or (pens.plain and filled < 4):
        return " ", ""
    name = max(inside, key=_second)[0]
    if pens.plain:
        return pens.full(name)
    if filled < 8 or len(inside) == 1:
        return BLOCKS[filled], _look(name).colour
    two = sorted(inside, key=_second)[-2:]
    lower, upper = (one for one in inside if one in two)
    share = min(max(round(8 * lower[1] / (lower[1] + upper[1])), 1), 7)
    return BLOCKS[share], f"{_look(lower[0]).colour} on {_look(upper[0]).colour}"


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def _peak_above(words: str, at: int, width: int, pens: Pens) -> str:
    mark = pens.sign("▼", "v")
    left = f"{words} {mark}"
    return " " * at + f"{mark} {words}" if at + len(left) <= width else left.rjust(at + 1)


def _names_below(phases: Sequence[str], left: int, pens: Pens, most: int = 3) -> str:
    """The phases' names below where they begin, in up to `most` lines; some are left out where there is no room."""
    lines = [""] * most
    at, width = 0, len(phases)
    for name, some in groupby(phases):
        begin, words = at, pens.sign("└", "'") + name
        if at + cell_len(words) > width:  # near the end the name stands before its mark
            words = name + pens.sign("┘", "'")
            begin = max(at + 1 - cell_len(words), 0)
        free = next((n for n, line in enumerate(lines) if not line or cell_len(line) < begin), None)
        if free is not None:
            lines[free] += " " * (begin - cell_len(lines[free])) + words
        at += len(list(some))
    return "\n".join(" " * left + line for line in lines if line)


# ---- the page ----
def page(plan: Plan) -> str:
    """The plan as a page that needs nothing from elsewhere: verdict, drawings, tables and notes."""
    name = str(plan["model"]).replace("\\", "/").rpartition("/")[2]
    quant = "" if plan["quant"] == "none" else f", frozen weights as {plan['quant']}"
    rows = f", rows up to {plan['max_length']:,} tokens" if plan["max_length"] else ""
    device = plan["gpu"] or plan["device"]
    how = "traced" if plan["how"] == "trace" else f"by closed forms{_because(plan)}"
    return render(
        "plan",
        title=f"fitune: memory of {plan['method']} on {name}",
        subtitle=f"{plan['precision']}{quant}{rows}, {device}; {how}",
        numbers=_numbers(plan),
        verdict=verdict(plan).replace(" %", "\N{NO-BREAK SPACE}%"),
        level="" if plan["fits"] is None else "ok" if plan["fits"] else "refuse",
        bars=[_bars(plan, width) for width in (WIDE, NARROW)],
        timeline=[_area(plan, width) for width in (WIDE, NARROW)] if len(plan.get("timeline") or []) > 1 else [],
        grid=grid(plan),
        looks=LOOKS,
        held=_held(plan),
        closed=_closed(plan),
        largest=plan["peak"].get("largest") or [],
        unit=unit_of(plan),
        notes=plan.get("notes") or [],
    )


def _because(plan: Plan) -> str:
    return f" ({plan['why']})" if plan.get("why") else ""


def _numbers(plan: Plan) -> list[tuple[str, str]]:
    unit, share = unit_of(plan), plan["trainable"] / max(plan["total"], 1)
    numbers = [("needed", unit.named(plan["needed"]))]
    if plan["budget"] is not None and plan["spare"] is not None:
        name = "to spare" if plan["spare"] >= 0 else "missing"
        numbers += [("budget", unit.named(plan["budget"])), (name, unit.named(abs(plan["spare"])))]
    return [
        *numbers,
        (f"trained, {_percent(share, '.2f')} of all", f"{plan['trainable']:,}"),
        (f"tokens at once, in {plan['rows']:,} {'row' if plan['rows'] == 1 else 'rows'}", f"{plan['tokens']:,}"),
    ]


def _limit(plan: Plan, unit: Unit) -> Limit | None:
    budget = plan["budget"]
    return None if budget is None else Limit(f"budget {unit.named(budget)}", budget / unit.size)


def _bar(label: str, sizes: Mapping[str, int], unit: Unit, *, strong: bool = False) -> StackedBar:
    parts = [Part(name, sizes.get(name, 0) / unit.size, _look(name).variable) for name in [*LOOKS, *GREYS]]
    return StackedBar(label, parts, strong)


def needed_bars(plans: Mapping[str, Plan], width: int, *, label: str) -> str:
    """What each of some plans for one device needs, by what it is needed for.

    Args:
        plans: by their names; the first is printed bold.
        width: of the drawing.
        label: what it shows, for those who cannot see it.
    """
    first = next(iter(plans.values()))
    unit = max((unit_of(plan) for plan in plans.values()), key=lambda one: one.size)
    bars = [_bar(name, _all(plan), unit, strong=plan is first) for name, plan in plans.items()]
    return stacked_bars(bars, label=label, unit=unit.name, form=unit.form, limit=_limit(first, unit), width=width)


def _bars(plan: Plan, width: int) -> str:
    unit = unit_of(plan)
    bars = [_bar(phase["phase"], _stack(phase["parts"]), unit) for phase in _phases(plan)]
    label = "memory by phase and category, and what is needed in all"
    bars.append(_bar("needed", _all(plan), unit, strong=True))
    return stacked_bars(bars, label=label, unit=unit.name, form=unit.form, limit=_limit(plan, unit), width=width)


def _area(plan: Plan, width: int) -> str:
    unit, points = unit_of(plan), plan["timeline"]
    stacks = [{**_stack(point["parts"]), OUTSIDE: _outside(plan)} for point in points]
    layers = [Layer(name, [s[name] / unit.size for s in stacks], _look(name).variable) for name in stacks[0]]
    at = [point["at"] for point in points]
    totals = [sum(stack.values()) - stack[OUTSIDE] for stack in stacks]
    top = max(range(len(totals)), key=totals.__getitem__)
    return area_chart(
        layers,
        at,
        label="memory over the course of the run, by category",
        unit=unit.name,
        form=unit.form,
        spans=_spans(points),
        limit=_limit(plan, unit),
        peak=Peak(at[top], totals[top] / unit.size, f"peak of tensors {unit.named(plan['peak']['bytes'])}"),
        width=width,
    )


def _spans(points: Sequence[Mapping[str, Any]]) -> list[Span]:
    starts = [(name, next(iter(some))["at"]) for name, some in groupby(points, key=lambda point: str(point["phase"]))]
    ends = [start for _, start in starts[1:]] + [points[-1]["at"]]
    return [Span(name, start, end) for (name, start), end in zip(starts, ends, strict=True)]


def _held(plan: Plan) -> list[tuple[str, str]]:
    """What the device must hold, of which `needed` is the last line."""
    rows = {
        "allocated at most": plan["allocated"],
        "reserved by the allocator": plan.get("reserved"),
        "reserved with expandable segments": plan.get("reserved_expandable"),
        "least that the allocator gets by with": plan.get("smallest"),
        **{f"outside: {name}": size for name, size in plan["outside"].items()},
        "needed": plan["needed"],
    }
    return [(name, unit_of(plan).cell(size)) for name, size in rows.items() if size is not None]


def _closed(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(category, closed form, most of a phase in the trace, difference) of what both or one of them has."""
    if plan["how"] != "trace" or not plan["closed"]:
        return []
    cell, rows = unit_of(plan).cell, []
    stacks = [_stack(phase["parts"]) for phase in _phases(plan)]
    for name in dict.fromkeys([*CATEGORIES, *plan["closed"]]):
        closed, traced = plan["closed"].get(name), max(stack.get(name, 0) for stack in stacks)
        if closed or traced:
            off = _percent((closed - traced) / traced, "+z.1f") if traced and closed is not None else ""
            rows.append((name, "" if closed is None else cell(closed), cell(traced), off))
    return rows
