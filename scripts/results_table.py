"""A file of results as a Markdown table: `python scripts/results_table.py results/methods.json`.

docs/ shows these tables; a test checks that they are those of the files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def lines(path: Path) -> list[str]:
    """The table of methods.json, savers.json or precision.json."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "methods" in record:
        head = ["", "exact match", "trained", "share", "rate", "seconds", "peak MiB", "adapter KiB"]
        rows = [_method(name, row) for name, row in record["methods"].items()]
    elif "precisions" in record:
        head = ["", "frozen weights, KiB", "exact match", "gain kept", "real model: gain kept", "peak MiB", "seconds"]
        real = record.get("real", {}).get("precisions", {})
        rows = [_precision(name, row, real.get(name)) for name, row in record["precisions"].items()]
    else:
        head = ["", "plan, MiB", "allocated, MiB", "ratio", "peak in", "against"]
        rows = [_saver(name, row) for name, row in record["savers"].items()]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _method(name: str, row: dict[str, Any]) -> list[str]:
    figures = [f"{row['accuracy']:.1%}", f"{row['trainable']:,}", f"{row['share']:.2%}", f"{row['lr']:g}"]
    return [name, *figures, f"{row['seconds']:.0f}", f"{row['peak_mib']}", f"{row['adapter_bytes'] / 1024:,.0f}"]


def _precision(name: str, row: dict[str, Any], real: dict[str, Any] | None) -> list[str]:
    kept = "" if real is None else f"{real['gain_kept']:.1%}"
    figures = [f"{row['frozen_bytes'] / 1024:,.0f}", f"{row['accuracy']:.1%}", f"{row['gain_kept']:.1%}", kept]
    return [name, *figures, f"{row['peak_mib']}", f"{row['seconds']:.0f}"]


def _saver(name: str, row: dict[str, Any]) -> list[str]:
    ratio = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
    return [name, f"{row['plan_mib']}", f"{row['allocated_mib']}", ratio, row["phase"], row.get("against", "")]


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
