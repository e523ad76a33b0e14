"""What each memory saver takes and costs, on one model: `python scripts/compare_savers.py results/savers.json`.

A random Llama of 33 million parameters, whose weights, gradients and optimizer states outweigh its activations, as
those of large models do: 2 rows of 32 tokens a step, or 8 rows of 96. For each saver, in a process of its own: the
peak of the plan, made without weights; the most bytes that torch's profiler counts as allocated while the same steps
run (the process holds Python and torch beside, which no saver changes); seconds a step. Seconds depend on the machine,
and on who else is at work there; compare them within one record only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

FULL = {"method": "full", "lr": 1e-4}
LONG = {"batch_size": 8, "length": 96}  # as many tokens as make activations outweigh gradients
# name: (settings, what it is compared with)
SAVERS: dict[str, tuple[dict[str, Any], str]] = {
    "full": (FULL, ""),
    "full, adamw-foreach": ({**FULL, "optimizer": "adamw-foreach"}, "full"),
    "full, adamw-8bit": ({**FULL, "optimizer": "adamw-8bit"}, "full"),
    "full, paged-adamw-8bit": ({**FULL, "optimizer": "paged-adamw-8bit"}, "full"),
    "full, adafactor": ({**FULL, "optimizer": "adafactor"}, "full"),
    "full, lion": ({**FULL, "optimizer": "lion", "lr": 2e-5}, "full"),
    "full, lion-8bit": ({**FULL, "optimizer": "lion-8bit", "lr": 2e-5}, "full"),
    "full, sgd": ({**FULL, "optimizer": "sgd", "lr": 1e-2}, "full"),
    "full, in backward": ({**FULL, "optimizer_in_backward": True, "max_grad_norm": 0}, "full"),
    "full, in backward, adafactor": (
        {**FULL, "optimizer_in_backward": True, "max_grad_norm": 0, "optimizer": "adafactor"},
        "full",
    ),
    "freeze, last 2 blocks": ({"method": "freeze", "lr": 1e-4}, "full"),
    "lora": ({"method": "lora"}, "full"),
    "lora, bf16": ({"method": "lora", "precision": "bf16"}, "lora"),
    "lora, 8 rows": ({"method": "lora", **LONG}, ""),
    "lora, 8 rows, checkpointing": ({"method": "lora", **LONG, "checkpointing": True}, "lora, 8 rows"),
    "full, 8 rows": ({**FULL, **LONG}, ""),
    "full, 8 rows, checkpointing": ({**FULL, **LONG, "checkpointing": True}, "full, 8 rows"),
    "full, 8 rows, checkpointing 2": ({**FULL, **LONG, "checkpointing": 2}, "full, 8 rows"),
    "full, accumulation 8 x 1 row": ({**FULL, **LONG, "batch_size": 1, "accumulation": 8}, "full, 8 rows"),
}
STEPS, ROWS, LENGTH = 2, 2, 32


def make(folder: Path) -> None:
    """The model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder / "model"))


def ready(folder: Path, config: Any) -> Any:
    """The model with its method, in training mode."""
    from fitune.models import adapters, families
    from fitune.models.load import load_model
    from fitune.models.prepare import checkpoint_blocks

    base = load_model(folder, precision=config.precision)
    family = families.of(base)
    model = adapters.attach(base, config)
    checkpoint_blocks(model, family, config.checkpointing)
    return model.train()


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One saver, in this process."""

    from fitune.core.config import build
    from fitune.engine import optim
    from fitune.engine.step import training_step
    from fitune.memory import plan as plans
    from fitune.memory import steps, trace
    from fitune.memory.counted import count
    from fitune.memory.measure import most_allocated
    from fitune.memory.usage import usage
    from fitune.models.configs import read_config
    from fitune.models.parts import trainable

    settings = {"length": LENGTH, **SAVERS[name][0]}
    length = settings.pop("length")
    values = {"model": str(folder / "model"), "data": ["none"], "batch_size": ROWS, "precision": "fp32", "warmup": 0.0}
    config = build({**values, **settings})
    shape = read_config(folder / "model")
    micro = [steps.made_up(config.batch_size, length, shape.vocab_size)] * config.accumulation
    work = plans.Work(config, shape, [[steps.made_up(1, length, shape.vocab_size)], micro])
    peak = usage(plans.traced(work), without="start").peak
    model = ready(folder / "model", config)
    there = count(model, trace.Tracer())
    most = most_allocated(partial(plans.go, model, work, trace.Blind()), there)
    model = ready(folder / "model", config)  # the first one's hooks are of another optimizer
    optimizer = optim.make(trainable(model), config)
    optim.set_learning_rate(optimizer, config.lr or 1e-4)
    spent = []
    for _ in range(STEPS if length == LENGTH else 1):
        began = time.perf_counter()
        training_step(model, micro, optimizer, config.max_grad_norm)
        spent.append(time.perf_counter() - began)
    return {
        "plan_mib": round(peak.bytes / 2**20), "allocated_mib": round(most / 2**20), "phase": peak.phase,
        "seconds_a_step": round(min(spent), 2), "trainable": sum(p.numel() for p in trainable(model).values()),
    }  # fmt: skip


def main(output: str) -> None:
    """Every saver."""
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for saver, (_, against) in SAVERS.items():
            command = [sys.executable, __file__, "--one", saver, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{saver}: failed\n{done.stderr[-800:]}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            if against:
                base = table[against]
                row["memory_ratio"] = round(row["allocated_mib"] / base["allocated_mib"], 2)
                row["time_ratio"] = round(row["seconds_a_step"] / base["seconds_a_step"], 2)
                row["against"] = against
            table[saver] = row
            print(f"{saver:30} {row}", flush=True)
    record = {
        "command": f"python scripts/compare_savers.py {output}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "default")},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "savers": table,
    }
    if output != "-":
        Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(sys.argv[1])
