"""A run that is followed is the run that is not, bit for bit, also where it is stopped and a tracker hangs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fitune
from fitune.commands.train import resume_config
from fitune.core import tracking
from fitune.core.config import build
from fitune.core.errors import ConfigError, FituneError
from fitune.core.tracking import Callback, TrackedRun, Tracker
from support import command, tiny
from support.runs import Crash, CrashAt, digest


class Recorded(Tracker):
    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.steps: dict[int, Mapping[str, float]] = {}
        self.ends: list[bool] = []

    def start(self, run: TrackedRun) -> str:
        self.started.append((run.id, run.step))
        return "one"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps[step] = figures

    def end(self, ok: bool) -> None:
        self.ends.append(ok)


def test_a_followed_run_has_the_bits_of_one_that_is_not(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Followed by one that hangs, one that fails and one that records; killed and resumed on the way."""
    monkeypatch.setattr(tracking, "DEADLINE", 0.5)
    values: dict[str, Any] = {
        "model": str(model_folder), "data": [str(tiny.write_rows(tmp_path / "rows.jsonl", 16))], "max_steps": 4,
        "save_every": 2, "eval_every": 2, "sample_prompts": 0, "batch_size": 2, "lr": 1e-2,
    }  # fmt: skip
    alone = fitune.train(output=str(tmp_path / "alone"), **values)
    hangs, recorded, heard = threading.Event(), Recorded(), list[str]()

    class Messages(CrashAt):
        def message(self, text: str) -> None:
            heard.append(text)

    def fails(step: int, figures: Mapping[str, float]) -> None:
        raise ZeroDivisionError

    some: list[Callback] = [recorded, lambda step, figures: hangs.wait(), fails]
    output = str(tmp_path / "followed")
    try:
        with pytest.raises(Crash):
            fitune.train(output=output, watch=Messages(3), callbacks=some, **values)
        done = fitune.train(output=output, resume=True, watch=Messages(99), callbacks=some)
    finally:
        hangs.set()
    assert digest(tmp_path / "followed") == digest(tmp_path / "alone")
    assert recorded.started == [("", 0), ("one", 2)]
    assert recorded.ends == [False, True]
    assert {step: one["train/loss"] for step, one in recorded.steps.items()} == {r.step: r.loss for r in alone.history}
    assert recorded.steps[4]["eval/loss"] == done.held_out_loss_after
    assert sorted(text.partition(":")[0] for text in heard if "tracker" in text) == [
        "tracker callback 2", "tracker callback 2", "tracker callback 3", "tracker callback 3",
    ]  # fmt: skip


def test_who_follows_is_no_part_of_what_a_run_is(model_folder: Path, tmp_path: Path) -> None:
    """A resumed run may be followed by others, and names are checked."""
    values = {"model": str(model_folder), "data": ["rows"]}
    assert build({**values, "track": "tensorboard"}).track == ["tensorboard"]
    assert build({**values, "report_to": "wandb"}).track == ["wandb"]
    assert build({**values, "report_to": "none"}).track == []
    with pytest.raises(ConfigError, match="track"):
        build({**values, "track": ["tensorbord"]})
    data = str(tiny.write_rows(tmp_path / "rows.jsonl", 8))
    run = str(tmp_path / "run")
    fitune.train(model=str(model_folder), data=[data], output=run, max_steps=1, sample_prompts=0, track_project="mine")
    assert resume_config(run, {"track": ["wandb"]}).track == ["wandb"]
    assert resume_config(run, {}).track_project == "mine"
    assert fitune.Tracker is Tracker
    with pytest.raises(FituneError):
        resume_config(run, {"track": ["nobody"]})


def test_a_tracker_that_is_not_installed_is_named_once_and_the_run_ends_well(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitune.views.trackers.util.find_spec", lambda name: None)
    data = tiny.write_rows(tmp_path / "rows.jsonl", 8)
    flags = ["--max-steps", 2, "--sample-prompts", 0, "--track", "wandb", "mlflow"]
    arguments = ["train", "--model", model_folder, "--data", data, "--output", tmp_path / "run", *flags]
    code, out, err = command.run(arguments, capsys, monkeypatch)
    assert code == 0
    assert (out + err).count("pip install wandb") == (out + err).count("pip install mlflow") == 1
