"""Whole runs on a tiny random model: the folder, resume, kills, interrupts, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fitune
from fitune.commands.train import resume_config, train
from fitune.core import files
from fitune.core.config import build
from fitune.core.errors import ConfigError, Interrupted, ModelError, RunFolderError, TrainingError
from fitune.core.files import MANIFEST, TEMPORARY, is_whole, sha256
from fitune.core.records import Finding
from fitune.engine.checkpoint import RunFolder
from support import tiny
from support.command import run as command
from support.stops import Crash, StopAt, crash

STEPS = {"max_steps": 12, "batch_size": 4, "save_every": 3, "eval_every": 4, "lr": 1e-2, "sample_prompts": 1,
         "sample_tokens": 4}  # fmt: skip
DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict:
    return {"model": str(model), "data": [str(data)], "output": str(output), **STEPS, **DROPOUT, **changes}


def losses(run: Path) -> list[tuple]:
    return [(r.step, r.loss, r.lr, r.grad_norm, r.held_out_loss) for r in RunFolder(run).read_steps()]


def digest(run: Path) -> str:
    return sha256(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def unbroken(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    data = tiny.write_rows(folder / "rows.jsonl", 40)
    train(build(settings(model_folder, data, folder / "run")))
    return folder / "run"


@pytest.fixture
def data(unbroken: Path) -> Path:
    return unbroken.parent / "rows.jsonl"


@pytest.fixture(scope="module")
def crashed(unbroken: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that ended inside its seventh step, as it was left."""
    folder = tmp_path_factory.mktemp("crashed")
    config = build(settings(model_folder, unbroken.parent / "rows.jsonl", folder / "run"))
    with pytest.raises(Crash):
        train(config, watch=StopAt(7, crash))
    (folder / "run").rename(folder / "kept")
    return folder


@pytest.fixture
def stopped(crashed: Path) -> Path:
    """That run in its place, for a test of its own."""
    shutil.rmtree(crashed / "run", ignore_errors=True)
    return Path(shutil.copytree(crashed / "kept", crashed / "run"))


