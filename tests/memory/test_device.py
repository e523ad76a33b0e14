"""A GPU's budget is what other processes leave of it; the seam is torch.cuda, since no GPU need be here."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fitune.core.errors import ModelError
from fitune.memory import calibration, device
from fitune.models import load

MIB = 2**20


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """GPU 0 is full of another process, GPU 1 has 20,000 of 24,000 MiB free; this process holds 1,000 MiB there."""
    free = {0: 100 * MIB, 1: 20_000 * MIB}

    def index(which: Any) -> int:
        return torch.device(which).index or 0 if isinstance(which, (str, torch.device)) else int(which or 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which=None: (free[index(which)], 24_000 * MIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda which=None: f"GPU {index(which)}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which=None: (8, 6))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda which=None: SimpleNamespace(multi_processor_count=84)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda which=None: 1_000 * MIB if index(which) else 0)
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda which=None: "no library")
    return free


def test_a_plan_for_the_second_gpu_asks_the_second_gpu(two_gpus: dict[int, int]) -> None:
    assert device.here("cuda:1").name == "GPU 1"
    assert device.here("cuda").name == device.here().name == "GPU 0"
    assert device.here("cuda").budget == 100 * MIB
    assert device.here("cuda:1").multiprocessors == 84


def test_the_budget_is_the_whole_but_for_other_processes(
    two_gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 3,400 MiB of others: what is free, what torch holds, and the context where the driver says what it takes."""
    assert device.here("cuda:1").budget == 21_000 * MIB
    mine = "\n".join(
        f"process {pid:>10d} uses {mib:>12.3f} MB GPU memory" for pid, mib in ((1, 2400), (os.getpid(), 1600))
    )
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda which=None: mine)
    assert device.here("cuda:1").budget == 21_600 * MIB
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda which=None: 1 / 0)  # as where the driver fails
    assert device.here("cuda:1").budget == 21_000 * MIB


def test_the_steps_of_a_calibration_are_those_of_a_run() -> None:
    calibration.small_steps(torch.device("cpu"))


@pytest.mark.cuda
def test_on_a_gpu_a_calibration_measures_a_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path))
    found = calibration.calibrate("2026-01-02")
    assert 100 * MIB < found["context"] < 2_000 * MIB
    assert found["workspace"] == device.WORKSPACE


def test_what_a_run_took_is_counted_as_its_plan_counts_it(
    two_gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is in both: as the driver says, or as supposed where it says nothing."""
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda which=None: 3_000 * MIB)
    gpu = torch.device("cuda:1")
    supposed = device.calibration("GPU 1").context / MIB
    assert device.peak_taken_mib(gpu) == 3_000 + supposed
    mine = f"process {os.getpid():>10d} uses     1400.000 MB GPU memory"
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda which=None: mine)
    assert device.peak_taken_mib(gpu) == 3_400


def test_the_peak_of_a_gpu_is_forgotten_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks before it took is no part of what the run is said to have taken."""
    from fitune.memory import forget_peak

    seen: list[object] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    forget_peak(torch.device("cuda", 1))
    assert seen == [torch.device("cuda", 1)]


def test_a_run_on_the_second_gpu_is_planned_there(two_gpus: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fitune.commands import prepare
    from fitune.commands.request import Request
    from fitune.core.config import build
    from fitune.memory import plan as plans

    places: list[device.Device] = []
    made: Any = SimpleNamespace(fits=True)
    monkeypatch.setattr(plans, "plan", lambda work, where, **how: places.append(where) or made)
    monkeypatch.setattr(prepare, "pick_device", torch.device)
    config = build({"model": "m", "data": ["d"], "device": "cuda:1"})
    nothing: Any = None  # what the plan stands in for looks at no model and no work
    assert prepare._planned(Request(config, nothing, None, "m", device.here("cuda:1")), nothing) is made
    assert [where.name for where in places] == ["GPU 1"]


def test_a_plain_model_goes_to_a_gpu_tensor_by_tensor(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through main memory: transformers is given the device, before it reads."""
    seen: list[dict] = []

    def read(path: Any, config: Any, how: Any, kind: Any) -> Any:
        seen.append(dict(how))
        raise RuntimeError("far enough")

    monkeypatch.setattr(load, "_read", read)
    places: list[Any] = [torch.device("cuda:1"), torch.device("cpu")]
    for where in places:
        with pytest.raises(ModelError, match="cannot be loaded"):
            load.load_model(model_folder, device=where)
    assert seen[0]["device_map"] == {"": torch.device("cuda:1")}
    assert "device_map" not in seen[1]
