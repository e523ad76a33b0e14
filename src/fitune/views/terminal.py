"""What a person sees in the terminal while a run goes on.

In: what a run reports to its Watcher. Out: tables and a progress bar. Results for programs go to standard output as
JSON; everything here goes to standard error when that is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fitune.core.events import NAME, RUN_FOLDER, Watcher
from fitune.core.plan import Plan
from fitune.core.records import Finding, Kept, LengthChoice, Rewards, StepRecord
from fitune.core.results import Answered, Check, Evaluation, Overview, QuantizedModel
from fitune.core.units import MIB
from fitune.memory import peak_mib
from fitune.views.plan import frozen_text

MARKS = {"ok": "[green]ok[/]", "fixed": "[cyan]fixed[/]", "warn": "[yellow]warn[/]", "refuse": "[red]refused[/]"}

ECHO = 4  # columns that a bar leaves free: the ^C that a terminal writes behind it must not begin another line


class Terminal(Watcher):
    """Shows a run with rich: eight lines, then one bar. As a context it leaves no bar behind, whatever happens inside.

    Args:
        console: where to; on what is neither a terminal nor a notebook a line now and then takes the place of the bar.
        verbose: print all settings, parameters, dtypes and checks too; the report has them anyway.
    """

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        # what can draw a line anew: a terminal, or a notebook with the widgets that rich needs for that
        self.live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.done = self.tokens = self.total = 0
        self.seconds = 0.0
        self.device = "cpu"
        self.held_out: tuple[int, float] | None = None  # the step at which it was measured last, and what it was
        self.preparing: Progress | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def message(self, text: str) -> None:
        """See Watcher."""
        self.console.print(escape(text), highlight=False)

    def summary(self, lines: Mapping[str, str]) -> None:
        """See Watcher. A path is printed whole, so that it can be copied; other lines end where the terminal does."""
        for name, text in lines.items():
            whole = name == RUN_FOLDER
            line = Text.assemble((name.ljust(NAME), "cyan"), text)
            self.console.print(line, soft_wrap=whole, no_wrap=not whole, overflow="ignore" if whole else "ellipsis")

    def settings(self, values: Mapping[str, str]) -> None:
        """See Watcher."""
        if self.verbose:
            self.console.print(pairs("settings", values))

    def groups(self, parts: Sequence[tuple[str, int, int]]) -> None:
        """See Watcher."""
        if self.verbose:
            self.console.print(groups_table(parts))

    def findings(self, findings: Sequence[Finding]) -> None:
        """See Watcher. How many checks passed, and each warning; the error says what is refused."""
        if self.verbose:
            self.console.print(findings_table(findings))
        passed = sum(finding.level in ("ok", "fixed") for finding in findings)
        warned = [finding for finding in findings if finding.level == "warn"]
        if passed:
            self.summary({"checks": f"{passed} checks passed"})
        if passed and not warned:
            self.summary({"warnings": "none"})
        for finding in warned:
            self._warn(finding)

    def _warn(self, finding: Finding) -> None:
        """A warning beside its label, in as many lines as it takes, with what to do about it."""
        fix = f" (fix: {finding.fix})" if finding.fix else ""
        text = Text(f"{finding.rule}: {finding.text}{fix}")
        for number, line in enumerate(text.wrap(self.console, max(self.console.width - NAME, 20))):
            line.rstrip()
            label = "" if number else "warning"
            self.console.print(Text.assemble((label.ljust(NAME), "yellow"), line), no_wrap=True, overflow="ignore")

    def kept(self, parts: Sequence[Kept]) -> None:
        """See Watcher."""
        if self.verbose:
            self.console.print(kept_table(parts))

    def plan(self, plan: Plan) -> None:
        """See Watcher."""
        budget = "" if plan.budget is None else f" of {plan.budget / MIB:,.0f} MiB"
        how = "" if plan.how == "trace" else ", by closed forms"
        text = f"{plan.needed / MIB:,.0f} MiB expected{budget}{how}; the peak is in the {plan.peak.phase}"
        if plan.frozen_cache != "off":
            text += f"; {plan.frozen_blocks} blocks run once ({plan.frozen_cache})"
        self.summary({"memory": text})
        if self.verbose:
            if kept := frozen_text(plan):
                self.message(kept)
            parts = {name: count / MIB for name, count in {**plan.peak.parts, **plan.outside}.items()}
            self.message(" + ".join(f"{name} {mib:,.0f}" for name, mib in parts.items() if mib >= 0.5))
            for note in plan.notes:
                self.console.print(f"[yellow]{escape(note)}[/]", highlight=False)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """See Watcher."""
        finished = done == total
        if not self.live or (finished and self.preparing is None):
            return
        if self.preparing is None:
            bar = BarColumn(self._bar_width())
            columns = (
                TextColumn("{task.description}", markup=False),
                bar,
                TextColumn("{task.completed:,}"),
                TimeRemainingColumn(),
            )
            self.preparing = Progress(*columns, console=self.console, transient=True)
            self.preparing.start()
            self.task = self.preparing.add_task(what, total=total)
        self.preparing.update(self.task, completed=done, total=total)
        if finished:
            self.preparing.stop()
            self.preparing = None

    def start(self, total: int, done: int, device: str) -> None:
        """See Watcher."""
        self.total, self.done, self.device = total, done, device
        if self.live:
            bar = BarColumn(self._bar_width())
            columns = (TextColumn("{task.completed}/{task.total}"), bar, TextColumn("{task.description}", markup=False))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=False)
            self.bar.start()
            self.task = self.bar.add_task("step", total=total, completed=done)

    def _bar_width(self) -> int:
        """Columns of a bar: what the figures of a step leave of a line."""
        return min(max(self.console.width - 70, 6), 30)

    def step(self, record: StepRecord) -> None:
        """See Watcher."""
        self.done = record.step
        self.tokens += record.tokens
        self.seconds += record.seconds
        if record.held_out_loss is not None:
            self.held_out = (record.step, record.held_out_loss)
        text = self._figures(record)
        if self.bar is not None:
            self.bar.update(self.task, completed=record.step, description=text)
        elif record.step == 1 or record.step == self.total or record.step % max(1, self.total // 10) == 0:
            self.message(f"step {record.step}/{self.total}  {text}")

    def _figures(self, record: StepRecord) -> str:
        """What a step reached: as many figures as there is room for beside a bar, the first ones first."""
        held_out = []
        if self.held_out is not None and (self.bar is not None or self.held_out[0] == record.step):
            measured, value = self.held_out
            held_out = [f"held-out {value:.4f}" + ("" if measured == record.step else f" (step {measured})")]
        if record.rewards is not None:
            held_out = [*_preferred(record.rewards), *held_out]
        speed = f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        import torch  # loaded already where steps are made; a terminal that shows something else does without

        figures = [f"loss {record.loss:.4f}", *held_out, speed, f"{peak_mib(torch.device(self.device)):,.0f} MiB"]
        while len(figures) > 1 and len("  ".join(figures)) > self._room():
            figures.pop()
        return "  ".join(figures)

    def _room(self) -> int:
        """Columns of the figures beside the bar, or behind the step's number where there is none."""
        if self.bar is None:
            return self.console.width - len(f"step {self.total}/{self.total}  ")
        return self.console.width - ECHO - self._bar_width() - len(f"{self.total}/{self.total}   0:00:00")

    def stopping(self) -> None:
        """See Watcher. Nothing is printed from inside a signal handler: the bar shows it when it is drawn next."""
        if self.bar is not None:
            text, again = "stopping after this step", " (again: at once)"
            fits = len(text + again) <= self._room()
            self.bar.update(self.task, description=text + again if fits else text)

    def stop(self) -> None:
        """See Watcher."""
        for bar in (self.preparing, self.bar):
            if bar is not None:
                bar.stop()
        self.preparing = self.bar = None


