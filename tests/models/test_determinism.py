"""Switches that make a run give the same bits, put back afterwards; what has no such algorithm is found."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.engine import checkpoint, environment
from fitune.models import determinism

CPU = torch.device("cpu")
FILLING: Any = torch.utils.deterministic  # a module that makes its attribute when it is imported


def test_memory_is_not_filled_in_a_run_and_switches_come_back() -> None:
    before = torch.are_deterministic_algorithms_enabled(), FILLING.fill_uninitialized_memory
    with determinism.exact(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        determinism.strict(True)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not FILLING.fill_uninitialized_memory
        assert not torch.empty(1000, dtype=torch.float32).fill_(1).isnan().any()
    assert before == (torch.are_deterministic_algorithms_enabled(), FILLING.fill_uninitialized_memory)


def test_nothing_reads_memory_that_it_has_not_written(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """With the filling on, a run has the same losses: no value comes from memory as it was given out."""
    from fitune.commands.train import train
    from fitune.core.config import RunConfig

    def losses(fill: bool) -> list[float]:
        given: dict[str, Any] = {
            "model": str(model_folder),
            "data": [str(data_file)],
            "output": str(tmp_path / str(fill)),
        }
        config = RunConfig(**given, max_steps=3, batch_size=2, sample_prompts=0, max_length=64, max_lost=1)
        with pytest.MonkeyPatch.context() as patch:
            if fill:
                patch.setattr(determinism, "FILL", True)
            return [train(config).last_loss]

    assert losses(True) == losses(False)


def test_what_has_no_deterministic_algorithm_is_named() -> None:
    with determinism.exact(CPU):
        determinism.strict(True)
        with pytest.raises(RuntimeError) as raised:
            torch.zeros(3).put_(torch.tensor([1]), torch.tensor([1.0]))
    assert determinism.lacking(raised.value) == "put_"
    assert determinism.lacking(RuntimeError("out of memory")) is None
    assert determinism.lacking(ValueError("deterministic")) is None


def test_a_run_that_has_to_do_without_says_so_and_remembers(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted operation without a deterministic algorithm: the rehearsal meets it, and a resumed run knows."""
    from fitune.commands.train import train
    from fitune.core.config import RunConfig
    from fitune.engine.checkpoint import RunFolder
    from fitune.engine.step_runner import StepRunner

    make = StepRunner.rehearse

    def planted(*args: Any, **kwargs: Any) -> Any:
        torch.zeros(3).put_(torch.tensor([1]), torch.tensor([1.0]))
        return make(*args, **kwargs)

    monkeypatch.setattr(StepRunner, "rehearse", planted)
    given: dict[str, Any] = {"model": str(model_folder), "data": [str(data_file)], "output": str(tmp_path / "run")}
    config = RunConfig(**given, max_steps=2, batch_size=2, sample_prompts=0, max_length=64, max_lost=1)
    train(config)
    run = RunFolder(str(tmp_path / "run"))
    assert run.read("measured")["deterministic"] is False
    noted = [one for one in run.read("data")["findings"] if one["rule"] == "deterministic"]
    assert [one["level"] for one in noted] == ["warn"]
    assert "put_" in noted[0]["text"]


@pytest.mark.cuda
def test_on_a_gpu_cublas_is_configured_before_its_first_product() -> None:
    from fitune.models.devices import pick_device

    device = pick_device("cuda")
    assert os.environ[determinism.CUBLAS]
    assert device.index is not None
    with determinism.exact(device):
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_is_made_ready_before_anything_lies_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam is torch.cuda: cuBLAS reads its setting at its first product, so it is there before a GPU is taken."""
    from fitune.models import devices

    taken: list[tuple[int, str | None]] = []
    monkeypatch.delenv(determinism.CUBLAS, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: taken.append((device.index, os.environ.get(determinism.CUBLAS)))
    )
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert devices.pick_device("cuda:1") == torch.device("cuda", 1)
    assert devices.pick_device("cuda") == torch.device("cuda", 3)
    assert taken == [(1, ":4096:8"), (3, ":4096:8")]
    monkeypatch.setenv(determinism.CUBLAS, ":16:8")  # the user's own stays
    determinism.use_gpu(torch.device("cuda", 0))
    assert taken[-1] == (0, ":16:8")


def test_attention_on_a_gpu_takes_no_kernel_that_plans_for_each_length() -> None:
    here = torch.backends.cuda
    assert here.cudnn_sdp_enabled()
    with determinism.exact(torch.device("cuda", 1)):
        assert not here.cudnn_sdp_enabled()
        assert here.flash_sdp_enabled()
        assert here.mem_efficient_sdp_enabled()
        assert here.math_sdp_enabled()
    with determinism.exact(CPU):
        assert here.cudnn_sdp_enabled()
    assert here.cudnn_sdp_enabled()


def test_what_a_run_ran_on_lists_what_decides_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(environment, "driver", lambda: "580.1")
    before: dict[str, Any] = environment.describe(torch.device("cuda", 0))
    assert before["device"] == {
        "name": "NVIDIA L4", "capability": [8, 9], "cuda": "13.0", "cudnn": 91500, "driver": "580.1"
    }  # fmt: skip
    assert before["packages"]["bitsandbytes"]
    monkeypatch.setattr(environment, "driver", lambda: "590.2")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91600)
    now: dict[str, Any] = environment.describe(torch.device("cuda", 0))
    now["packages"] = {**now["packages"], "bitsandbytes": "0.1"}
    changed = environment.changes(before, now)
    assert [text.split(":")[0] for text in changed] == ["bitsandbytes", "device cudnn", "device driver"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n", "580.159.04"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.15  Build\nGCC\n", "570.86.15"),
        ("something else\n", None),
    ],
)
def test_the_drivers_version_is_read_from_both_kinds_of_kernel_module(
    text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(environment, "DRIVER_FILE", tmp_path / "version")
    assert environment.driver() == version


def test_what_changed_between_two_machines_is_named() -> None:
    before: dict[str, Any] = environment.describe(CPU)
    assert environment.changes(before, environment.describe(CPU)) == []
    gpu = {"name": "NVIDIA L4", "driver": "570.1"}
    elsewhere = {**before, "packages": {**before["packages"], "torch": "1.0.0"}, "device": gpu}
    now = torch.__version__
    assert f"torch: 1.0.0, now {now}".split("+")[0] in environment.changes(elsewhere, before)[0]
    assert "device name: NVIDIA L4, now cpu" in environment.changes(elsewhere, before)
    without_device = {key: value for key, value in before.items() if key != "device"}  # of an older version
    assert environment.changes(without_device, before) == []


def test_random_states_of_gpus_are_put_back_by_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here, so the seam is torch.cuda: ten of them, the last one in use."""
    put: list[int] = []
    states = {f"cuda{n}": torch.tensor([n]) for n in range(11)}
    cpu = {"cpu": torch.get_rng_state()}
    assert checkpoint.restore_rng(cpu)
    assert not checkpoint.restore_rng({**cpu, "cuda": torch.tensor([1])})  # of a GPU, and none is here
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 10)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([10]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: put.append(int(state)))
    assert sorted(checkpoint.rng_state()) == ["cpu", "cuda"]
    assert checkpoint.restore_rng({**cpu, **states})
    assert checkpoint.restore_rng(checkpoint.rng_state())
    assert put == [10, 10]
    assert not checkpoint.restore_rng(cpu)
