"""Kills, bad disks, damage, races and malformed inputs, drawn from a seed (scripts/torture.py): none is believed, none
ends in a traceback, nothing is a dead end.

The quick run is thin and the same each time; `make test-full` runs ten minutes' worth, and two more seeds here.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torture(tmp_path: Path, *words: str) -> dict:
    """Run it in a process of its own, which forks; what it wrote."""
    output = tmp_path / "torture.json"
    command = [sys.executable, str(ROOT / "scripts" / "torture.py"), "--output", str(output), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert output.exists(), done.stderr[-2000:]
    return dict(json.loads(output.read_text(encoding="utf-8")))


def good(record: dict) -> bool:
    return not record["bad"] and all(kind["tried"] for kind in record["counts"].values())


@pytest.mark.skipif(sys.platform == "win32", reason="the script forks")
def test_two_killed_runs_end_as_those_that_were_not(tmp_path: Path) -> None:
    """LoRA and full tuning, one killed inside a save."""
    record = torture(tmp_path, "--kinds", "kill", "--minutes", "0.1", "--seed", "11", "--workers", "1")
    assert record["counts"]["kill"] == {"tried": 2, "equal": 2}, record["bad"]
    assert record["kills_inside_a_save"] >= 1


@pytest.mark.full
def test_a_few_of_each_kind(tmp_path: Path) -> None:
    record = torture(tmp_path, "--minutes", "0.1", "--seed", "11", "--workers", "1")
    assert good(record), json.dumps(record["bad"], indent=1)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2, 3])
def test_other_seeds(tmp_path: Path, seed: int) -> None:
    record = torture(tmp_path, "--minutes", "1", "--seed", str(seed))
    assert good(record), json.dumps(record["bad"], indent=1)


def test_the_record_has_nothing_bad() -> None:
    record = json.loads((ROOT / "results" / "torture.json").read_text(encoding="utf-8"))
    assert good(record)
    assert record["kills_inside_a_save"] * 4 >= record["counts"]["kill"]["tried"]


@pytest.mark.skipif(sys.platform == "win32", reason="the script forks")
@pytest.mark.parametrize(
    ("code", "err", "same", "result"),
    [
        (0, "", True, "equal"),
        (0, "", False, "SILENT"),
        (1, "error: ...", False, "TRACEBACK"),
        (0, "Traceback (most recent call last)", True, "TRACEBACK"),
        (2, "error: RUN/adapter/x.safetensors: damaged", False, "refused"),
        (2, "error: something is wrong", False, "SILENT"),
        (-11, "", False, "TRACEBACK"),
    ],
)
def test_what_is_bad_is_called_so(
    monkeypatch: pytest.MonkeyPatch, code: int, err: str, same: bool, result: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    children = importlib.import_module("tortures.children")
    damage = importlib.import_module("tortures.damage")
    ended = children.Ran(code, "", err)
    assert damage._judged("adapter/x.safetensors: a bit flipped", ended, same=same).result == result
