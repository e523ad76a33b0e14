"""What each memory saver takes and costs, on one model: `python scripts/compare_savers.py results/savers.json`.

A random Llama of some ten million parameters is trained for a few steps in a process of its own for each saver. Written
down: peak memory of the process beyond what it holds before the model, seconds a step, the loss of the last step.
Seconds depend on the machine; compare them within one record only.
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

FULL = {"method": "full", "lr": 1e-4}
# name: (settings, what it is compared with)
SAVERS: dict[str, tuple[dict[str, Any], str]] = {
    "full": (FULL, ""),
    "full, checkpointing": ({**FULL, "checkpointing": True}, "full"),
    "full, checkpointing 2": ({**FULL, "checkpointing": 2}, "full"),
    "full, accumulation 4 x 4 rows": ({**FULL, "batch_size": 4, "accumulation": 4}, "full"),
    "full, adamw-foreach": ({**FULL, "optimizer": "adamw-foreach"}, "full"),
    "full, adamw-8bit": ({**FULL, "optimizer": "adamw-8bit"}, "full"),
    "full, paged-adamw-8bit": ({**FULL, "optimizer": "paged-adamw-8bit"}, "full"),
    "full, adafactor": ({**FULL, "optimizer": "adafactor"}, "full"),
    "full, lion": ({**FULL, "optimizer": "lion", "lr": 2e-5}, "full"),
    "full, lion-8bit": ({**FULL, "optimizer": "lion-8bit", "lr": 2e-5}, "full"),
    "full, sgd": ({**FULL, "optimizer": "sgd", "lr": 1e-2}, "full"),
    "full, in backward": ({**FULL, "optimizer_in_backward": True, "max_grad_norm": 0}, "full"),
    "freeze, last 2 blocks": ({"method": "freeze", "lr": 1e-4}, "full"),
    "lora": ({"method": "lora"}, "full"),
    "lora, checkpointing": ({"method": "lora", "checkpointing": True}, "lora"),
    "lora, bf16": ({"method": "lora", "precision": "bf16"}, "lora"),
}
STEPS = 3


def make(folder: Path) -> None:
    """The model, with the bundled tokenizer, and rows of about 200 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitune import tokenizer
    from fitune.demo import bundled

    words = tokenizer.load(bundled() / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder / "model"))
    words.save_pretrained(str(folder / "model"))
    rows = [{"prompt": f"{n} + {n}?", "completion": "the river and the bridge of Norland " * 16} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One saver, in this process."""
    from fitune.checkpoint import RunFolder
    from fitune.config import build
    from fitune.memory import resident_mib
    from fitune.training import train

    before = resident_mib()
    settings, _ = SAVERS[name]
    values = {
        "model": str(folder / "model"), "data": [str(folder / "rows.jsonl")], "output": str(folder / name),
        "max_steps": STEPS, "batch_size": 16, "sample_prompts": 0, "val_rows": 4, "eval_every": STEPS, "cache": "none",
        "warmup": 0.0,
    }  # fmt: skip
    done = train(build({**values, **settings}))
    steps = RunFolder(done.run).read_steps()
    return {
        "peak_mib": round(done.peak_memory_mib - before),
        "seconds_a_step": round(sum(step.seconds for step in steps[1:]) / (len(steps) - 1), 2),
        "last_loss": round(done.last_loss, 4),
        "trainable": done.trainable_parameters,
    }


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
                row["memory_ratio"] = round(row["peak_mib"] / base["peak_mib"], 2)
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