def test_the_run_folder_stands_alone(unbroken: Path) -> None:
    names = {path.name for path in unbroken.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "template.json", "plan.json", "data.json", "before.json", "tokenizer",
        "steps.jsonl", "checkpoints", "adapter", "answers.json", "result.json", "report.html", "checks.json",
        "plan.html", "measured.json", "seal.json",
    }  # fmt: skip
    result = json.loads((unbroken / "result.json").read_text())
    assert result["steps"] == 12
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    page = (unbroken / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert not re.search(r"<script[^>]*src|<link|<img|@import|url\(|src=", page)  # nothing is fetched from elsewhere
    assert not [path for path in unbroken.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_newest_and_the_best_checkpoints_are_kept(unbroken: Path) -> None:
    records = RunFolder(unbroken).read_steps()
    _, best = min((r.held_out_loss, r.step) for r in records if r.held_out_loss is not None)
    kept = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert set(kept) == {"step-000009", "step-000012", f"step-{best:06d}"}
    assert all(is_whole(path) for path in (unbroken / "checkpoints").iterdir())


def test_the_same_settings_give_the_same_bits(unbroken: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    train(build(settings(model_folder, data, tmp_path / "run")))
    assert digest(tmp_path / "run") == digest(unbroken)
    assert losses(tmp_path / "run") == losses(unbroken)
    train(build(settings(model_folder, data, tmp_path / "other", seed=1)))
    assert digest(tmp_path / "other") != digest(unbroken)


def test_a_resumed_run_equals_the_unbroken_one(unbroken: Path, stopped: Path) -> None:
    torch.manual_seed(999)  # whatever happened in between
    train(resume_config(str(stopped), {}), resume=True)
    assert digest(stopped) == digest(unbroken)
    assert losses(stopped) == losses(unbroken)


@pytest.mark.parametrize("step", [1, *(pytest.param(step, marks=pytest.mark.full) for step in (3, 11))])
def test_so_does_one_that_ended_at_another_step(
    unbroken: Path, model_folder: Path, data: Path, tmp_path: Path, step: int
) -> None:
    config = build(settings(model_folder, data, tmp_path / "run"))
    with pytest.raises(Crash):
        train(config, watch=StopAt(step, crash))
    torch.manual_seed(999)  # whatever happened in between
    train(resume_config(str(tmp_path / "run"), {}), resume=True)
    assert digest(tmp_path / "run") == digest(unbroken)
    assert losses(tmp_path / "run") == losses(unbroken)


@pytest.mark.parametrize("fault", ["optim.load_state", "restore_rng"])
def test_a_resume_that_forgets_the_optimizer_or_the_rng_is_refused(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(f"fitune.commands.resuming.{fault}", lambda *args: None)
    with pytest.raises(TrainingError, match=r"resume-exact: (optimizer states|random numbers) are not those"):
        train(resume_config(str(stopped), {}), resume=True)
    assert not (stopped / "adapter").exists()


def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(
    unbroken: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Crash):
        train(build(settings(model_folder, data, run)), watch=StopAt(8, crash))
    newest = RunFolder(run).whole_checkpoints()[0]
    with (newest / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    (run / "checkpoints" / "step-000099").mkdir()  # half written: no manifest
    (run / "steps.jsonl").open("a").write('{"step": 9, "lo')
    assert newest not in RunFolder(run).whole_checkpoints()
    (run / "checkpoints" / "step-000099").rmdir()
    train(resume_config(str(run), {}), resume=True)
    assert digest(run) == digest(unbroken)


def test_resume_keeps_its_settings_and_its_data(unbroken: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(data.read_bytes())
    with pytest.raises(Crash):
        train(build(settings(model_folder, rows, run)), watch=StopAt(7, crash))
    with pytest.raises(ConfigError, match=r"seed 7 \(the run has 42\)"):
        resume_config(str(run), {"seed": 7})
    with pytest.raises(ConfigError, match="lora rank=2"):
        resume_config(str(run), {"lora": {"rank": 2}})
    same = {"seed": 42, "lora": {"rank": 4}, "take": [], "model": str(model_folder)}
    assert resume_config(str(run), same) == resume_config(str(run), {})
    with pytest.raises(ModelError, match="elsewhere: no such folder"):
        resume_config(str(run), {"model": "elsewhere"})
    rows.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunFolderError, match="the data files changed"):
        train(resume_config(str(run), {}), resume=True)


def test_nothing_of_the_user_is_overwritten(unbroken: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty"):
        train(build(settings(model_folder, data, tmp_path / "mine")))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    again = train(resume_config(str(unbroken), {}), resume=True)
    assert again.steps == 12


def test_a_signal_saves_and_the_run_goes_on(unbroken: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C, and the other one after it has gone on."""
    run = tmp_path / "run"
    config = build(settings(model_folder, data, run))
    for step, number in ((5, signal.SIGINT), (8, signal.SIGTERM)):
        stop = StopAt(step, partial(signal.raise_signal, number))
        with pytest.raises(Interrupted) as caught:
            train(config, watch=stop, resume=step > 5)
        assert caught.value.exit_code == 130
        text = f"stopped after step {step} of 12, saved. Resume with: fitune train --resume --output {run}"
        assert str(caught.value) == text
        config = resume_config(str(run), {})
    train(config, resume=True)
    assert digest(run) == digest(unbroken)


def test_a_second_signal_stops_at_once_and_the_run_goes_on(
    unbroken: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    class Twice(StopAt):
        """The second one comes while what the first one asked for is going on."""

        def stopping(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train(build(settings(model_folder, data, run)), watch=Twice(5, lambda: signal.raise_signal(signal.SIGINT)))
    assert caught.value.exit_code == 130
    text = "stopped at once, last checkpoint: step-000004. Resume with: fitune train --resume --output"
    assert str(caught.value) == f"{text} {run}"
    train(resume_config(str(run), {}), resume=True)
    assert digest(run) == digest(unbroken)


@pytest.mark.full  # a process more; the quick run has kills of forked ones (scripts/test_torture.py)
def test_a_killed_process_resumes_to_the_same_bits(
    unbroken: Path, model_folder: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(model_folder, data, run)))
    command = [sys.executable, "-m", "fitune", "train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(RunFolder(run).read_steps()) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(RunFolder(run).read_steps()) < 12
    assert train(resume_config(str(run), {}), resume=True).steps == 12
    assert digest(run) == digest(unbroken)
    assert losses(run) == losses(unbroken)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_while_saving_keeps_the_checkpoint_before(
    unbroken: Path, model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The operating system itself refuses the write in the middle of the second save."""
    import resource

    run = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(model_folder, data, run)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(tensors: Any, path: Path) -> None:
        if "step-000006" in str(path) and "optimizer" in str(path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        save_file(tensors, path)

    try:
        with monkeypatch.context() as patch:
            patch.setattr("fitune.engine.checkpoint.save_file", limited)
            code, _, error = command(["train", "--config", config], capsys, patch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert "Traceback" not in error
    assert "--resume" in error
    assert [path.name for path in RunFolder(run).whole_checkpoints()] == ["step-000004", "step-000003"]
    assert not list((run / "checkpoints").glob(f"{TEMPORARY}*"))
    train(resume_config(str(run), {}), resume=True)
    assert digest(run) == digest(unbroken)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small disk needs root on Linux")
def test_a_really_full_disk(model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another program filled it after the start, where the check of the disk's space would have refused."""
    monkeypatch.setattr("fitune.commands.prepare._disk_space", lambda *_: Finding("disk-space", "ok", ""))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        config = build(settings(model_folder, data, disk / "run", lora={"rank": 64, "targets": "all-linear"}))
        with pytest.raises(RunFolderError, match="the disk is full"):
            train(config)
        RunFolder(disk / "run").whole_checkpoints()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_optimizer_state_goes_through_files_unchanged(tmp_path: Path) -> None:
    from fitune.engine import optim

    torch.manual_seed(0)
    config = build({"model": "m", "data": ["d"], "weight_decay": 0.1})
    named = {"w": torch.nn.Parameter(torch.randn(3, 3)), "b": torch.nn.Parameter(torch.randn(3))}
    optimizer = optim.make(named, config)
    for p in named.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    path = folder.save(3, named, optimizer, {"best": (1, 2.0)})
    assert (path / MANIFEST).is_file()
    loaded = folder.load(path)
    other = optim.make(named, config)
    optim.load_state(other, named, loaded.optimizer, loaded.optimizer_scalars)
    before, after = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, state in before.items():
        assert state.keys() == after[number].keys()
        assert all(torch.equal(state[key], after[number][key]) for key in state)
    assert (loaded.step, loaded.state) == (3, {"best": [1, 2.0]})


def test_writes_are_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(RunFolderError, match="the disk is full"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_python_has_the_same_verbs(unbroken: Path, model_folder: Path, data: Path, tmp_path: Path) -> None:
    result = fitune.train(**settings(model_folder, data, tmp_path / "run", max_steps=2))
    assert result.steps == 2
    tuned = fitune.load(unbroken)
    greedy = fitune.generate(tuned, "what is 1 plus 1?", max_new_tokens=8)
    assert greedy == fitune.generate(
        str(unbroken), [{"role": "user", "content": "what is 1 plus 1?"}], max_new_tokens=8
    )
    base = fitune.generate(tuned, "what is 1 plus 1?", max_new_tokens=8, base=True)
    assert base == fitune.generate(fitune.load(model_folder), "what is 1 plus 1?", max_new_tokens=8)
    assert base != greedy


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
def test_what_is_saved_can_be_read_by_whom_the_umask_says(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    """safetensors alone makes files that only their owner can read: a server under another name could not load them."""
    from fitune.commands.merge import merge

    given = {"model": str(model_folder), "data": [str(data_file)], "max_steps": 1, "batch_size": 2, "sample_prompts": 0}
    train(build({**given, "output": str(tmp_path / "run"), "max_length": 64, "max_lost": 1.0}))
    merge(tmp_path / "run", tmp_path / "merged")
    saved = [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "merged").rglob("*.safetensors")]
    assert len(saved) >= 4
    assert {path.stat().st_mode & 0o777 for path in saved} == {0o666 & ~files.UMASK}
