"""Real trackers, where they are installed: a run that was stopped and went on is one curve, and nothing is printed."""

from __future__ import annotations

import os
import struct
import sys
import threading
import time
from pathlib import Path

import pytest

from fitune.core import tracking
from fitune.views import trackers
from fitune.views.trackers.offline_log import BLOCK, FIRST, FULL, HEADER, LAST, MIDDLE, records
from fitune.views.trackers.silence import silent
from support.followed import follow


def test_what_a_tracker_prints_is_dropped_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    inside, outside = threading.Event(), threading.Event()

    def loud() -> None:
        with silent():
            print("tracker")
            inside.set()
            outside.wait()
        print("its thread afterwards")

    before, thread = sys.stdout, threading.Thread(target=loud)
    thread.start()
    inside.wait()
    print("run")
    outside.set()
    thread.join()
    assert sys.stdout is before
    assert capsys.readouterr().out == "run\nits thread afterwards\n"


def test_records_of_a_file_that_a_killed_process_left(tmp_path: Path) -> None:
    """Records over the borders of blocks, one of which leaves no place for a header; the last is not whole."""
    made, data = [b"a" * 10, b"b" * 32_731, b"", b"c" * 100_000, b"d" * 40_000], b":W&B\0\0\0"
    for one in made:
        first = True
        while True:
            left = BLOCK - len(data) % BLOCK
            if left < HEADER:
                data += bytes(left)
                continue
            piece, one = one[: left - HEADER], one[left - HEADER :]
            kind = (FULL if first else LAST) if not one else (FIRST if first else MIDDLE)
            data += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
            if not one:
                break
    file = tmp_path / "run.wandb"
    file.write_bytes(data)
    assert list(records(file)) == made
    for cut in (1, 8_000, 40_000):
        file.write_bytes(data[:-cut])
        assert list(records(file)) == made[:-1]
    file.write_bytes(data[:7])
    assert list(records(file)) == []


# ---- real ones, where they are installed ----


def read_tensorboard(run: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "trackers" / "tensorboard"))
    found.Reload()
    return [(one.step, round(one.value, 5)) for one in found.Scalars("train/loss")]


def read_mlflow(run: Path) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'trackers' / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string=f"name = '{run.name}'")
    (only,) = client.search_runs([experiment.experiment_id])
    assert only.info.status == "FINISHED"
    assert only.data.params["lora.rank"] == "8"
    return [(one.step, round(one.value, 5)) for one in client.get_metric_history(only.info.run_id, "train/loss")]


def read_trackio(run: Path) -> list[tuple[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs(run.name) == [run.name]
    rows = SQLiteStorage.get_logs(run.name, run.name)
    SQLiteStorage.delete_project(run.name) if hasattr(SQLiteStorage, "delete_project") else None
    return sorted((row["step"], round(row["train/loss"], 5)) for row in rows)


def read_wandb(run: Path) -> list[tuple[int, float]]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: list[tuple[int, float]] = []
    until = time.monotonic() + 20  # on a busy machine wandb's service writes its last block behind `finish`
    while found != WHOLE and time.monotonic() < until:
        files = sorted((run / "trackers" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
        assert len({file.name for file in files}) == 1  # both parts have one id: `wandb sync` makes one curve of them
        steps = [Record.FromString(one).history for file in files for one in records(file)]
        found = [
            (step.step.num, round(float(item.value_json), 5))
            for step in steps
            for item in step.item
            if "train/loss" in (item.key, ".".join(item.nested_key))
        ]
    return found


def read_swanlab(run: Path) -> list[tuple[int, float]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    files = sorted((run / "trackers" / "swanlab").glob("*/*.swanlab"), key=lambda file: file.stat().st_mtime)
    assert len({file.name for file in files}) == 1
    scalars = [Record.FromString(one).scalar for file in files for one in records(file)]
    return [(one.step, round(one.value.number, 5)) for one in scalars if one.key == "train/loss"]


WHOLE = [(1, 2.0), (2, 1.0), (3, round(2 / 3, 5)), (4, 0.5)]
READERS = {
    "tensorboard": read_tensorboard, "mlflow": read_mlflow, "trackio": read_trackio, "wandb": read_wandb,
    "swanlab": read_swanlab,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_real_tracker_has_one_curve_of_a_run_that_was_stopped_and_went_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind step 3, it goes on from step 2, offline."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    places = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
    for variable, value in places.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "DEADLINE", 60)
    run = tmp_path / f"fitune-{os.getpid()}"
    run.mkdir()
    assert follow(run, trackers.made([name]), [1, 2, 3], project=run.name).messages == []
    assert follow(run, trackers.made([name]), [3, 4], 2, run.name).messages == []
    assert READERS[name](run) == WHOLE
