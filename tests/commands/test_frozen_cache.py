"""Runs that keep hidden states of their frozen blocks: bit for bit the same run, wherever they lie, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fitune
from fitune.checks import frozencheck
from fitune.commands.train import resume_config, train
from fitune.core.config import build
from fitune.core.errors import ConfigError, FituneError
from fitune.core.units import size_bytes
from fitune.engine.checkpoint import RunFolder
from fitune.engine.frozen_states import FrozenStates
from fitune.memory import device, frozen
from fitune.views.plan import verdict
from support.runs import Crash, CrashAt, digest

GIVEN: dict[str, Any] = {
    "method": "freeze", "freeze": {"blocks": 1}, "epochs": 3, "batch_size": 8, "save_every": 2, "val_share": 0,
    "sample_prompts": 0, "max_length": 64,
}  # fmt: skip


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "data": [str(data)], "output": str(output), **GIVEN, **changes}


def losses(run: Path) -> list[float]:
    return [record.loss for record in RunFolder(run).read_steps()]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches each run gave out of what it kept."""
    found: list[int] = []
    gathered, made = FrozenStates._gathered, FrozenStates.__init__

    def init(self: FrozenStates, *given: Any, **named: Any) -> None:
        found.append(0)
        made(self, *given, **named)

    def counted(self: FrozenStates, *given: Any) -> Any:
        there = gathered(self, *given)
        found[-1] += there is not None
        return there

    monkeypatch.setattr(FrozenStates, "__init__", init)
    monkeypatch.setattr(FrozenStates, "_gathered", counted)
    return found


def test_a_run_is_the_same_wherever_states_lie_and_when_it_is_resumed(
    model_folder: Path, data_file: Path, tmp_path: Path, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def run(name: str, **changes: Any) -> Path:
        try:
            train(build(settings(model_folder, data_file, tmp_path / name, cache=str(cache), **changes)))
        except FituneError as error:  # rows keep their bits with AVX512; elsewhere the trial decides
            if "other bits" not in str(error) or torch.backends.cpu.get_cpu_capability() == "AVX512":
                raise
            pytest.skip(str(error))
        return tmp_path / name

    off = run("off", frozen_cache="off")
    assert kept == []
    steps = len(losses(off))
    for name in ("memory", "disk"):
        there = run(name, frozen_cache=name)
        assert (losses(there), digest(there)) == (losses(off), digest(off))
        assert kept == [1, steps * 2 // 3]  # the trial's, and those of two epochs
        kept.clear()
        assert RunFolder(there).read("plan")["frozen_cache"] == name
        assert not [path for path in cache.iterdir() if path.name.startswith(".tmp-states")]
    stopped = tmp_path / "stopped"
    with pytest.raises(Crash):
        train(
            build(settings(model_folder, data_file, stopped, cache=str(cache), frozen_cache="disk")),
            watch=CrashAt(steps // 3 + 1),
        )
    monkeypatch.setattr(frozen, "_room", lambda *given: "off")  # what is free now decides nothing
    train(resume_config(str(stopped), {"frozen_cache": "auto"}), resume=True)
    assert (losses(stopped), digest(stopped)) == (losses(off), digest(off))


def test_a_plan_says_where_they_are_kept(model_folder: Path, data_file: Path) -> None:
    given = {name: value for name, value in GIVEN.items() if name != "save_every"}
    off, memory, disk, once = (
        fitune.plan(model_folder, data=data_file, **{**given, **changes})
        for changes in ({"frozen_cache": "off"}, {"frozen_cache": "memory"}, {"frozen_cache": "disk"}, {"epochs": 1})
    )
    assert off.frozen_cache == once.frozen_cache == "off"
    assert (off.frozen_bytes, off.later_work) == (0, 1.0)
    assert memory.frozen_blocks == disk.frozen_blocks > 0
    assert memory.outside[frozen.STATES] == memory.frozen_bytes == disk.frozen_bytes
    assert frozen.STATES not in disk.outside
    assert 0 < memory.later_work < 1
    assert "run once a row, what they give is kept in memory" in verdict(memory)
    assert "on the disk" in verdict(disk)
    assert "run once" not in verdict(once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "freeze": {}}, "the method lora trains something in the first block"),
        ({"epochs": 1}, "no row is met twice"),
        ({"layout": "padded"}, "the layout is padded"),
    ],
)
def test_what_would_do_nothing_is_refused(
    model_folder: Path, data_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(build(settings(model_folder, data_file, tmp_path / "run", frozen_cache="memory", **changes)))


def test_states_that_a_trial_refuses_are_not_kept(
    model_folder: Path, data_file: Path, tmp_path: Path, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozencheck, "refusal", lambda *given: "they draw random numbers (dropout)")
    with pytest.raises(FituneError, match="cannot be kept: they draw random numbers"):
        train(build(settings(model_folder, data_file, tmp_path / "asked", frozen_cache="memory")))
    train(build(settings(model_folder, data_file, tmp_path / "auto")))
    plan = RunFolder(tmp_path / "auto").read("plan")
    assert (plan["frozen_cache"], frozen.STATES in plan["outside"]) == ("off", False)
    assert kept == []


def test_auto_takes_memory_then_the_disk_then_nothing(
    model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, free = [2**40], [2**40]
    monkeypatch.setattr(device, "here", lambda kind="auto": device.Device("here", "cpu", budget[0], here=True))
    monkeypatch.setattr(frozen, "free_bytes", lambda place: free[0])
    given = {name: value for name, value in GIVEN.items() if name != "save_every"}

    def place(**changes: Any) -> str:
        return fitune.plan(model_folder, data=data_file, **{**given, **changes}).frozen_cache

    assert place() == "memory"
    budget[0] = 2**20
    assert place() == "disk"
    monkeypatch.setattr(frozen, "size_bytes", lambda text: 1000)
    assert place() == "off"
    assert place(frozen_cache="disk") == "disk"
    monkeypatch.setattr(frozen, "size_bytes", size_bytes)
    free[0] = frozen.DISK_LEFT
    assert place() == "off"
    with pytest.raises(ConfigError, match="are to stay free"):
        place(frozen_cache="disk")
