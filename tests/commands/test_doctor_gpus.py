"""`fitune doctor --gpus`, without the processes: what is said of GPUs that are not there, and of a wrong sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed

from fitune.commands import doctor_gpus
from fitune.engine.parallel import World
from support import command

pytestmark = pytest.mark.unit


def examined(monkeypatch: pytest.MonkeyPatch, reduce: Any) -> dict[str, Any]:
    class Two(World):
        def connect(self, device: torch.device, minutes: float = 10.0) -> None:
            assert device.type == "cpu"

        def added(self, numbers: torch.Tensor) -> torch.Tensor:
            return numbers

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(distributed, "all_reduce", reduce)
    return {check.name: check for check in doctor_gpus.examine(Two(0, 2), 0.05)}


def test_a_rate_is_of_gloo_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, lambda tensor: tensor.fill_(3.0))
    assert found["nccl"].text == "not looked for: there is no GPU here"
    assert "peer access" not in found
    assert found["all-reduce"].level == "ok"
    assert "no GPU took part" in found["all-reduce"].text


def test_a_wrong_sum_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(monkeypatch, lambda tensor: tensor)["all-reduce"].level == "broken"


def test_gpus_that_do_not_reach_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a == 0)
    (check,) = doctor_gpus._peers()
    assert check.level == "warn"
    assert "1 and 0" in check.text
    assert "0 and 1" not in check.text


def test_the_number_of_processes_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command.run(["doctor", "--gpus", "--workers", 1], capsys, monkeypatch)
    assert code == 2
    assert "2 to 64 processes" in err
