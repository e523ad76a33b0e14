"""The benchmark of the seconds before the first step: what it keeps of its processes, and one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitune.core import clock
from support.against import module

start = module("start")


def timing(seconds: float, busy: float = 0.0) -> object:
    phases = dict.fromkeys(clock.WHAT, (seconds, 2 * seconds))
    return start.Timing(9 * seconds, 10 * seconds, 20 * seconds, busy, phases)


def test_medians_and_every_process_are_kept() -> None:
    found = start.summary([timing(1.0), timing(5.0, busy=1.5), timing(2.0)])
    assert (found["to_step_1"], found["cpu_to_step_1"], found["cpu"]) == (18.0, 20.0, 40.0)
    assert found["before_step_1"] == 2.0 * len(clock.PREPARING)
    assert found["phases"] == {name: [2.0, 4.0] for name in clock.WHAT}
    assert [one["busy"] for one in found["processes"]] == [0.0, 1.5, 0.0]


def test_a_version_that_counts_no_phases_is_timed_from_outside() -> None:
    found = start.summary([start.Timing(3.0, 2.0, 4.0, 0.0)])
    assert (found["to_step_1"], found["before_step_1"], found["phases"]) == (3.0, None, {})


@pytest.mark.full
def test_a_process_is_timed(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    case = start.Case(model_folder, data_file, 1)
    one = start.timed(case, start.SRC, tmp_path / "cache", tmp_path / "run")
    assert list(one.phases) == list(clock.WHAT)
    assert 0 < one.before < one.to_step_1  # which has the step, too
    assert 0 < one.cpu_to_step_1 < one.cpu
