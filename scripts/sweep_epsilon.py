"""What Adam's epsilon does to float16 weights, by learning rate: `python scripts/sweep_epsilon.py MODEL DATA OUTPUT`.

MODEL: a small pretrained model's folder. DATA: a JSON list of {"output": text}. Weights, gradients and states are
float16, as with `--trainable-dtype fp16`; products are computed in float32 on the same numbers, since a CPU's float16
products are a hundred times slower. Written down for each method, optimizer, learning rate and epsilon: the held-out
loss over that of float32 weights at the same rate. `optim` has its bounds from one half of these rows; the other half
checks them (`tests/models/test_precision.py`).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fitune.core.config import build
from fitune.core.records import Batch, Sample
from fitune.data import tokenizer
from fitune.data.batches import flat
from fitune.engine import optim
from fitune.engine.held_out import held_out_loss
from fitune.engine.step import loss_sum
from fitune.models import adapters
from fitune.models.load import load_model
from fitune.models.parts import trainable

STEPS, ROWS, LENGTH = 60, 4, 64
RATES = {"lora": (5e-5, 2e-4, 1e-3, 5e-3), "full": (2e-5, 1e-4, 3e-4, 1e-3)}
EPSILONS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
OPTIMIZERS = ("adamw-foreach", "adamw", "adamw-8bit")


def batches(folder: Path, data: Path) -> tuple[list[Batch], list[Batch]]:
    """Training and held-out batches: windows of the texts, every token with a label."""
    words = tokenizer.load(folder)
    texts = "\n".join(row["output"] for row in json.loads(data.read_text(encoding="utf-8"))[:400])
    ids = np.array(words(texts, add_special_tokens=False)["input_ids"], np.int32)
    count = len(ids) // LENGTH
    windows = [Sample(ids[n * LENGTH : (n + 1) * LENGTH], np.ones(LENGTH, bool)) for n in range(count)]
    order = np.random.default_rng(0).permutation(count)
    made = [flat(windows, order[n * ROWS : (n + 1) * ROWS]) for n in range(STEPS + 10)]
    return made[:STEPS], made[STEPS:]


def tune(folder: Path, train: list[Batch], held_out: list[Batch], settings: dict[str, Any], *, half: bool) -> float:
    """The held-out loss after the steps."""
    config = build({"model": "m", "data": ["d"], **settings})
    torch.manual_seed(0)
    model = adapters.attach(load_model(folder, precision="fp32"), config).train()
    plain = trainable(model)
    kept = {name: torch.nn.Parameter(p.detach().half() if half else p.detach().clone()) for name, p in plain.items()}
    optimizer = optim.make(kept, config)
    for step, batch in enumerate(train):
        optim.set_learning_rate(optimizer, optim.learning_rate(step, len(train), config.lr or 0.0, 0.05))
        with torch.no_grad():
            for name, p in plain.items():
                p.copy_(kept[name])
        (loss_sum(model, batch) / batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.values(), 1.0)
        for name, p in plain.items():
            kept[name].grad, p.grad = p.grad.to(kept[name].dtype), None  # type: ignore[union-attr]
        optimizer.step()
    with torch.no_grad():
        for name, p in plain.items():
            p.copy_(kept[name])
    return held_out_loss(model, held_out)


def main(folder: Path, data: Path, output: Path) -> None:
    """Every combination."""
    train, held_out = batches(folder, data)
    rows: list[dict[str, Any]] = []
    for method, rates in RATES.items():
        for lr in rates:
            same = {"method": method, "lr": lr, "optimizer": "adamw-foreach"}
            plain = tune(folder, train, held_out, same, half=False)
            for name, epsilon in itertools.product(OPTIMIZERS, EPSILONS):
                settings = {**same, "optimizer": name, "epsilon": epsilon}
                loss = tune(folder, train, held_out, settings, half=True)
                ratio = round(loss / plain, 4) if math.isfinite(loss) else None
                rows.append({**settings, "fp32": round(plain, 4), "ratio": ratio})
                print(rows[-1], flush=True)
                record = {
                    "command": f"python scripts/sweep_epsilon.py MODEL DATA {output.name}",
                    "model": folder.name, "data": data.name, "date": datetime.now(UTC).date().isoformat(),
                    "steps": STEPS, "rows": ROWS, "length": LENGTH, "torch": metadata.version("torch"), "sweep": rows,
                }  # fmt: skip
                output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
