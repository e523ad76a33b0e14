"""A memory plan as a person sees it: colours, units, the verdict in a sentence, and tables.

In: a plan; its sizes are bytes. Out: a sentence, renderables for rich. plan_drawing.py draws it in a terminal, and
plan_page.py makes its page, with the same names and units. What is drawn besides tensors is grey: what else the
allocator has given out (workspaces, and sizes rounded up), fragmentation (what it reserves beyond that), and what lies
outside of the allocator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fitune.core import blocks
from fitune.core.plan import Compared, Moment, Plan, size_text
from fitune.core.units import GIB, MIB
from fitune.memory.rules import Rule


@dataclass(frozen=True)
class Look:
    """How a category is drawn: its variable in pages, its colour there on black and in a terminal, its colour on
    white, its letter where there are none.

    The colours differ for people who see no red, green or blue too, most of all those of neighbours.
    """

    variable: str
    colour: str
    on_white: str
    letter: str


LOOKS = {  # in the order of stacking
    "frozen weights": Look("--frozen", "#6674e8", "#3b3fa6", "W"),
    "quantization constants": Look("--constants", "#a5dcf7", "#88ccee", "Q"),
    "trainable weights": Look("--trainable", "#2f9e57", "#117733", "T"),
    "gradients": Look("--gradients", "#eadb8a", "#e3cf6a", "G"),
    "optimizer states": Look("--states", "#c968bb", "#aa4499", "O"),
    "activations": Look("--activations", "#5fd0bd", "#33a795", "A"),
    "logits and loss": Look("--loss", "#a83a72", "#882255", "L"),
    "dequantized and cast weights": Look("--plain", "#f08d9b", "#e0788a", "D"),
    "temporaries": Look("--temporaries", "#b3b342", "#8f8f2a", "x"),
}
CATEGORIES = tuple(LOOKS)
BESIDE, FRAGMENTATION, OUTSIDE = "workspaces and rounding", "fragmentation", "outside"
TEMPORARIES = "temporaries"
GREYS = {
    BESIDE: Look("--beside", "#c4c7cc", "#dfe1e4", "+"),
    FRAGMENTATION: Look("--fragmentation", "#9a9da3", "#c0c3c8", "%"),
    OUTSIDE: Look("--outside", "#6b7078", "#9a9da3", "#"),
}
GAP = 2  # columns between two columns of a table
SMALL = 0.0005  # of the peak: what is never more joins the temporaries in a table
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
    """The unit of all sizes of a plan."""
    return unit_for(max(plan.needed, plan.peak.bytes))


def unit_for(size: int) -> Unit:
    """GiB from 10 GiB on, else MiB with as many decimals as the size gives a meaning."""
    return GIBS if size >= 10 * GIB else Unit("MiB", MIB, 0 if size >= 1000 * MIB else 1 if size >= 10 * MIB else 2)


def stack_of(parts: Mapping[str, int], kept: Sequence[str] = CATEGORIES) -> dict[str, int]:
    """Bytes by category, in the order of stacking; what is not kept or has another name is temporary."""
    stack = dict.fromkeys([name for name in CATEGORIES if name in kept or name == TEMPORARIES], 0)
    for name, size in parts.items():
        stack[name if name in stack else TEMPORARIES] += size
    return stack


def phases_of(plan: Plan) -> list[Moment]:
    """The most of each phase; of a plan by closed forms the peak alone."""
    return list(plan.phases or [plan.peak])


def outside_of(plan: Plan) -> int:
    """Bytes outside of the allocator."""
    return sum(plan.outside.values())


def _fragmentation(plan: Plan) -> int:
    return max(plan.needed - plan.allocated - outside_of(plan), 0)


def needed_parts(plan: Plan) -> dict[str, int]:
    """What the plan needs, by what it is needed for."""
    stack = stack_of(plan.peak.parts)
    beside = max(plan.allocated - sum(stack.values()), 0)
    return {**stack, BESIDE: beside, FRAGMENTATION: _fragmentation(plan), OUTSIDE: outside_of(plan)}


def look_of(name: str) -> Look:
    """How a category is drawn, a grey one among them."""
    return LOOKS.get(name) or GREYS[name]


# ---- the verdict ----
def verdict(plan: Plan) -> str:
    """What the plan needs, whether that fits its budget, what it is at the peak, and which blocks are recomputed: one
    sentence without a full stop.

    Sizes are in MiB or GiB, with their unit.
    """
    parts = (_needs(plan), _fits(plan), _where(plan), _recomputed(plan), frozen_text(plan))
    return "; ".join(part for part in parts if part)


def _needs(plan: Plan) -> str:
    unit = unit_of(plan)
    added = {"fragmentation": _fragmentation(plan), "outside": outside_of(plan)}
    shown = [f"{unit.text(size)} {name}" for name, size in added.items() if unit.text(size).strip("0.")]
    text = f"needs {unit.named(plan.needed)}"
    allocated = f"at most {unit.text(plan.allocated)} allocated"
    return f"{text} ({' + '.join([allocated, *shown])})" if shown else text


def _fits(plan: Plan) -> str:
    if plan.budget is None or plan.spare is None:
        return ""
    unit = unit_of(plan)
    budget, off = unit.named(plan.budget), unit.named(abs(plan.spare))
    return f"fits into {budget} with {off} to spare" if plan.fits else f"misses {budget} by {off}"


def _where(plan: Plan) -> str:
    peak = plan.peak
    place = PLACES.get(peak.phase, f"in the {peak.phase}")
    shares = {name: size / max(peak.bytes, 1) for name, size in stack_of(peak.parts).items()}
    most = sorted(shares, key=lambda name: -shares[name])[:3]
    shown = [f"{name} {percent(shares[name], '.0f')}" for name in most if shares[name] >= 0.1]
    return f"the peak is {place}" + (f": {', '.join(shown)}" if shown else "")


def _recomputed(plan: Plan) -> str:
    """Which blocks are recomputed or wait in main memory, and what that costs."""
    parts = []
    if plan.recomputed:
        work = percent(plan.more_work, ".0f")
        all_ = len(plan.recomputed) == plan.blocks
        which = f"all {plan.blocks} blocks" if all_ else f"{blocks.text(plan.recomputed)} of {plan.blocks}"
        parts.append(f"{which} recomputed in the backward pass, {work} more operations")
    if plan.waiting:
        whole = [number for number in plan.waiting if number not in plan.recomputed]
        inputs = [number for number in plan.waiting if number in plan.recomputed]
        what = [f"activations of {blocks.text(whole)}"] if whole else []
        what += [f"inputs of {blocks.text(inputs)}"] if inputs else []
        size = unit_of(plan).named(plan.host)
        parts.append(f"{' and '.join(what)} in main memory until the backward pass, {size}")
    return "; ".join(parts)


def frozen_text(plan: Plan) -> str:
    """Which blocks run in the first epoch alone, what that takes, and what it saves."""
    if plan.frozen_cache == "off":
        return ""
    which = blocks.text(range(plan.frozen_blocks))
    size, work = size_text(plan.frozen_bytes), percent(plan.later_work, ".0f")
    where = "in memory" if plan.frozen_cache == "memory" else "on the disk"
    return (
        f"{which} run once a row, what they give is kept {where}, {size}: a later epoch takes {work} of the operations"
    )


def percent(share: float, form: str) -> str:
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
    phases = phases_of(plan)
    stacks = [stack_of(phase.parts) for phase in phases]
    least = SMALL * plan.peak.bytes
    kept = [name for name in CATEGORIES if max(stack[name] for stack in stacks) >= least]
    stacks = [stack_of(phase.parts, kept) for phase in phases]
    rows = [(name, [stack[name] for stack in stacks]) for name in stacks[0]]
    names = [phase.phase for phase in phases]
    peak = names.index(plan.peak.phase) if plan.peak.phase in names else None
    total = [phase.bytes for phase in phases]
    return Grid(unit_of(plan), names, [row for row in rows if any(row[1])], total, peak)


def plan_table(plan: Plan, width: int = 10_000) -> Group:
    """A row for each category, a column for each phase, and what they are together; the peak's column is marked.

    Args:
        plan: any.
        width: of the console, in columns. Phases that find no room there stand in a table of their own below: a figure
            that is cut off is none.
    """
    return Group(*plan_tables(plan, width))


def plan_tables(plan: Plan, width: int) -> list[Table]:
    """The tables of `plan_table`, as many as it takes."""
    shown = grid(plan)
    cell = shown.unit.cell
    columns = [[cell(sizes[n]) for _, sizes in shown.rows] + [cell(shown.total[n])] for n in range(len(shown.phases))]
    wide = [GAP + max(map(len, [name, *cells])) for name, cells in zip(shown.phases, columns, strict=True)]
    names = 2 + max(len(name) for name, _ in shown.rows)
    groups: list[list[int]] = [[]]
    for number in range(len(columns)):
        if groups[-1] and names + sum(wide[n] for n in [*groups[-1], number]) > width:
            groups.append([])
        groups[-1].append(number)
    return [_phase_table(shown, columns, group) for group in groups]


def _phase_table(shown: Grid, columns: Sequence[Sequence[str]], group: Sequence[int]) -> Table:
    """The columns of some phases."""
    title = f"memory by phase, {shown.unit.name}" if 0 in group else None
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for number in group:
        style = "bold yellow" if number == shown.peak else ""
        name = escape(shown.phases[number])
        table.add_column(name, justify="right", no_wrap=True, style=style, header_style=style or "bold")
    for row, (name, _) in enumerate(shown.rows):
        table.add_row(f"[on {LOOKS[name].colour}] [/] {name}", *(columns[number][row] for number in group))
    table.add_row("total", *(columns[number][-1] for number in group), style="bold")
    return table


def compare_table(rows: Sequence[Compared]) -> Table:
    """What was predicted beside what was measured.

    Args:
        rows: bytes. The difference is predicted less measured,
            in percent of what was measured.
    """
    table = Table(title="predicted and measured, MiB", title_justify="left", box=None, pad_edge=False)
    table.add_column("", style="cyan")
    for name in ("predicted", "measured", "difference", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        predicted, measured = row.predicted, row.measured
        off = (predicted - measured) / MIB
        percent = f"{100 * (predicted - measured) / measured:+z.1f}" if measured else "-"
        sizes = (f"{predicted / MIB:,.1f}", f"{measured / MIB:,.1f}", f"{off:+z,.1f}")
        table.add_row(escape(row.what), *sizes, percent)
    return table


def rules_table(rows: Sequence[Rule]) -> Table:
    """Rules of thumb beside the plan."""
    table = Table(title="rules of thumb beside this plan, MiB", title_justify="left", box=None, pad_edge=False)
    for name in ("rule", "as it counts"):
        table.add_column(name, overflow="fold")
    for name in ("gives", "plan", "off"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        sizes = (f"{row.bytes / MIB:,.0f}", f"{row.planned / MIB:,.0f}", f"{row.off:+.0%}")
        table.add_row(row.name, row.how, *sizes)
    table.caption = "They know no lengths and no activations; the plan counts both."
    table.caption_justify = "left"
    return table
