"""fitune, by the function behind `fitune train`: `python train_fitune.py SETTINGS.json`.

The options are fields of fitune's config; what is not among them is its default. fitune reads the rows as a user has
them and tokenizes them itself, within the seconds before step 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import meter as meters


def config(settings: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The run's settings. No row is held out and no prompt is answered: the other systems do neither."""
    return {
        "model": settings["model"],
        "adapter": settings["adapter"],
        "data": [settings["data"]],
        "output": str(output),
        "method": "lora",
        "lora": {"rank": settings["rank"], "alpha": settings["alpha"], "targets": settings["targets"]},
        "precision": settings["precision"],
        "batch_size": settings["batch"],
        "epochs": 1,
        "max_steps": settings["steps"],
        "lr": settings["peak"],
        "max_grad_norm": settings["max_grad_norm"],
        "seed": settings["seed"],
        "val_share": 0,
        "sample_prompts": 0,
        "save_every": settings["steps"],
        "cache": settings["cache"],
        "device": settings["device"],
        **settings["options"],
    }


def main() -> None:
    """Train."""
    settings = meters.settings()
    meter = meters.Meter(settings)
    import fitune

    tokens: list[int] = []
    labels: list[int] = []

    class Look(fitune.Watcher):
        """Marks the steps."""

        def start(self, total: int, done: int, device: str) -> None:
            """The first step is next."""
            meter.ready()

        def step(self, record: fitune.StepRecord) -> None:
            """A step was made."""
            meter.step()
            meter.loss(record.loss, record.grad_norm)
            tokens.append(record.tokens)
            labels.append(record.targets)

    output = Path(settings["work"]) / "fitune"
    shutil.rmtree(output, ignore_errors=True)
    with meter.counting():
        fitune.train(**config(settings, output), watch=Look())
    meter.write(tokens=tokens, labels=labels)


if __name__ == "__main__":
    from fitune.core.processor import start_anew

    start_anew()  # as the command does: with settings of malloc that are read when a process begins
    main()
