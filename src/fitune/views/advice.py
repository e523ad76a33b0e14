"""Advice in the terminal and as a page: what fits, ranked; what each saver gives; and the reasons.

In: what fits, as records. Out: tables, lines, an HTML page. Figures are those of the plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fitune.core.plan import size_text
from fitune.memory.advice import Advice, Advised
from fitune.memory.search import Candidate
from fitune.views.charts import NARROW, WIDE
from fitune.views.pages import render
from fitune.views.plan_page import needed_bars

ROWS = 18  # of the ranking that are shown in a terminal
CHECKPOINTED = ", checkpointing"
SUGGESTED = ("planned exactly", "rows x accumulation", "length", "needs", "spare", "most rows", "an epoch")
OF_BUNDLED = "2M model"  # the column of results of the bundled model: it says nothing of larger ones but an order
RANKED = ("method", "weights", "rows", "checkpointed", "length", "trains", OF_BUNDLED, "an epoch")
SAVED = ("change", "saves", "time", "cost")
STEPS = (
    "rows: of a micro-batch; accumulation: micro-batches of an optimizer step; most rows: the largest micro-batch that "
    "fits"
)
RESULT = (
    "rows: of the largest micro-batch, as it is and with all blocks recomputed; 2M model: a result of the bundled "
    "model of 2 million parameters, not of yours: the share of 152 held-out questions that it answered correctly after "
    "tuning with that method (results/methods.json, results/precision.json); ordered by these where they differ by "
    "some 3 %, then by time"
)


# ---- rows of figures ----


def _known(names: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without columns of which nothing is known: the time where only a size was given, for example."""
    kept = [at for at in range(len(names)) if any(row[at] != "-" for row in rows) or not rows]
    return [names[at] for at in kept], [[row[at] for at in kept] for row in rows]


def suggested(found: Advised) -> list[Sequence[str]]:
    """What is suggested, each planned exactly, by SUGGESTED."""
    return [
        (
            one.name, f"{one.micro_batch} x {one.accumulation}", f"{one.max_length:,}", size_text(one.plan.needed),
            size_text(one.plan.spare or 0), f"{one.largest_batch:,}", _time(one.seconds),
        )
        for one in found.suggestions
    ]  # fmt: skip


def ranked(found: Advised) -> list[Sequence[str]]:
    """The best of each way and precision, by arithmetic, by RANKED."""
    first: dict[tuple[str, str], Candidate] = {}
    for one in found.candidates:
        weights = one.settings["quant"]["name"]
        weights = one.settings["precision"] if weights == "none" else weights
        first.setdefault((one.name.removesuffix(CHECKPOINTED).partition(" on ")[0], weights), one)
    rows: list[Sequence[str]] = []
    for (name, weights), one in first.items():
        kept = f"{one.kept:,}" if one.kept else "-"
        again = f"{one.batch_size:,}" if one.settings["checkpointing"] is not False else "-"
        figures = (f"{one.max_length:,}", _count(one.trainable), f"{one.quality:.0%}" if one.quality else "-")
        rows.append((name, weights, kept, again, *figures, _time(one.seconds)))
    return rows


def saved(found: Advised) -> list[Sequence[str]]:
    """What each change to the best suggestion would give, the most for its cost first, by SAVED."""
    return [(one.flag, size_text(one.saves), f"x {one.time:.2f}", one.cost) for one in found.savers]


# ---- the terminal ----


def show(found: Advised, console: Console) -> None:
    """All of it."""
    for part in (suggestions_table(found), ranking_table(found), savers_table(found)):
        console.print(part)
        console.print()
    console.print(reasons(found.advice))
    _end(found, console)
    console.print("\n[bold]take[/]", end="  ")
    console.print(escape(found.command), highlight=False, soft_wrap=True)


def show_fit(found: Advised, console: Console) -> None:
    """What `--fit` takes, and why."""
    console.print(suggestions_table(found))
    console.print(reasons(found.advice))
    _end(found, console)
    console.print("[bold]set by --fit[/]", end="  ")
    console.print(escape(found.suggestions[0].flags), highlight=False, soft_wrap=True)


