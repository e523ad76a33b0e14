"""Run folders for the tests of the page: two finished runs, and one that is under way without a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

from fitune.commands.train import train
from fitune.core import locks
from fitune.core.config import build
from fitune.core.records import StepRecord
from fitune.engine.checkpoint import RunFolder
from support import tiny

STEPS, RATE = 4, 0.01


def workplace(folder: Path) -> Path:
    """A working folder with a model, data, and two finished runs: `first`, and `second`, which is the same but for its
    name and the learning rate in its settings."""
    tiny.save("llama", folder / "model")
    tiny.write_rows(folder / "rows.jsonl", 24)
    first, second = folder / "runs" / "first", folder / "runs" / "second"
    settings = {"model": str(folder / "model"), "data": [str(folder / "rows.jsonl")], "lr": RATE, "eval_every": 2}
    train(build({**settings, "output": str(first), "max_steps": STEPS, "batch_size": 4, "sample_prompts": 1}))
    copytree(first, second)
    config = (second / "config.yaml").read_text(encoding="utf-8")
    assert f"lr: {RATE}" in config
    (second / "config.yaml").write_text(config.replace(f"lr: {RATE}", "lr: 0.5"), encoding="utf-8")
    return folder


@contextmanager
def under_way(folder: Path, name: str = "live") -> Iterator[Callable[[int, float], None]]:
    """A run that this process works in; what is given makes a step of it: its number and loss."""
    run = RunFolder(folder / "runs" / name)
    copytree(folder / "runs" / "first", run.path)
    (run.path / "result.json").unlink()
    run.steps.write_text("")

    def step(number: int, loss: float) -> None:
        run.append_step(
            StepRecord(number, number / 10, loss, 1e-3, 1.0, 80, 40, 0.1, loss if number % 2 == 0 else None)
        )

    with locks.held(run.path, lambda text: None):
        yield step
