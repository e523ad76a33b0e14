"""The results that fitune ranks ways of tuning by, packed into the package: `python scripts/pack_results.py`.

In: results/methods.json and results/precision.json, as their benchmarks wrote them. Out: src/fitune/measured.json. A
test checks that the packed figures are those of the results; run this again after a benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKED = ROOT / "src" / "fitune" / "measured.json"
QUANTIZED = {"none": "fp32", "int8": "fp32, int8", "nf4": "fp32, nf4"}  # names in results/precision.json


def packed() -> dict[str, object]:
    """Accuracy by method, and the share of the gain on a real model that each quantizer kept, to a hundredth."""
    methods = json.loads((ROOT / "results" / "methods.json").read_text(encoding="utf-8"))["methods"]
    precision = json.loads((ROOT / "results" / "precision.json").read_text(encoding="utf-8"))
    real = precision["real"]["precisions"]
    return {
        "sources": ["results/methods.json", "results/precision.json"],
        "accuracy": {name: row["accuracy"] for name, row in methods.items()},
        "gain_kept": {name: round(real[row]["gain_kept"], 2) for name, row in QUANTIZED.items()},
    }


if __name__ == "__main__":
    PACKED.write_text(json.dumps(packed(), indent=1) + "\n", encoding="utf-8")
    print(PACKED)
