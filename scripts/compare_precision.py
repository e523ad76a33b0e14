"""Every precision and quantizer side by side: `python scripts/compare_precision.py results/precision.json`.

LoRA on all linear layers, each in a process of its own: on the demo's task (exact match of the held-out prompts) and,
with `--real MODEL DATA`, on a real model (share of float32's gain in held-out loss that is kept, both measured from the
float32 base). Written down: bytes of the frozen weights, peak memory of the process, seconds. Seconds depend on the
machine (a CPU without bf16 computes it very slowly); compare them within one record only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

LORA: dict[str, Any] = {"method": "lora", "lora": {"targets": "all-linear"}, "lr": 2e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32, bf16 weights": {"precision": "fp32", "storage_dtype": "bf16"},
    "fp32, int8": {"precision": "fp32", "quant": "int8"},
    "fp32, nf4": {"precision": "fp32", "quant": "nf4"},
    "fp32, fp4": {"precision": "fp32", "quant": "fp4"},
    "bf16": {"precision": "bf16"},
    "bf16, nf4": {"precision": "bf16", "quant": "nf4"},
    "fp16": {"precision": "fp16"},
}
REAL = {"template": "alpaca", "max_length": 256, "max_lost": 1.0, "skip_bad": True, "max_steps": 60, "batch_size": 8}


def measure(variant: str, real: list[str]) -> dict[str, Any]:
    """Train, answer, count; in this process."""
    from fitune.commands import demo
    from fitune.commands.scores import accuracy, exact_match
    from fitune.commands.train import train
    from fitune.core.config import build
    from fitune.data import rows
    from fitune.engine.checkpoint import RunFolder
    from fitune.engine.loading import load

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if real:
            model, data = real
            values = {"model": model, "data": [data], "sample_prompts": 0, "output": f"{folder}/run", **REAL}
            settings = build({**values, **LORA, **VARIANTS[variant]})
        else:
            settings = demo.config(f"{folder}/run", **LORA, **VARIANTS[variant])
        done = train(settings)
        if not real:
            judged = exact_match(load(done.run), list(rows.load(settings.eval_data).rows))
            found["accuracy"] = round(accuracy(judged), 3)
        kept = RunFolder(done.run).read("plan")["kept"]
    return found | {
        "frozen_bytes": sum(part["bytes"] for part in kept if part["part"] != "trained"),
        "peak_mib": round(done.peak_memory_mib),
        "seconds": round(done.seconds, 1),
        "base_loss": done.base_held_out_loss,
        "held_out_loss": round(done.held_out_loss_after or 0.0, 4),
    }


def table(real: list[str]) -> dict[str, Any]:
    """A row for each variant."""
    made: dict[str, Any] = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--one", name, *real]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-800:]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        base, best = (made.get("fp32", row)[key] for key in ("base_loss", "held_out_loss"))
        row["gain_kept"] = round((base - row["held_out_loss"]) / (base - best), 3)
        made[name] = row
        print(f"{name:20} {row}", flush=True)
    return made


def main(output: str, real: list[str]) -> None:
    """The demo's task, and the real model where one is given."""
    record = {
        "command": f"python scripts/compare_precision.py {output}" + (" --real MODEL DATA" if real else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "precisions": table([]),
    }
    if real:
        record["real"] = {"model": Path(real[0]).name, "data": Path(real[1]).name, "precisions": table(real)}
    Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], sys.argv[3:])))
    else:
        main(sys.argv[1], sys.argv[3:])
