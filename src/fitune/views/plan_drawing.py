"""A memory plan drawn in a terminal: what it needs as a bar, and the course of the run as stacked columns.

In: a plan, the width in columns. Out: renderables for rich, in colours, or in letters where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

from fitune.core.plan import Plan, Point
from fitune.views.plan import OUTSIDE, Unit, look_of, needed_parts, outside_of, stack_of, unit_of
from fitune.views.stacked import BEYOND

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Pens:
    """What a console can show. plain: letters take the place of colours; ascii: nothing but letters."""

    plain: bool
    ascii: bool

    def full(self, name: str) -> tuple[str, str]:
        """(character, style) of a cell that a category fills."""
        look = look_of(name)
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
    unit, parts, budget = unit_of(plan), needed_parts(plan), plan.budget
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
    text = f"budget {budget}"
    beside = len(text) + 1 <= at
    return f"{text} {pens.sign('▼', 'v')}".rjust(at + 1) if beside else " " * at + f"{pens.sign('▼', 'v')} {text}"


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
    if len(plan.timeline) < 2:
        return Text("no timeline: the plan is made by closed forms")
    unit, budget = unit_of(plan), plan.budget
    left = max(len(unit.text(plan.needed)), len(unit.text(budget or 0)) if budget else 0, 4) + 1
    columns = _columns(plan.timeline, width - left - 1)
    stacks = [{**stack_of(point.parts), OUTSIDE: outside_of(plan)} for point in columns]
    totals = [sum(stack.values()) for stack in stacks]
    most = max(totals)
    high = max(most, budget) if budget and budget <= BEYOND * most else most
    line = min(int(budget / high * height), height - 1) if budget and budget <= high else None
    levels = [_levels(stack, height * 8 / high) for stack in stacks]
    top = max(range(len(totals)), key=totals.__getitem__)
    text = Text(no_wrap=True, overflow="crop")
    mark = f"peak of tensors {unit.named(plan.peak.bytes)}"
    text.append(_peak_above(mark, left + 1 + top, width, pens) + "\n", "bold")
    axis = {height - 1: unit.text(high), 0: "0"} | ({line: unit.text(budget)} if line is not None and budget else {})
    for row in reversed(range(height)):
        text.append(axis.get(row, "").rjust(left - 1) + " " + pens.sign("│", "|"), "dim")
        for cells in levels:
            text.append(*_cell(cells, row, row == line, pens))
        text.append("\n")
    text.append(_names_below([point.phase for point in columns], left + 1, pens))
    there = {name: max(stack[name] for stack in stacks) for name in stacks[0]}
    text.append("\n")
    return text.append(_legend(there, unit, width, pens, "the most of each category, "))


def _columns(timeline: Sequence[Point], count: int) -> list[Point]:
    """For each of `count` equal stretches its largest point, so that no peak is lost; else the last one before it."""
    found: list[Point | None] = [None] * count
    for point in timeline:
        at = min(int(point.at * count), count - 1)
        there = found[at]
        if there is None or sum(point.parts.values()) > sum(there.parts.values()):
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
        back = f" on {look_of(max(inside, key=_second)[0]).colour}" if filled >= 4 else ""
        return pens.sign("╌", "-"), f"bold red{back}"
    if not inside or (pens.plain and filled < 4):
        return " ", ""
    name = max(inside, key=_second)[0]
    if pens.plain:
        return pens.full(name)
    if filled < 8 or len(inside) == 1:
        return BLOCKS[filled], look_of(name).colour
    two = sorted(inside, key=_second)[-2:]
    lower, upper = (one for one in inside if one in two)
    share = min(max(round(8 * lower[1] / (lower[1] + upper[1])), 1), 7)
    return BLOCKS[share], f"{look_of(lower[0]).colour} on {look_of(upper[0]).colour}"


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def _peak_above(text: str, at: int, width: int, pens: Pens) -> str:
    mark = pens.sign("▼", "v")
    left = f"{text} {mark}"
    return " " * at + f"{mark} {text}" if at + len(left) <= width else left.rjust(at + 1)


def _names_below(phases: Sequence[str], left: int, pens: Pens, most: int = 3) -> str:
    """The phases' names below where they begin, in up to `most` lines; some are left out where there is no room."""
    lines = [""] * most
    at, width = 0, len(phases)
    for name, some in groupby(phases):
        begin, text = at, pens.sign("└", "'") + name
        if at + cell_len(text) > width:  # near the end the name stands before its mark
            text = name + pens.sign("┘", "'")
            begin = max(at + 1 - cell_len(text), 0)
        free = next((n for n, line in enumerate(lines) if not line or cell_len(line) < begin), None)
        if free is not None:
            lines[free] += " " * (begin - cell_len(lines[free])) + text
        at += len(list(some))
    return "\n".join(" " * left + line for line in lines if line)
