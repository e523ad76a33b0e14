"""`fitune doctor` on a GPU: what is asked of one is behind a seam, so that none need be here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from fitune.cli import main as cli
from fitune.commands import doctor
from fitune.core.results import Check
from fitune.engine import environment
from fitune.memory import gpu
from fitune.views.terminal import doctor_table

GIB = 2**30
THERE = {"flash": None, "efficient": None, "cuDNN": None, "math": None, gpu.ONE_CALL: None}


class Fake(gpu.Card):
    """An H100 with a neighbour; `broken` names what fails."""

    def __init__(self, number: int = 0, broken: tuple[str, ...] = (), **values: Any) -> None:
        super().__init__(number)
        self.asked: list[tuple[str, float]] = []
        self.values: dict[str, Any] = {
            "name": "NVIDIA H100 80GB HBM3",
            "capability": (9, 0),
            "versions": {"driver": "570.1", "CUDA": "13.0", "cuDNN": "91500"},
            "memory": (60 * GIB, 80 * GIB),
            "holders": [gpu.Holder(4711, "python", 19 * GIB), gpu.Holder(os.getpid(), "python", GIB)],
            "attention": THERE,
            "default_attention": "cuDNN",
            "bitsandbytes": ("libbitsandbytes_cuda130.so", True),
            **values,
        }
        for name, value in self.values.items():
            setattr(self, name, lambda name=name, value=value: self.answer(name, value, broken))
        self.broken = broken

    def answer(self, name: str, value: Any, broken: tuple[str, ...]) -> Any:
        if name in broken:
            raise RuntimeError(f"no {name} today\nand a second line")
        return value

    def product_rate(self, dtype: torch.dtype, seconds: float) -> float:
        self.asked.append((str(dtype), seconds))
        return self.answer("product_rate", 612.3 if dtype != torch.float32 else 51.2, self.broken)

    def copy_rate(self, way: gpu.Way, seconds: float) -> float:
        self.asked.append((way, seconds))
        return self.answer("copy_rate", 55e9 if way == "host to device" else 2_700e9, self.broken)


def examined(monkeypatch: pytest.MonkeyPatch, *cards: gpu.Card) -> dict[str, Check]:
    monkeypatch.setattr(gpu, "cards", lambda: list(cards))
    assert list(doctor._rates()) == []  # the CPU's are no matter then
    return {check.name: check for check in doctor._devices()}


def test_what_a_gpu_has_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Fake()
    found = examined(monkeypatch, card)
    assert {name: check.text for name, check in found.items()} == {
        "gpu 0": "NVIDIA H100 80GB HBM3, compute capability 9.0, driver 570.1, CUDA 13.0, cuDNN 91500",
        "gpu 0 memory": "60.0 of 80.0 GiB free; held by python (pid 4711) 19.0 GiB, this process 1.0 GiB",
        "gpu 0 bf16": "in hardware",
        "gpu 0 attention": "there: flash, efficient, cuDNN, math, flash over documents; torch's default: cuDNN, "
        "which fitune does not take; a flat batch: one call",
        "gpu 0 bitsandbytes": "libbitsandbytes_cuda130.so",
        "gpu 0 products": "612.3 TFLOP/s in bfloat16 (62% of the data sheet's 989), 51.2 in float32",
        "gpu 0 copies": "host to device 55.0 GB/s; on the device 2,700 GB/s (81% of the data sheet's)",
    }
    assert {check.level for check in found.values()} == {"ok"}
    assert sum(seconds for _, seconds in card.asked) == 3
    assert list(examined(monkeypatch, Fake(), Fake(1)))[7] == "gpu 1"


def test_an_old_gpu_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {**THERE, "flash": "needs 8.0", "cuDNN": "needs 8.0", gpu.ONE_CALL: "7.5 is below 8.0"}
    card = Fake(name="Tesla T4", capability=(7, 5), attention=lacking, default_attention="efficient", holders=[])
    found = examined(monkeypatch, card)
    assert found["gpu 0 bf16"].level == "warn"
    assert "fp16" in found["gpu 0 bf16"].fix
    assert found["gpu 0 attention"].level == "ok"
    assert "not there: flash (needs 8.0); cuDNN (needs 8.0)" in found["gpu 0 attention"].text
    assert found["gpu 0 attention"].text.endswith("torch's default: efficient; a flat batch: a call for each document")
    assert found["gpu 0 memory"].text.endswith("; the driver lists no process")
    assert "float16" in found["gpu 0 products"].text
    assert card.asked[0][0] == "torch.float16"
    of_cpu = examined(monkeypatch, Fake(bitsandbytes=("libbitsandbytes_cpu.so", False)))["gpu 0 bitsandbytes"]
    assert (of_cpu.level, of_cpu.text) == ("broken", "libbitsandbytes_cpu.so, which knows no GPU")
    newer = examined(monkeypatch, Fake(attention=lacking))["gpu 0 attention"]
    assert newer.level == "warn"  # this one should have flash


PROBES = (
    "name", "capability", "versions", "memory", "holders", "attention", "default_attention", "bitsandbytes",
    "product_rate", "copy_rate",
)  # fmt: skip


def test_a_probe_that_fails_prints_its_reason_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in PROBES:
        found = examined(monkeypatch, Fake(broken=(broken,)))
        assert len(found) == 7
        named = [check for check in found.values() if f"no {broken} today" in check.text]
        assert named
        assert all("\n" not in check.text for check in named)
    found = examined(monkeypatch, Fake(broken=PROBES))
    assert found["gpu 0"].level == found["gpu 0 products"].level == "broken"
    assert "nvidia-smi" in found["gpu 0"].fix
    assert found["gpu 0 attention"].text == "cannot be found out: RuntimeError: no attention today and a second line"


def test_doctor_is_printed_in_80_columns_and_as_json(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "cards", lambda: [Fake(broken=("holders",))])
    for name in ("_versions", "_load", "_bitsandbytes", "_bf16"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
        getattr(doctor, name).__name__ = name
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(doctor_table(doctor.doctor()))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("TFLOP/s in bfloat16" in line for line in lines)
    monkeypatch.setattr(sys, "argv", ["fitune", "doctor", "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    assert {"name": "gpu 0 bf16", "level": "ok", "text": "in hardware", "fix": ""} in result["checks"]


# ---- the questions themselves ----


def test_who_holds_memory_by_torch_or_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = gpu.Card(0)
    lines = f"GPU:0\nprocess {os.getpid():>10d} uses     1400.000 MB GPU memory"
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: lines)
    assert [str(one) for one in card.holders()] == ["this process 1.4 GiB"]
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: "GPU:0\nno processes are running")
    assert card.holders() == []
    monkeypatch.setattr(torch.cuda, "list_gpu_processes", lambda device: "pynvml module not found, please install")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2-3"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="neither nvidia-ml-py nor nvidia-smi"):
        card.holders()
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$2" = "--id=GPU-1-2-3" ] || exit 9\necho "2147483647, 2048"; echo "1, [N/A]"\n')
    tool.chmod(0o755)
    if os.name == "posix":
        first, second = card.holders()
        assert (first.pid, first.name, first.bytes) == (2147483647, "another process", 2 * GIB)
        assert (second.pid, second.bytes) == (1, None)
        tool.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
        with pytest.raises(RuntimeError, match="nvidia-smi: no driver"):
            card.holders()
        tool.write_text("#!/bin/sh\necho 570.86.10\n")
        monkeypatch.setattr(environment, "driver", lambda: None)
        assert gpu.driver() == "570.86.10"


def test_kernels_of_attention_are_tried_and_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same questions, asked of a CPU: what has no kernel there says so."""
    card = gpu.Card(0)
    card.device = torch.device("cpu")
    monkeypatch.setattr(gpu.Card, "capability", lambda self: (8, 0))
    found = card.attention()
    assert found["flash"] is None
    assert found["math"] is None
    assert found["cuDNN"]
    assert found[gpu.ONE_CALL] == "not on a CUDA GPU"
    assert card.default_attention() == "flash"
    assert gpu.refused(lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gpu, "SIZE", 64)
    monkeypatch.setattr(gpu, "COPIED", 4096)
    assert card.product_rate(torch.float32, 0.0) > 0
    assert card.copy_rate("device to device", 0.0) > 0
    assert card.bitsandbytes()[0].startswith("libbitsandbytes_")


def test_a_library_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", SimpleNamespace(formatted_error="CUDA 14 needs\n a newer one"))
    with pytest.raises(RuntimeError, match="CUDA 14 needs a newer one"):
        gpu.Card(0).bitsandbytes()


@pytest.mark.cuda
def test_on_a_gpu_every_probe_answers() -> None:
    found = list(doctor._devices())
    assert len(found) == 7 * torch.cuda.device_count()
    assert not [check for check in found if check.level == "broken" or "cannot be found out" in check.text]
