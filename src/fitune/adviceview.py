"""Advice in the terminal: what fits, ranked; what each saver gives; and the reasons.

In: advice.Advised. Out: tables and lines. Figures are those of the plans.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.memory.plan import size

ROWS = 18  # of the ranking that are shown
CHECKPOINTED = ", checkpointing"


def show(found: Any, console: Console) -> None:
    """All of it."""
    for part in (suggestions_table(found), ranking_table(found), savers_table(found)):
        console.print(part)
        console.print()
    console.print(reasons(found.advice))
    _end(found, console)
    console.print("\n[bold]take[/]", end="  ")
    console.print(escape(found.command), highlight=False, soft_wrap=True)


def show_fit(found: Any, console: Console) -> None:
    """What `--fit` takes, and why."""
    console.print(suggestions_table(found))
    console.print(reasons(found.advice))
    _end(found, console)
    console.print("[bold]set by --fit[/]", end="  ")
    console.print(found.suggestions[0].flags, highlight=False, soft_wrap=True)


def _end(found: Any, console: Console) -> None:
    for note in found.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)


def _table(title: str, *, caption: str | None = None) -> Table:
    return Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=None, pad_edge=False,
        collapse_padding=True, title_style="bold",
    )  # fmt: skip


def suggestions_table(found: Any) -> Table:
    """What is suggested, each planned exactly."""
    table = _table(f"fits into {size(found.budget)} of {found.where} ({found.combinations:,} combinations tried)")
    table.add_column("planned exactly", style="cyan", ratio=1)
    for name in ("rows x steps", "length", "needs", "to spare", "most rows", "an epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.suggestions:
        batch = f"{one.micro_batch} x {one.accumulation}"
        table.add_row(
            one.name, batch, f"{one.max_length:,}", size(one.plan.needed), size(one.plan.spare or 0),
            f"{one.largest_batch:,}", _time(one.seconds),
        )  # fmt: skip
    table.caption = "rows of a micro-batch x micro-batches of a step; most rows: the largest micro-batch that fits"
    return table


def ranking_table(found: Any) -> Table:
    """The best of each way and precision, by arithmetic: the rows that fit as they are, and with checkpointing."""
    grouped: dict[tuple[str, str], dict[bool, Any]] = {}
    for one in found.candidates:
        weights = one.settings["quant"]["name"]
        weights = one.settings["precision"] if weights == "none" else weights
        name = one.name.removesuffix(CHECKPOINTED).partition(" on ")[0]
        grouped.setdefault((name, weights), {}).setdefault(one.name.endswith(CHECKPOINTED), one)
    table = _table("what else fits, by arithmetic")
    table.add_column("way", style="cyan", ratio=1)
    table.add_column("weights")
    for name in ("rows", "checkpointed", "length", "trains", "result", "an epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    for (name, weights), both in list(grouped.items())[:ROWS]:
        first = next(iter(both.values()))
        rows = [f"{both[saved].batch_size:,}" if saved in both else "-" for saved in (False, True)]
        figures = (f"{first.max_length:,}", f"{first.trainable / 1e6:,.1f} M", f"{first.quality:.0%}")
        table.add_row(name, weights, *rows, *figures, _time(first.seconds))
    left = len(grouped) - ROWS
    table.caption = (
        "rows: of the largest micro-batch; result: share of a test answered rightly after tuning so "
        "(results/methods.json, results/precision.json)" + (f"; {left} more in --json" if left > 0 else "")
    )
    return table


def savers_table(found: Any) -> Table:
    """What each change to the best suggestion would give, the most for its cost first."""
    table = _table("memory savers beside the first, the most for their cost first")
    table.add_column("change", style="cyan", no_wrap=True)
    for name in ("saves", "work"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for one in found.savers:
        table.add_row(escape(one.flag), size(one.saves), f"x {one.work:.2f}", escape(one.cost))
    return table


def reasons(advice: Iterable[Any]) -> Table:
    """Each piece of advice beside what it is about."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for one in advice:
        table.add_row(one.about, escape(one.text))
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
