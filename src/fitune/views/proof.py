"""`fitune plan --prove`: published memory figures of other people's runs, beside what fitune predicts of them.

In: `proof.json`, which `python benchmarks/memory_l40s.py --table FILE --json` wrote: figures measured by others, with
their source, and predictions from the configs of these runs alone. Out: a table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from rich.markup import escape
from rich.table import Table

from fitune.core.parse import parse
from fitune.core.units import MIB


@dataclass(frozen=True)
class ProofRow:
    """A published run: bytes that others measured, bytes that fitune predicts; error: as a share of the measured."""

    name: str
    measured_bytes: int
    predicted_bytes: int
    error: float


@dataclass(frozen=True)
class Proof:
    """All published runs; the errors are shares, longest_row is in tokens."""

    rows: int
    gpu: str
    mean_error: float
    median_error: float
    p95_error: float
    worst_error: float
    longest_row: int
    source: str
    table: list[ProofRow]


def proof() -> dict[str, object]:
    """The result of the benchmark that came with this version, as JSON."""
    values: dict[str, object] = json.loads(files("fitune").joinpath("proof.json").read_text(encoding="utf-8"))
    return values


def proof_table(values: Mapping[str, object]) -> Table:
    """A line for each run, the figures over all of them, and where the measured ones come from."""
    found = parse(Proof, values, "proof.json")
    table = Table(title=f"reserved memory of {found.rows} published runs on an {found.gpu}", title_justify="left")
    table.add_column("run", style="cyan", overflow="fold")
    for name in ("measured MiB", "predicted MiB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.table:
        sizes = (f"{row.measured_bytes / MIB:,.0f}", f"{row.predicted_bytes / MIB:,.0f}")
        table.add_row(escape(row.name), *sizes, f"{row.error:+.2%}")
    table.caption = (
        f"mean error {found.mean_error:.2%}, median {found.median_error:.2%}, 95 % of the runs within "
        f"{found.p95_error:.2%}, worst {found.worst_error:.2%}. One number was fitted, on one run: the longest "
        f"row has {found.longest_row} tokens.\nmeasured figures: {found.source}"
    )
    table.caption_justify = "left"
    return table