def _preferred(rewards: Rewards) -> list[str]:
    """Margin and accuracy of a step's preferences."""
    margin = [] if rewards.margin is None else [f"margin {rewards.margin:+.3f}"]
    return [*margin, *([] if rewards.accuracy is None else [f"{rewards.accuracy:.0%} right"])]


def pairs(title: str, values: Mapping[str, object]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in values.items():
        table.add_row(f"[cyan]{escape(str(name))}[/]", escape(str(value)))
    return table


def doctor_table(checks: Sequence[Check]) -> Table:
    """What `fitune doctor` found."""
    marks = {**MARKS, "broken": "[red]broken[/]"}
    table = Table(title="this machine", title_justify="left", show_header=False, box=None, pad_edge=False)
    for check in checks:
        fix = f" (fix: {check.fix})" if check.fix else ""
        table.add_row(marks[check.level], f"[cyan]{escape(check.name)}[/]", escape(check.text + fix))
    return table


def quantized_table(done: QuantizedModel) -> Table:
    """A line for each quantized layer."""
    table = Table(title=f"layers as {escape(done.quant)}", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", style="cyan")
    for name in ("weights", "mean error", "largest", "outlier columns"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in done.layers:
        outliers = "-" if layer.outliers is None else f"{layer.outliers} of {layer.inputs}"
        errors = (f"{layer.mean_error:.2%}", f"{layer.max_error:.2%}")
        table.add_row(escape(layer.name), f"{layer.weights:,}", *errors, outliers)
    return table


def kept_table(parts: Sequence[Kept]) -> Table:
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


def methods_table(rows: Sequence[Overview], model: str) -> Table:
    """A line for each method; notes on some of them stand below."""
    table = Table(title=f"methods, with figures for {escape(model)}", title_justify="left", box=None, pad_edge=False)
    table.add_column("method", style="cyan", no_wrap=True)
    table.add_column("trains", ratio=1)
    for name in ("parameters", "MiB", "merges", "learning\nrate"):
        table.add_column(name, justify="right", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for row in rows:
        trained = "-" if row.trainable is None else f"{row.trainable:,}"
        size = "-" if row.training_bytes is None else f"{row.training_bytes / MIB:,.0f}"
        short, _, options = row.trains.partition(" (")
        merges = "yes" if row.merges else "no"
        table.add_row(row.name, escape(short.partition(";")[0]), trained, size, merges, f"{row.default_lr:g}")
        more = [f"{short} ({options}" if options else "", row.note.removeprefix(f"{row.name}: ")]
        notes.setdefault("; ".join(filter(None, more)), []).append(row.name)
    table.caption = "\n".join(escape(f"{', '.join(names)}: {note}") for note, names in notes.items() if note)
    table.caption_justify = "left"
    return table


def scores_table(found: Evaluation) -> Table:
    """The scores of an evaluation, those of the base model beside those of the tuned one."""
    title = f"{found.rows:,} rows, {found.target_tokens:,} target tokens, {found.asked:,} prompts answered"
    title += f", {found.too_long:,} too long to be" if found.too_long else ""
    title += f"; {found.left_out:,} bad rows left out" if found.left_out else ""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=min(len(title), 76))
    columns = [("base", found.base), ("tuned", found.scores)] if found.base else [("model", found.scores)]
    table.add_column("", style="cyan")
    for name, _ in columns:
        table.add_column(name, justify="right")
    shown = {"loss": "{:.4f}", "perplexity": "{:,.2f}", "exact_match": "{:.1%}", "bleu4": "{:.2f}", "rouge_l": "{:.4f}"}
    shown |= {
        "thoughts": "{:.1%}",
        "thought_match": "{:.1%}",
        "call_match": "{:.1%}",
    }  # apart from the answers' figures
    for name, form in shown.items():
        values = [getattr(scores, name) for _, scores in columns]
        if any(value is not None for value in values):
            table.add_row(name.replace("_", " "), *("-" if value is None else form.format(value) for value in values))
    return table


def parameters(parts: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int, int]]:
    """(part, frozen, trainable, total); neighbouring blocks with the same numbers are one line, the last one is all.

    Args:
        parts: (part of the model, trainable, total), in the model's order.
    """
    lines = []
    for (trained, total), some in groupby(parts, key=lambda part: (part[1], part[2])):
        names = [name for name, _, _ in some]
        name = f"{names[0]} ... {names[-1]}, each" if len(names) > 1 else names[0]
        lines.append((name, total - trained, trained, total))
    trained, total = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return [*lines, ("all", total - trained, trained, total)]


def groups_table(parts: Sequence[tuple[str, int, int]]) -> Table:
    """See `parameters`."""
    table = Table(title="parameters", title_justify="left", box=None, pad_edge=False)
    table.add_column("part", style="cyan")
    for name in ("frozen", "trainable", "total"):
        table.add_column(name, justify="right")
    for name, *figures in parameters(parts):
        table.add_row(escape(name), *(f"{n:,}" for n in figures), style="bold" if name == "all" else "")
    return table


LENGTHS = ("max length of", "tokens", "rows cut", "rows that lose answer tokens")


def length_rows(choices: Sequence[LengthChoice]) -> list[tuple[str, ...]]:
    """What each max_length would do, by LENGTHS."""
    return [(c.name, f"{c.max_length:,}", f"{c.cut:.1%}", f"{c.lose_answer:.1%}") for c in choices]


def lengths_table(choices: Sequence[LengthChoice]) -> Table:
    """See `length_rows`."""
    table = Table(title="what a max length would cut", title_justify="left", box=None, pad_edge=False)
    table.add_column(LENGTHS[0], style="cyan")
    for name in LENGTHS[1:]:
        table.add_column(name, justify="right")
    for row in length_rows(choices):
        table.add_row(*row)
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """Rule, verdict and text."""
    table = Table(title="checks", title_justify="left", show_header=False, box=None, pad_edge=False)
    for finding in findings:
        text = finding.text + (f" (fix: {finding.fix})" if finding.fix and finding.level != "ok" else "")
        table.add_row(MARKS[finding.level], finding.rule, escape(text))
    return table


def answers_table(rows: Sequence[Answered], limit: int = 60, *, base: bool = True) -> Table:
    """Prompt, expected answer, and the answers before and after.

    Args:
        rows: as answers.json has them.
        limit: characters that are shown of each.
        base: is there a model that answered before?
    """
    columns = {"prompt": "prompt", "expected": "expected", "before": "before", "after": "after"}
    if not base:
        columns = {"prompt": "prompt", "expected": "expected", "after": "answer"}
    table = Table(title="before and after" if base else "answers", title_justify="left")
    for title in columns.values():
        table.add_column(title, overflow="fold", ratio=1)
    for row in rows:
        cells = []
        for name in columns:
            text: str = getattr(row, name)
            text = escape(text if len(text) <= limit else text[: limit - 1] + "…")
            right = name in ("before", "after") and getattr(row, name) == row.expected
            cells.append(f"[green]{text}[/]" if right else text)
        table.add_row(*cells)
    return table
