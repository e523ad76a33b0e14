"""Advice in the terminal: what fits, ranked; what each saver gives; and the reasons.

In: advice.Advised. Out: tables and lines. Figures are those of the plans.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.memory.plan import size

ROWS = 12  # of the ranking that are shown


def show(found: Any, console: Console) -> None:
    """All of it."""
    console.print(suggestions_table(found))
    console.print(ranking_table(found))
    console.print(savers_table(found))
    for one in found.advice:
        console.print(f"[cyan]{one.about}[/]  {escape(one.text)}", highlight=False)
    for note in found.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)
    best = found.suggestions[0]
    console.print(f"\n[bold]take[/]  fitune train --model {found.model} {best.flags} --data ...", highlight=False)


def show_fit(found: Any, console: Console) -> None:
    """What `--fit` takes, and why."""
    best = found.suggestions[0]
    console.print(suggestions_table(found))
    for one in found.advice[:2]:
        console.print(f"[cyan]{one.about}[/]  {escape(one.text)}", highlight=False)
    console.print(f"[bold]set by --fit[/]  {best.flags}", highlight=False)


def suggestions_table(found: Any) -> Table:
    """What is suggested: planned exactly, with the largest batch that fits."""
    title = (
        f"fits into {size(found.budget)} of {found.where}, planned exactly ({found.combinations:,} combinations tried)"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("way", style="cyan", ratio=1)
    for name in ("largest batch", "max length", "needs", "to spare", "an epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.suggestions:
        spare = size(one.plan.spare or 0)
        table.add_row(
            one.name, str(one.batch_size), str(one.max_length), size(one.plan.needed), spare, _time(one.seconds)
        )
    return table


def ranking_table(found: Any) -> Table:
    """The best of each way and precision, by arithmetic."""
    table = Table(title="everything that fits, by arithmetic", title_justify="left", box=None, pad_edge=False)
    table.add_column("way", style="cyan", ratio=1)
    for name in ("batch", "max length", "needs", "trains", "result", "an epoch", "grows until"):
        table.add_column(name, justify="right", no_wrap=True)
    seen: set[str] = set()
    for one in found.candidates:
        if one.name in seen or len(seen) >= ROWS:
            continue
        seen.add(one.name)
        grows = "-" if one.enough is None else f"{one.enough} rows"
        figures = (str(one.batch_size), str(one.max_length), size(one.needed), f"{one.trainable / 1e6:,.1f} M")
        table.add_row(one.name, *figures, f"{one.quality:.0%}", _time(one.seconds), grows)
    table.caption = (
        "result: share of a test answered rightly after tuning so (results/methods.json, results/precision.json)"
    )
    table.caption_justify = "left"
    return table


def savers_table(found: Any) -> Table:
    """What each change to the best suggestion would give, the most for its cost first."""
    table = Table(
        title="memory savers here, the most for their cost first", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("change", style="cyan", no_wrap=True)
    for name in ("saves", "work"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for one in found.savers:
        table.add_row(escape(one.flag), size(one.saves), f"x {one.work:.2f}", escape(one.cost))
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds / 3600:,.1f} h"
        if seconds >= 7200
        else f"{seconds / 60:,.0f} min"
        if seconds >= 120
        else f"{seconds:,.0f} s"
    )
