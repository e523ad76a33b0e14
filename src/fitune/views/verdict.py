"""A verdict in the terminal: for each kind of rows what changed, by how much, and whether that is shown; and tasks.

In: a Verdict, or scores of tasks. Out: tables and lines.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from fitune.core.results import TaskScores
from fitune.core.verdict import ALL, Change, Kind, Outcome, RunVerdict, Section, Verdict
from fitune.views.terminal import answers_table

COLOURS: dict[Outcome, str] = {"better": "green", "no difference shown": "default", "worse": "red"}
SHORT: dict[Outcome, str] = {"better": "better", "no difference shown": "-", "worse": "worse"}
LEGEND = "+/-: rows that are better, and worse; p: the exact test of these; -: no difference shown"
TITLES = {"held-out": "held-out rows (what was to be learned)", "general": "general checks (what the base knew)"}


def shown(found: Verdict) -> Iterator[RenderableType]:
    """All of it, in the order in which it is read."""
    several = len(found.runs) > 1
    for run in [*found.runs, *([found.together] if found.together else [])]:
        if several:
            yield f"\n[bold]{escape(run.run)}[/]"
        for section in run.sections:
            yield _table(section) if section.kinds else f"{TITLES[section.name]}: {section.note}"
            if section.lost:
                yield f"{section.lost_rows:,} rows that the base answered are lost; the first of them:"
                yield answers_table(section.lost)
        if not several:
            yield LEGEND
            yield f"verdict: {sentence(run)}"
    if several:
        yield LEGEND
        yield _side_by_side(found)


def sentence(run: RunVerdict) -> str:
    """The verdict on a run in one sentence, with markup."""
    parts = []
    for section in run.sections:
        text = f"{section.name} rows [{COLOURS[section.outcome]}]{section.outcome}[/]"
        named = escape(", ".join(name for name in section.worse if name != ALL or len(section.kinds) == 1))
        if section.name == "general":
            text = text.replace("general rows", "general checks") if section.kinds else section.note
            by_loss = section.worse and "known" not in section.decides
            text += " by loss, which sees a change of wording too" if by_loss else ""
            text += f": it forgot {named}" if named and not by_loss else f": {named}" if named else ""
            text += _reworded(section)
        elif named and section.outcome != "no difference shown":
            text += f" (worse: {named})"
        parts.append(text)
    return "; ".join(parts)


def _reworded(section: Section) -> str:
    """That answers are known and differ, where that is so."""
    of_all = {change.name: change for change in section.kinds[0].changes} if section.kinds else {}
    if section.worse or "exact match" not in of_all or of_all["exact match"].high >= 0:
        return ""
    return "; it answers them in another form than the base"


def _table(section: Section) -> Table:
    """A line for each kind and measure; measures that decide nothing stand with all rows alone."""
    table = Table(title=TITLES[section.name], title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kind", style="cyan", overflow="fold")
    table.add_column("measure", no_wrap=True)
    for name in ("rows", "base", "tuned", "change (95 %)", "+/-", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("shown", no_wrap=True)
    for kind in section.kinds:
        for change in kind.changes:
            if kind.name == ALL or change.name in section.decides:
                table.add_row(*_line(section, kind, change))
    return table


def _line(section: Section, kind: Kind, change: Change) -> list[str]:
    form, signed = ("{:.3f}", "{:+.3f}") if change.name == "loss" else ("{:.0%}", "{:+.0%}")
    between = f"{signed.format(change.low)} to {signed.format(change.high)}"
    outcome = f"[{COLOURS[change.outcome]}]{SHORT[change.outcome]}[/]" if change.name in section.decides else ""
    values = [form.format(change.base), form.format(change.tuned), between, f"{change.better}/{change.worse}"]
    return [escape(kind.name), change.name, f"{kind.rows:,}", *values, f"{change.sign:.0e}", outcome]


def _side_by_side(found: Verdict) -> Table:
    """A row for each run, and one for their mean."""
    runs = [*found.runs, *([found.together] if found.together else [])]
    columns = list(dict.fromkeys((s.name, kind.name) for run in runs for s in run.sections for kind in s.kinds))
    table = Table(title="side by side", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for run in runs:
        table.add_column(escape(run.run), overflow="fold")
    for section, kind in columns:
        table.add_row(f"{section}: {escape(kind)}", *(_outcome(run, section, kind) for run in runs))
    return table


def _outcome(run: RunVerdict, section: str, kind: str) -> str:
    kinds = {(s.name, k.name): (s, k) for s in run.sections for k in s.kinds}
    if (section, kind) not in kinds:
        return "-"
    of, there = kinds[section, kind]
    change = _decisive(of, there)
    signed = "{:+.3f}" if change.name == "loss" else "{:+.0%}"
    return f"[{COLOURS[there.outcome]}]{there.outcome}[/] ({change.name} {signed.format(change.difference)})"


def _decisive(section: Section, kind: Kind) -> Change:
    """The change that the outcome follows from; without one, the first that could decide."""
    deciding = [change for name in section.decides for change in kind.changes if change.name == name]
    return next((change for change in deciding if change.outcome != "no difference shown"), deciding[0])


def tasks_table(found: TaskScores) -> Table:
    """A line for each metric of a task, the base's beside the tuned model's."""
    table = Table(title="tasks", title_justify="left", box=None, pad_edge=False)
    with_base = any(one.base is not None for one in found.scores)
    table.add_column("task", style="cyan", overflow="fold")
    for name in ("metric", *(["base", "tuned"] if with_base else ["model"]), "standard error"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for one in found.scores:
        values = [*(["-" if one.base is None else f"{one.base:.4f}"] if with_base else []), f"{one.tuned:.4f}"]
        table.add_row(escape(one.task), escape(one.metric), *values, "-" if one.error is None else f"{one.error:.4f}")
    return table
