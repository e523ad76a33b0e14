"""Every method on the demo's task, side by side: `python scripts/compare_methods.py results/methods.json [METHOD ...]`.

Each one trains the bundled model on the bundled data in a process of its own, with the demo's settings and the method's
own default learning rate times NARROW, and answers the demo's held-out prompts. Written down: exact match, trainable
share, seconds of training, peak memory of the process, bytes of the adapter. Seconds depend on the machine; compare
them within one record only.
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

NARROW = 10  # the default rates are for models of billions of parameters; this one has two million
# What is set beside the method's defaults, and the passes over the data that it is given.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze"},
    "tail": {"method": "tail"},
    "tail, mlp": {"method": "tail", "tail": {"kind": "mlp"}},
    "bitfit": {"method": "bitfit", "bitfit": {"add": True}},
    "prompt": {"method": "prompt"},
    "p-tuning": {"method": "p-tuning"},
    "p-tuning, lstm": {"method": "p-tuning", "p_tuning": {"encoder": "lstm"}},
    "prefix": {"method": "prefix"},
    "prefix, projected": {"method": "prefix", "prefix": {"projection": True}},
    "adapter": {"method": "adapter"},
    "adapter, pfeiffer": {"method": "adapter", "bottleneck": {"kind": "pfeiffer"}},
    "adapter, parallel": {"method": "adapter", "bottleneck": {"kind": "parallel"}},
    "lora": {"method": "lora"},
    "lora, all-linear": {"method": "lora", "lora": {"targets": "all-linear"}},
    "lora, dora": {"method": "lora", "lora": {"dora": True}},
    "lora, rslora": {"method": "lora", "lora": {"rslora": True}},
    "lora, pissa": {"method": "lora", "lora": {"init": "pissa"}},
    "lora, lora+": {"method": "lora", "lora": {"b_rate": 16}},
    "ia3": {"method": "ia3"},
    "peft:VERA": {"method": "peft:VERA"},
}


def measure(variant: str, lr: float | None) -> dict[str, Any]:
    """Train, answer, count; in this process."""
    from fitune.commands import demo
    from fitune.commands.scores import accuracy, exact_match
    from fitune.commands.train import train
    from fitune.data import rows
    from fitune.engine.loading import load
    from fitune.models import methods

    changes = VARIANTS[variant]
    rate = lr or NARROW * methods.find(changes["method"]).default_lr
    with tempfile.TemporaryDirectory() as folder:
        settings = demo.config(f"{folder}/run", **changes, lr=rate)
        done = train(settings)
        judged = exact_match(load(done.run), list(rows.load(settings.eval_data).rows))
        size = sum(path.stat().st_size for path in (Path(done.run) / "adapter").iterdir())
    return {
        "accuracy": round(accuracy(judged), 3),
        "trainable": done.trainable_parameters,
        "share": round(done.trainable_parameters / done.total_parameters, 5),
        "lr": rate,
        "seconds": round(done.seconds, 1),
        "peak_mib": round(done.peak_memory_mib),
        "adapter_bytes": size,
        "held_out_loss": round(done.held_out_loss_after or 0.0, 4),
    }


def main(output: str, *wanted: str) -> None:
    """Every method, or those that are named (name@rate tries another rate)."""
    table = {}
    for name in wanted or VARIANTS:
        command = [sys.executable, __file__, "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-800:]}")
            continue
        table[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:22} {table[name]}", flush=True)
    record = {
        "command": f"python scripts/compare_methods.py {output}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count()},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "methods": table,
    }
    if output != "-":
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        given, _, rate = sys.argv[2].partition("@")
        print(json.dumps(measure(given, float(rate) if rate else None)))
    else:
        main(*sys.argv[1:])
