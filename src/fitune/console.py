"""What a person sees in the terminal while a run goes on.

In: what a run tells its Watcher. Out: tables and a progress bar. Results for programs go to standard output as JSON;
everything here goes to standard error when that is wanted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fitune.memory import peak_mib
from fitune.records import Finding, StepRecord

MARKS = {"ok": "[green]ok[/]", "fixed": "[cyan]fixed[/]", "warn": "[yellow]warn[/]", "refuse": "[red]refused[/]"}

TOLD = (
    "rows",
    "length",
    "labels-empty",
    "stop-token-trained",
    "trainable-set",
)  # figures that a user wants to see though all is well


class Watcher:
    """Hears what a run does. This one stays silent; Terminal shows it."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def settings(self, values: Mapping[str, Any]) -> None:
        """The resolved settings."""

    def groups(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """(part of the model, trainable, total) parameters."""

    def findings(self, findings: Sequence[Finding]) -> None:
        """What the preflight rules found."""

    def kept(self, parts: Sequence[Any]) -> None:
        """What lies in which dtype (precision.Kept)."""

    def plan(self, plan: Any) -> None:
        """What the run will take (memory.plan.Plan)."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Something that takes long is so far; done == total: it is finished."""

    def start(self, total: int, done: int, device: torch.device) -> None:
        """Training begins: `done` of `total` steps are behind it."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step was made."""

    def stop(self) -> None:
        """Training ended, however it did."""


class Steps(Watcher):
    """Hears of the steps alone.

    Args:
        on_step: is called with the record of each.
    """

    def __init__(self, on_step: Callable[[StepRecord], None]) -> None:
        self.on_step = on_step

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        self.on_step(record)


class Several(Watcher):
    """Passes on what it hears.

    Args:
        others: to whom, in this order.
    """

    def __init__(self, others: Sequence[Watcher]) -> None:
        for name in (name for name, one in vars(Watcher).items() if not name.startswith("_") and callable(one)):
            setattr(self, name, partial(self._tell, others, name))

    @staticmethod
    def _tell(others: Sequence[Watcher], name: str, *what: Any) -> None:
        for other in others:
            getattr(other, name)(*what)


class Terminal(Watcher):
    """Shows a run with rich.

    Args:
        console: where to; on something that is no terminal a line now and then takes the place of the bar.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.tokens, self.seconds, self.total = 0, 0.0, 0
        self.device = torch.device("cpu")
        self.held_out: float | None = None
        self.preparing: Progress | None = None

    def say(self, text: str) -> None:
        """See Watcher."""
        self.console.print(escape(text), highlight=False)

    def settings(self, values: Mapping[str, Any]) -> None:
        """See Watcher."""
        self.console.print(pairs("settings", values))

    def groups(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """See Watcher."""
        self.console.print(groups_table(parts))

    def findings(self, findings: Sequence[Finding]) -> None:
        """See Watcher. What is well is named in a few lines; the report tells all of it."""
        told = [finding for finding in findings if finding.level != "ok" or finding.rule in TOLD]
        if told:
            self.console.print(findings_table(told))
        well = [finding.rule for finding in findings if finding not in told]
        if well:
            self.console.print(f"[green]ok[/] {', '.join(well)}", highlight=False)

    def kept(self, parts: Sequence[Any]) -> None:
        """See Watcher."""
        self.console.print(kept_table(parts))

    def plan(self, plan: Any) -> None:
        """See Watcher."""
        parts = {name: count / 2**20 for name, count in {**plan.peak.parts, **plan.outside}.items()}
        text = " + ".join(f"{name} {mib:,.0f}" for name, mib in parts.items() if mib >= 0.5)
        self.console.print(
            f"expected memory [bold]{plan.needed / 2**20:,.0f} MiB[/], most in the {plan.peak.phase}: {text}",
            highlight=False,
        )
        for note in plan.notes:
            self.console.print(f"[yellow]{escape(note)}[/]", highlight=False)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """See Watcher."""
        if not self.console.is_terminal:
            return
        if self.preparing is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,}"))
            self.preparing = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.preparing.start()
            self.task = self.preparing.add_task(what, total=total)
        self.preparing.update(self.task or TaskID(0), completed=done, total=total)
        if done == total:
            self.preparing.stop()
            self.preparing = None

    def start(self, total: int, done: int, device: torch.device) -> None:
        """See Watcher."""
        self.total, self.device = total, device
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=False,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=done)

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        self.tokens += record.tokens
        self.seconds += record.seconds
        if record.held_out_loss is not None:
            self.held_out = record.held_out_loss
        text = f"loss {record.loss:.4f}  {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        text += f"  memory {peak_mib(self.device):,.0f} MiB"
        if self.held_out is not None:
            text += f"  held-out {self.held_out:.4f}"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=record.step, description=text)
        elif record.step == 1 or record.step == self.total or record.step % max(1, self.total // 10) == 0:
            self.say(f"step {record.step}/{self.total}  {text}")

    def stop(self) -> None:
        """See Watcher."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Ticker:
    """Tells a watcher how far something is, now and then.

    Args:
        watch: who is told.
        what: what goes on.
        total: how many there are; None: nobody knows.
    """

    def __init__(self, watch: Watcher, what: str, total: int | None) -> None:
        self.watch, self.what, self.total = watch, what, total
        self.done, self.told = 0, time.monotonic()

    def __call__(self, done: int) -> None:
        self.done = done
        if time.monotonic() - self.told > 0.2:
            self.told = time.monotonic()
            self.watch.progress(self.what, done, self.total)

    def end(self) -> None:
        """It is finished."""
        self.watch.progress(self.what, self.done, self.done)


def pairs(title: str, values: Mapping[str, Any]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(f"[cyan]{escape(str(name))}[/]", escape(str(value)))
    return table


def doctor_table(checks: Sequence[Any]) -> Table:
    """What `fitune doctor` found (doctor.Check)."""
    marks = {**MARKS, "broken": "[red]broken[/]"}
    table = Table(title="this machine", title_justify="left", show_header=False, box=None, pad_edge=False)
    for check in checks:
        fix = f" (fix: {check.fix})" if check.fix else ""
        table.add_row(marks[check.level], f"[cyan]{escape(check.name)}[/]", escape(check.text + fix))
    return table


def quantized_table(done: Any) -> Table:
    """Of each quantized layer (quantizing.QuantizedModel) a line."""
    table = Table(title=f"layers as {done.quant}", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", style="cyan")
    for name in ("weights", "mean error", "largest", "outlier columns"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in done.layers:
        outliers = "-" if layer.outliers is None else f"{layer.outliers} of {layer.inputs}"
        errors = (f"{layer.mean_error:.2%}", f"{layer.max_error:.2%}")
        table.add_row(escape(layer.name), f"{layer.weights:,}", *errors, outliers)
    return table


def kept_table(parts: Sequence[Any]) -> Table:
    """What lies in which dtype, and what was cast or not quantized."""
    table = Table(title="weights in memory", title_justify="left", box=None, pad_edge=False)
    table.add_column("part", style="cyan", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for name in ("weights", "KiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    for part in parts:
        table.add_row(part.part, part.dtype, f"{part.weights:,}", f"{part.bytes / 1024:,.1f}", escape(part.note))
    return table


def methods_table(rows: Sequence[Any], model: str) -> Table:
    """Of each method (overview.Overview) a line."""
    table = Table(title=f"ways of tuning, figures for {model}", title_justify="left", box=None, pad_edge=False)
    table.add_column("method", style="cyan", no_wrap=True)
    table.add_column("trains", ratio=1)
    for name in ("parameters", "MiB", "merges", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        known = row.trainable is not None
        figures = (f"{row.trainable:,}", f"{row.training_bytes / 2**20:,.0f}") if known else ("-", "-")
        merges = "yes" if row.merges else "no"
        table.add_row(row.name, escape(row.trains), *figures, merges, f"{row.default_lr:g}")
    table.caption = "\n".join(escape(f"{row.name}: {row.note}") for row in rows if row.note)
    table.caption_justify = "left"
    return table


def scores_table(found: Any) -> Table:
    """An evaluation.Evaluation: the base beside what was tuned."""
    title = f"{found.rows:,} rows, {found.target_tokens:,} target tokens, {found.asked:,} prompts answered"
    title += f", {found.too_long:,} too long to be" if found.too_long else ""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = [("base", found.base), ("tuned", found.scores)] if found.base else [("model", found.scores)]
    table.add_column("", style="cyan")
    for name, _ in columns:
        table.add_column(name, justify="right")
    shown = {"loss": "{:.4f}", "perplexity": "{:,.2f}", "exact_match": "{:.1%}", "bleu4": "{:.2f}", "rouge_l": "{:.4f}"}
    for name, form in shown.items():
        values = [getattr(scores, name) for _, scores in columns]
        if values[0] is not None:
            table.add_row(name.replace("_", " "), *(form.format(value) for value in values))
    return table


def groups_table(parts: Sequence[tuple[str, int, int]]) -> Table:
    """Frozen, trainable and all parameters by part; neighbouring blocks with the same numbers are one line."""
    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("part", style="cyan")
    for name in ("frozen", "trainable", "total"):
        table.add_column(name, justify="right")
    for (trained, total), some in groupby(parts, key=lambda part: (part[1], part[2])):
        names = [name for name, _, _ in some]
        several = len(names) > 1
        name = f"{names[0]} ... {names[-1]}, each" if several else names[0]
        table.add_row(escape(name), *(f"{n:,}" for n in (total - trained, trained, total)))
    trained, total = sum(part[1] for part in parts), sum(part[2] for part in parts)
    table.add_row("all", *(f"{n:,}" for n in (total - trained, trained, total)), style="bold")
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """Rule, verdict and text."""
    table = Table(title="checks", title_justify="left", show_header=False, box=None, pad_edge=False)
    for finding in findings:
        text = finding.text + (f" (fix: {finding.fix})" if finding.fix and finding.level != "ok" else "")
        table.add_row(MARKS[finding.level], finding.rule, escape(text))
    return table


def answers_table(rows: Sequence[Mapping[str, Any]], limit: int = 60) -> Table:
    """Prompt, expected answer, and the answers before and after."""
    table = Table(title="before and after", title_justify="left", pad_edge=False)
    for name in ("prompt", "expected", "before", "after"):
        table.add_column(name, overflow="fold", ratio=1)
    for row in rows:
        cells = []
        for name in ("prompt", "expected", "before", "after"):
            text = str(row.get(name, ""))
            text = escape(text if len(text) <= limit else text[: limit - 1] + "…")
            right = name in ("before", "after") and row.get(name) == row.get("expected")
            cells.append(f"[green]{text}[/]" if right else text)
        table.add_row(*cells)
    return table
