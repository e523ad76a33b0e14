"""The demo: fine-tune the bundled model on the bundled data, and show what changed.

In: nothing. Out: a run folder, and a table of held-out prompts before and after. With `--kill` it shows instead that a
run whose process is killed ends, bit for bit, as one that was left alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fitune.commands.train import resume_config, train
from fitune.core.begun import free_folder
from fitune.core.clock import Clock
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.events import Silent, Watcher
from fitune.core.files import TEMPORARY, expand, sha256
from fitune.core.results import Answered
from fitune.engine.checkpoint import RunFolder
from fitune.views import report, run_records

KILLS = 3
COMMON: dict[str, object] = {"epochs": 6.0, "batch_size": 8, "sample_prompts": 0, "seed": 42}  # whatever the method
ALL = 10_000  # held-out prompts that are answered: every one
SETTINGS: dict[str, object] = {
    "method": "lora",
    "lora": {"rank": 16, "alpha": 32.0, "targets": "all-linear"},
    "lr": 2e-3,
}


@dataclass(frozen=True)
class DemoResult:
    """Accuracies are exact match on the held-out prompts, 0 to 1."""

    base_accuracy: float
    tuned_accuracy: float
    held_out_prompts: int
    seconds: float
    peak_memory_mib: float
    expected_memory_mib: float
    run: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def bundled() -> Path:
    """The folder with the bundled `model` and `data`."""
    return Path(str(resources.files("fitune") / "bundled"))


def config(output: str | None = None, **changes: Any) -> RunConfig:
    """The demo's settings; another method comes with settings of its own."""
    method = {} if "method" in changes else SETTINGS
    return build(
        {
            "model": str(bundled() / "model"),
            "data": [str(bundled() / "data" / "train.jsonl")],
            "eval_data": [str(bundled() / "data" / "held_out.jsonl")],
            "output": output or free_folder("demo"),
            **COMMON,
            **method,
            **changes,
        }
    )


def demo(
    output: str | None = None, watch: Watcher | None = None, *, resume: bool = False, clock: Clock | None = None
) -> tuple[DemoResult, list[Answered]]:
    """Train, with the held-out prompts answered before and after; the report has these answers, resumed or not.

    Args:
        output: the run folder. Default: runs/demo-<number>.
        watch: what the run reports to.
        resume: go on with the demo in `output`.
        clock: counts the seconds of its phases; None: from now on.

    Returns:
        The figures, and a record per held-out prompt.

    Raises:
        ConfigError: resume without output.
    """
    began = time.perf_counter()
    if resume and output is None:
        raise ConfigError("--resume: which demo?", fix="add --output RUN")
    done = train(
        resume_config(str(output), {}) if resume else config(output, sample_prompts=ALL),
        watch=watch or Silent(),
        resume=resume,
        clock=clock,
    )
    table = run_records.answers_of(RunFolder(done.run))
    before, after = (report.exact_matches(table, when) for when in ("before", "after"))
    result = DemoResult(
        base_accuracy=before / max(1, len(table)),
        tuned_accuracy=after / max(1, len(table)),
        held_out_prompts=len(table),
        seconds=time.perf_counter() - began,
        peak_memory_mib=done.peak_memory_mib,
        expected_memory_mib=done.expected_memory_mib,
        run=done.run,
    )
    return result, table


# ---- killed and resumed ----


@dataclass(frozen=True)
class KillResult:
    """What `demo --kill` showed."""

    kills: int
    kills_inside_a_save: int
    unbroken_sha256: str
    resumed_sha256: str
    losses_equal: bool
    run: str

    @property
    def equal(self) -> bool:
        """Weights and losses are the unbroken run's."""
        return self.unbroken_sha256 == self.resumed_sha256 and self.losses_equal

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "equal": self.equal}


def kill_demo(output: str | None, report: Callable[[str], None]) -> KillResult:
    """Train once unbroken and once with the process killed three times, once inside a save; compare the results.

    Args:
        output: folder for both runs; must be new or empty. Default: a temporary one.
        report: called with each line for the user.

    Raises:
        RunFolderError: a run could not be finished.
    """
    root = expand(output) if output else Path(tempfile.mkdtemp(prefix="fitune-kill-"))
    changes = {"max_steps": 60, "save_every": 4, "eval_every": 30, "sample_prompts": 0}
    report("an unbroken run ...")
    unbroken = RunFolder(root / "unbroken")
    _wait(_start(config(str(unbroken.path), **changes), resume=False), unbroken)
    report(f"  final adapter {_digest(unbroken)[:16]}…")
    broken = RunFolder(root / "killed")
    inside = kills = 0
    while kills < KILLS or inside == 0:
        process = _start(config(str(broken.path), **changes), resume=kills > 0)
        in_save = _kill(process, broken, inside_save=inside == 0)
        if in_save is None:
            raise RunFolderError(f"{broken.path}: the run ended before it could be killed")
        kills, inside = kills + 1, inside + in_save
        where = "inside a save" if in_save else "between saves"
        report(f"  killed {where} after step {len(broken.read_steps())}")
    report("resumed for the last time ...")
    _wait(_start(config(str(broken.path), **changes), resume=True), broken)
    report(f"  final adapter {_digest(broken)[:16]}…")
    return KillResult(
        kills, inside, _digest(unbroken), _digest(broken), _losses(unbroken) == _losses(broken), str(root)
    )


def _start(settings: RunConfig, *, resume: bool) -> subprocess.Popen[bytes]:
    """A training in a process of its own."""
    RunFolder(str(settings.output)).path.parent.mkdir(parents=True, exist_ok=True)
    if resume:
        command = [sys.executable, "-m", "fitune", "train", "--resume", "--output", str(settings.output)]
    else:
        values = settings.model_dump(mode="json")
        handle, name = tempfile.mkstemp(suffix=".yaml", prefix="fitune-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(values, file)  # JSON is YAML
        command = [sys.executable, "-m", "fitune", "train", "--config", name]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603


def _wait(process: subprocess.Popen[bytes], run: RunFolder) -> None:
    code = process.wait()
    if code != 0 or not run.adapter.is_dir():
        raise RunFolderError(f"{run.path}: the training process failed", received=f"exit code {code}")


def _kill(process: subprocess.Popen[bytes], run: RunFolder, *, inside_save: bool) -> bool | None:
    """SIGKILL the process after it has made some steps; True if that was inside a save, None if it ended before."""
    start = len(run.read_steps())
    while process.poll() is None:
        saving = [path for path in run.checkpoints.glob(f"{TEMPORARY}*") if any(path.iterdir())]
        far_enough = len(run.read_steps()) >= start + 5
        if far_enough and (saving if inside_save else not saving):
            process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
            process.wait()
            return bool(list(run.checkpoints.glob(f"{TEMPORARY}*")))
        time.sleep(0.0005)
    return None


def _digest(run: RunFolder) -> str:
    return sha256(run.adapter / "adapter_model.safetensors")


def _losses(run: RunFolder) -> list[tuple[int, float, float | None, float]]:
    return [(r.step, r.loss, r.held_out_loss, r.grad_norm) for r in run.read_steps()]
