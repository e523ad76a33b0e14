"""`--help` in groups: which option stands where, and which are shown without `--help-all`. The one place for both.

In: the options of a verb as cyclopts lists them; their texts are those of config.py. Out: lines for a terminal.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence

from cyclopts.help import HelpEntry, HelpPanel
from cyclopts.help.formatters import DefaultFormatter
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.table import Table

GROUPS: dict[str, tuple[str, ...]] = {  # fields of RunConfig, and what verbs add to them
    "Data": (
        "data", "eval_data", "format", "map", "fill", "take", "weight", "skip_bad", "max_length", "length_policy",
        "max_lost", "val_share", "val_rows", "cache", "cache_size",
    ),
    "Model and prompt": (
        "model", "tokenizer", "template", "template_options", "system_role", "train_on", "new_tokens", "answer_tokens",
        "samples", "ids", "compare",
    ),
    "Method": (
        "objective", "method", "adapter", "lora", "freeze", "tail", "bitfit", "prompt", "p_tuning", "prefix",
        "bottleneck", "ia3", "peft", "dpo", "ipo", "kto", "orpo", "simpo",
    ),
    "Precision and memory": (
        "precision", "quant", "storage_dtype", "trainable_dtype", "checkpointing", "offload", "frozen_cache",
        "loss_rows", "layout", "device", "gpu", "workers", "gpus", "parallel", "collective_timeout", "fit", "force",
    ),
    "Optimization": (
        "batch_size", "batch_tokens", "accumulation", "epochs", "max_steps", "lr", "warmup", "weight_decay",
        "max_grad_norm", "optimizer", "epsilon", "optimizer_in_backward", "seed",
    ),
    "Output and checks": (
        "output", "resume", "config", "set", "eval_every", "save_every", "patience", "final", "keep_last",
        "sample_prompts", "sample_tokens", "track", "track_project", "verify", "explain", "calibrate", "prove", "html",
        "verbose", "json",
    ),
}  # fmt: skip
FIRST: dict[str, tuple[str, ...]] = {  # what most runs need; other verbs show all that they have
    "train": (
        "data", "eval_data", "max_length", "model", "method", "lora.rank", "precision", "quant", "fit", "batch_size",
        "epochs", "lr", "output", "resume", "config",
    ),
    "plan": (
        "data", "max_length", "model", "tokenizer", "method", "lora.rank", "precision", "quant", "checkpointing", "gpu",
        "batch_size", "optimizer", "verify", "html", "json",
    ),
    "inspect": (
        "data", "format", "map", "skip_bad", "max_length", "model", "template", "train_on", "samples", "compare",
        "html", "json",
    ),
}  # fmt: skip
ALL = "--help-all"
LEFT = 30  # most columns of the options' names


def field_of(option: str) -> str:
    """`--lora.rank` as `lora.rank`, `--batch-size` as `batch_size`: the setting's name."""
    return option.lstrip("-").replace("-", "_").lower()


class Help:
    """Formats the help of all verbs for cyclopts."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a panel: the verbs as cyclopts does, the options of a verb in groups."""
        if panel.format == "command":
            DefaultFormatter()(console, options, panel)
            return
        verb = next((word for word in sys.argv[1:] if word in FIRST), "")
        entries = {field_of(_names(entry)[-1]): entry for entry in panel.entries}
        if not verb:
            console.print(_group("Options", panel.entries, _width(panel.entries), whole=True))
            return
        whole = ALL in sys.argv
        shown = {name: entry for name, entry in entries.items() if whole or name in FIRST[verb]}
        groups = {
            **GROUPS,
            "More": tuple({name.partition(".")[0] for name in shown} - {f for g in GROUPS.values() for f in g}),
        }
        parts = {title: [shown[n] for field in fields for n in _of(field, shown)] for title, fields in groups.items()}
        width = _width(list(shown.values()))
        for title, some in parts.items():
            if some:
                console.print(_group(title, some, width, whole=whole))
        if left := len(entries) - len(shown):
            console.print(f"{left} more options: fitune {verb} {ALL}", highlight=False)


def _of(field: str, names: Iterable[str]) -> list[str]:
    """The options of a setting: itself, or those of the group that it is."""
    return [name for name in names if name.partition(".")[0] == field]


def _names(entry: HelpEntry) -> list[str]:
    """How an option is typed."""
    return [*([entry.positional_label] if entry.positional_label else []), *entry.positive_names]


def _left(entry: HelpEntry) -> str:
    """An option and what it takes."""
    return _names(entry)[0] if entry.positional_label else f"{_names(entry)[0]} {entry.metavar or ''}".strip()


def _width(entries: Sequence[HelpEntry]) -> int:
    return min(max(len(_left(entry)) for entry in entries) + 4, LEFT)


def _group(title: str, entries: Sequence[HelpEntry], width: int, *, whole: bool) -> Table:
    table = Table(title=f"{title}:", title_justify="left", title_style="bold", box=None, show_header=False, padding=0)
    table.add_column(width=width, style="cyan", overflow="fold")
    table.add_column()
    for entry in entries:
        table.add_row(f"  {_left(entry)}", _text(entry, whole=whole))
    return table


def _text(entry: HelpEntry, *, whole: bool) -> str:
    """What an option is: all that config.py says of it, or its first sentence; with the default and the choices."""
    text = " ".join(str(entry.description.primary_renderable).split())
    text, _, default = text.partition("[default: ")
    if stated := re.search(r" Default: ([^.]+)\.", text):
        text, default = text.replace(stated[0], ""), stated[1]
    if not default and entry.default not in (None, "", '""', "False", "None"):
        default = entry.default
    text = text.strip() if whole else re.split(r"(?<!\bal)\. ", text)[0].rstrip(".") + "."
    choices = f"one of {', '.join(entry.choices)}" if entry.choices and len(entry.choices) > 1 else ""
    added = "; ".join(part for part in (choices, default and f"default: {default.rstrip(']')}") if part)
    return escape(f"{text} [{added}]" if added else text)
