"""`fitune train --workers 2`: real processes, one of which dies, is stopped, or loses its parent."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fitune
from fitune.commands import demo, workers
from fitune.core import processor
from support import command, runs, tiny

PATIENCE = 300.0  # seconds, on a busy machine
SOON = 30.0  # seconds in which the others end
MANY, FEW = 300, 12  # steps of a run that is stopped, and of one that ends


def start(place: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    """A run of two processes."""
    model, data = place / "llama", place / "rows.jsonl"
    if not model.exists():
        tiny.save("llama", model)
        tiny.write_rows(data, 40)
    new = "--resume" not in more
    given = (*(("--model", model) if new else ()), *(("--data", data) if new and "--data" not in more else ()))
    typed = ("train", *given, "--output", output, "--workers", 2, *more)
    return subprocess.Popen(
        [sys.executable, "-m", "fitune", *map(str, typed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def short(steps: int) -> tuple[object, ...]:
    return (
        "--max-steps",
        steps,
        "--eval-every",
        4,
        "--sample-prompts",
        0,
        "--precision",
        "fp32",
        "--lora.dropout",
        0.2,
    )


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(output: Path) -> int:
    file = output / "steps.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def _further(output: Path, than: int) -> bool:
    return steps(output) > than


def of_rank(process: subprocess.Popen[str], rank: int) -> int:
    """The id of one of the processes that this one started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return next(
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.mark.full
def test_where_a_process_is_killed_the_others_end_soon_and_it_is_named(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(tmp_path, output, *short(MANY))
    until(lambda: steps(output) > 4, process)
    os.kill(of_rank(process, 1), signal.SIGKILL)
    out, _ = process.communicate(timeout=SOON)
    assert process.returncode, out
    assert "process 1 of this run was killed by signal 9" in out
    assert "process 1 of this run is gone" in out
    assert "rank-1.log ends with" in out
    assert re.search(r"  step \d+\n", out)  # what it wrote last
    assert "--resume" in out


@pytest.mark.full
def test_a_message_of_process_0_ends_the_others_with_its_exit_code(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "llama")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    process = start(tmp_path, tmp_path / "run")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, out
    assert "rows.jsonl" in out
    assert "process 1" not in out  # it was only waiting


@pytest.mark.parametrize("count", [0, -1, 65])
def test_the_number_of_processes_is_checked(
    count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command.run(["train", "--workers", count], capsys, monkeypatch)
    assert code == 2
    assert "--workers: 1 to 64 processes" in err


def test_gpus_that_are_not_there_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for given in ("3", "0", "-1", "many"):
        code, _, err = command.run(["train", f"--gpus={given}"], capsys, monkeypatch)
        assert code == 2
        assert "1 to 2 GPUs" in err
    code, _, err = command.run(["train", "--gpus", "2", "--workers", "2"], capsys, monkeypatch)
    assert code == 2
    assert "without --workers" in err


@pytest.mark.full
@pytest.mark.parametrize("way", ["replicate", "shard"])
def test_a_killed_run_goes_on_to_the_same_bits(way: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = (*short(FEW), "--parallel", way)
    process = start(tmp_path, whole, *settings)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    for rank in (0, 1):
        process = start(tmp_path, killed, *settings) if rank == 0 else start(tmp_path, killed, "--resume")
        until(partial(_further, killed, steps(killed) + 1), process)
        os.kill(of_rank(process, rank), signal.SIGKILL)
        process.communicate(timeout=SOON)
        assert process.returncode
    process = start(tmp_path, killed, "--resume")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert runs.digest(whole) == runs.digest(killed)


@pytest.mark.full
@pytest.mark.parametrize(
    ("stop", "objective"), [(signal.SIGTERM, "sft"), (signal.SIGINT, "sft"), (signal.SIGTERM, "kto")]
)
def test_a_signal_stops_all_of_them_behind_a_checkpoint(stop: signal.Signals, objective: str, tmp_path: Path) -> None:
    """Those that make steps of KTO hear of it in the sums before a step, not in those of its losses."""
    output = tmp_path / "run"
    data = ("--data", demo.bundled() / "data" / "pairs.jsonl") if objective == "kto" else ()
    process = start(tmp_path, output, *short(MANY), "--objective", objective, *data)
    until(lambda: steps(output) > 2, process)
    process.send_signal(stop)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, out
    assert "saved. Resume with" in out


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fitune")


@pytest.mark.full
def test_under_torchrun_all_leave_behind_the_same_step(tmp_path: Path) -> None:
    output = tmp_path / "run"
    start(tmp_path, output, "--max-steps", 0).communicate(timeout=PATIENCE)  # refused: it makes the model and the rows
    typed = (*TORCHRUN, "train", "--model", tmp_path / "llama", "--data", tmp_path / "rows.jsonl", "--output", output)
    process = subprocess.Popen(
        [*map(str, typed), *map(str, short(MANY))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: steps(output) > 2, process)
    process.send_signal(signal.SIGTERM)  # the launcher sends it to both
    out, _ = process.communicate(timeout=PATIENCE)
    assert "saved. Resume with" in out
    done = steps(output)
    assert (output / "checkpoints" / f"step-{done:06d}").is_dir()
    for rank in (0, 1):
        made = (output / "logs" / f"rank-{rank}.log").read_text(encoding="utf-8").split()
        assert int(made[-1]) - done in (0, 1)  # the exchange in which the others learn of it counts as a step


@pytest.mark.full
def test_under_torchrun_a_finished_run_ends_for_all(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(tmp_path, output, *short(FEW))
    assert process.wait(PATIENCE) == 0
    done = subprocess.run(
        [*map(str, (*TORCHRUN, "train", "--resume", "--output", output))],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this run is finished" in done.stdout + done.stderr


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_sixty_kills_of_random_processes_end_well() -> None:
    script = Path(__file__).parents[2] / "scripts" / "kill_ranks.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "60"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.full
def test_where_the_command_itself_is_killed_the_run_saves_and_ends(tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(tmp_path, output, *short(MANY))
    until(lambda: steps(output) > 2, process)
    ids = [of_rank(process, rank) for rank in (0, 1)]
    process.kill()
    out, _ = process.communicate(timeout=PATIENCE)  # process 0 has the same terminal: it ends when that one does
    assert "saved. Resume with" in out
    end = time.monotonic() + SOON
    while any(Path(f"/proc/{one}").exists() for one in ids) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{one}").exists() for one in ids)


def in_place_of_fitune(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """The processes run this Python code, not the command."""
    start = subprocess.Popen

    def other(command: list[str], **more: Any) -> Any:
        return start([sys.executable, "-c", code], **more)

    monkeypatch.setattr(subprocess, "Popen", other)


HALF = "import os, sys, time; rank = os.environ['RANK']"  # what each of them begins with


@pytest.mark.parametrize(
    ("code", "ended", "heard"),
    [
        ("sys.exit(0)", 0, ""),
        ("rank == '1' and time.sleep(60)", 0, ""),  # process 0 had nothing to do, and the other waits for it
        ("sys.exit(3 if rank == '0' else 0)", 3, ""),
        (
            "print('the last words'); sys.exit(7 if rank == '1' else 0)",
            7,
            "process 1 of this run ended with exit code 7",
        ),
        (
            "rank == '1' and os.kill(os.getpid(), 9); time.sleep(0.1); sys.exit(2)",
            2,
            "process 1 of this run was killed by",
        ),
        ("rank == '1' and sys.exit(5); time.sleep(60)", 1, "process 1 of this run ended with exit code 5"),
    ],
)
def test_how_the_others_end(
    code: str, ended: int, heard: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_fitune(monkeypatch, f"{HALF}; {code}")
    monkeypatch.setattr(workers, "GRACE", 0.5)
    monkeypatch.setattr(workers, "DONE", 0.5)
    began = time.monotonic()
    assert workers.launch(2, ["train"]) == ended
    assert time.monotonic() - began < SOON
    err = capfd.readouterr().err
    assert heard in err
    assert ("the last words" in err) == ("last words" in code)


def test_a_signal_goes_to_process_0_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = "\nfor _ in range(200):\n    time.sleep(0.05)\n    os.path.exists(place) and sys.exit(0)\nsys.exit(1)"
    place = f"place = {str(tmp_path / 'saved')!r}; import signal"
    code = f"{place}; signal.signal(signal.SIGTERM, lambda *_: open(place, 'w'))"
    in_place_of_fitune(monkeypatch, f"{HALF}; {code} if rank == '0' else None{wait}")
    threading.Timer(1.5, lambda: signal.raise_signal(signal.SIGTERM)).start()
    assert workers.launch(2, ["train"]) == 0
    assert (tmp_path / "saved").exists()


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cores", lambda: 7)
    assert workers._shared(2)["OMP_NUM_THREADS"] == "3"
    assert workers._shared(9)["OMP_NUM_THREADS"] == "1"


@pytest.mark.full
@pytest.mark.parametrize("more", [("--method", "full"), ("--method", "lora"), ("--method", "lora", "--quant", "nf4")])
def test_a_run_in_shards_ends_with_what_it_trained(more: tuple[str, ...], tmp_path: Path) -> None:
    """Never whole again, also for the best weights, the answers, and what is saved: which has the loss that was
    measured."""
    output, held_out = tmp_path / "run", tiny.write_rows(tmp_path / "held_out.jsonl", 6)
    given = ("--max-steps", 6, "--eval-every", 2, "--sample-prompts", 2, "--precision", "fp32", "--final", "best")
    process = start(tmp_path, output, *given, "--eval-data", held_out, "--lr", "3e-2", "--parallel", "shard", *more)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    (check,) = [one for one in read(output / "checks.json") if one["rule"] == "saved-complete"]
    assert "equal bit for bit" in check["text"]
    assert [one["after"] for one in read(output / "answers.json")]
    loss = fitune.evaluate(str(output), str(held_out)).scores.loss
    assert loss == pytest.approx(read(output / "result.json")["held_out_loss_after"], rel=1e-6)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.full
def test_a_mixture_in_shards_ends_with_its_routers_load(tmp_path: Path) -> None:
    """Its blocks are gathered once more for that, behind what is saved."""
    tiny.save("qwen3_moe", tmp_path / "llama")
    tiny.write_rows(tmp_path / "rows.jsonl", 40)
    given = ("--max-steps", 3, "--sample-prompts", 0, "--precision", "fp32", "--method", "full")
    process = start(tmp_path, tmp_path / "run", *given, "--parallel", "shard")
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert [one["rule"] for one in read(tmp_path / "run" / "checks.json")].count("router-load") == 1