def _end(found: Advised, console: Console) -> None:
    for note in found.notes:
        console.print(f"[yellow]{escape(note)}[/]", highlight=False)


def _table(title: str, names: Sequence[str], caption: str = "", left: int = 1) -> Table:
    """left: how many columns hold text; the first is stretched where it is one."""
    table = Table(
        title=title, title_justify="left", title_style="bold", caption=caption or None, caption_justify="left",
        box=None, pad_edge=False, collapse_padding=True, padding=(0, 2),
    )  # fmt: skip
    table.add_column(names[0], style="cyan", ratio=1)
    for number, name in enumerate(names[1:], 1):
        table.add_column("\n".join(name.rsplit(" ", 1)), justify="left" if number < left else "right", no_wrap=True)
    return table


def suggestions_table(found: Advised) -> Table:
    """See `suggested`."""
    title = f"fits into {_where(found)} ({found.combinations:,} combinations tried)"
    names, rows = _known(SUGGESTED, suggested(found))
    table = _table(title, names, STEPS)
    for row in rows:
        table.add_row(*row)
    return table


def ranking_table(found: Advised) -> Table:
    """See `ranked`."""
    names, rows = _known(RANKED, ranked(found))
    left = len(rows) - ROWS
    table = _table(
        "what else fits, by arithmetic", names, RESULT + (f"; {left} more in --json and --html" if left > 0 else ""), 2
    )
    for row in rows[:ROWS]:
        table.add_row(*row)
    return table


def savers_table(found: Advised) -> Table:
    """See `saved`."""
    table = Table(
        title="memory savers beside the first method, the most for their cost first", title_justify="left",
        title_style="bold", box=None, pad_edge=False,
    )  # fmt: skip
    table.add_column(SAVED[0], style="cyan", no_wrap=True)
    for name in SAVED[1:3]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(SAVED[3], ratio=1)
    for row in saved(found):
        table.add_row(*map(escape, row))
    return table


def reasons(advice: Iterable[Advice]) -> Table:
    """Each piece of advice beside what it is about."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(ratio=1)
    for one in advice:
        table.add_row(one.about, escape(one.text))
    return table


def _count(number: int) -> str:
    """A number of parameters."""
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number / 1e3:,.1f} K" if number >= 1e3 else str(number)


def _where(found: Advised) -> str:
    """`24.0 GiB`, and the name of what has them, where it has another."""
    return size_text(found.budget) if found.where[:1].isdecimal() else f"{size_text(found.budget)} of {found.where}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return "<1 s"
    return (
        f"{seconds / 3600:,.1f} h"
        if seconds >= 7200
        else f"{seconds / 60:,.0f} min"
        if seconds >= 120
        else f"{seconds:,.0f} s"
    )


# ---- the page ----


def page(found: Advised) -> str:
    """All of it as a page that needs nothing from elsewhere."""
    best = found.suggestions[0]
    suggestions = {one.name: one.plan for one in found.suggestions}
    savers = {"as it is": best.plan, **{one.flag: one.plan for one in found.savers}}
    numbers = [
        ("budget", size_text(found.budget)),
        ("best", best.name),
        ("rows of a step", f"{best.micro_batch} x {best.accumulation}"),
        ("needs", size_text(best.plan.needed)),
        *([("an epoch", _time(best.seconds))] if best.seconds is not None else []),
        ("combinations tried", f"{found.combinations:,}"),
    ]
    return render(
        "advice",
        title=f"fitune: what fits into {_where(found)}",
        subtitle=found.model,
        numbers=numbers,
        command=found.command,
        bars=[needed_bars(suggestions, width, label="memory of each suggestion") for width in (WIDE, NARROW)],
        saver_bars=[needed_bars(savers, width, label="memory with each saver") for width in (WIDE, NARROW)],
        suggestions=_known(SUGGESTED, suggested(found)),
        savers=(SAVED, saved(found)),
        advice=found.advice,
        ranking=_known(RANKED, ranked(found)),
        explained=f"{STEPS}. {RESULT}.",
        notes=found.notes,
    )
