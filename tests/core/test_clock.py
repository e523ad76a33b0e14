"""Seconds by phase: they add up, and the run folder and the report have them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fitune.core import clock
from fitune.core.clock import Clock, Phase
from fitune.engine.checkpoint import RunFolder
from fitune.views import report, run_records


def test_every_moment_belongs_to_the_phase_that_ends_next(monkeypatch: pytest.MonkeyPatch) -> None:
    at = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    cpu = iter([1.0, 1.5, 2.5, 4.0, 6.0, 8.5])
    # the module's own name: the clock itself also times the tests
    fake = SimpleNamespace(perf_counter=lambda: next(at), process_time=lambda: next(cpu))
    monkeypatch.setattr(clock, "time", fake)
    counted = Clock()
    for name in (clock.DATA, clock.STEPS, clock.EVALUATION, clock.STEPS, clock.START):
        counted.ends(name)
    assert counted.phases == (  # in the order of a run
        Phase(clock.START, 5.0, 2.5),
        Phase(clock.DATA, 1.0, 0.5),
        Phase(clock.STEPS, 2.0 + 4.0, 1.0 + 2.0),
        Phase(clock.EVALUATION, 3.0, 1.5),
    )
    assert clock.before_steps(counted.phases) == 6.0
    assert clock.before_text(counted.phases) == "6.0 s before the first step: start 5.0, data 1.0"


def test_a_process_of_the_runs_own_is_counted_from_its_beginning() -> None:
    code = "import time; time.sleep(0.2)\nfrom fitune.core.clock import Clock, START\n"
    code += "one = Clock(whole=True); one.ends(START); print(one.phases[0].seconds, one.phases[0].cpu_seconds)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, cpu = map(float, done.stdout.split())
    assert cpu > 0.01  # Python's own start is in it
    assert seconds >= cpu - 0.01


def test_the_phases_of_a_run_add_up_to_it(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["--model", model_folder, "--data", data_file, "--output", run, "--max-steps", "2", "--json"]
    given += ["--sample-tokens", "4"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fitune", "train", *map(str, given)], capture_output=True, text=True, check=True
    )
    whole = time.perf_counter() - began
    result = run_records.result_of(RunFolder(run))
    came = [name for name in clock.WHAT if name != clock.REFERENCE]  # which preferences alone have
    assert [phase.name for phase in result.phases] == came
    total = sum(phase.seconds for phase in result.phases)
    # what is not in it: the report, the seal and the end of the process
    assert 0.5 * whole < total < whole
    assert json.loads(done.stdout)["phases"] == [vars(phase) for phase in result.phases]
    assert clock.before_text(result.phases).partition(":")[0] in done.stderr
    assert result.seconds < {phase.name: phase.seconds for phase in result.phases}[clock.STEPS]
    page = RunFolder(run).report.read_text(encoding="utf-8")
    rows = report._seconds(result.phases)
    assert len(rows) == len(came) + 1
    assert all(f"<td>{row.name}</td>" in page and row.seconds in page for row in rows)


def test_a_run_of_an_older_version_has_none(tmp_path: Path) -> None:
    assert report._seconds(()) == []
