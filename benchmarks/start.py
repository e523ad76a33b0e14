"""How long it takes from the command to the first step.

    python benchmarks/start.py [--model FOLDER --data FILE] [--repeats 5] [--threads 2] [--than SRC] [--out FILE.json]

`fitune train` runs in a process of its own, twice in turn: cold, with an empty cache of prepared data, traces and
measured rates, and warm, with what the cold one left. Seconds are counted from outside, from the start of the process
until it prints its first step, and from inside by phase (`core/clock.py`); CPU seconds are those of all threads.
Without a model it is the demo's. `--than` names the `src` folder of another version, whose processes run in between.
Seconds count where the machine is idle (how many cores other processes took meanwhile is printed and kept); elsewhere
CPU seconds do, best of one thread, since two that wait for each other are not worth two.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from fitune.commands.demo import bundled
from fitune.core import clock, processor
from fitune.core.files import sha256

SRC = Path(__file__).parents[1] / "src"
FIRST = "step 1/"
STEPS = 6  # so many that the first one has no evaluation behind it


@dataclass(frozen=True)
class Case:
    """What is trained: model and data; threads: of torch."""

    model: Path
    data: Path
    threads: int


@dataclass(frozen=True)
class Timing:
    """One process. to_step_1: seconds until its first step was printed; cpu_to_step_1: its CPU seconds until then;
    cpu: of the whole process; busy: cores that other processes took; phases: seconds and CPU seconds of each, where
    the version counts them."""

    to_step_1: float
    cpu_to_step_1: float
    cpu: float
    busy: float
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def before(self) -> float | None:
        """Seconds before the first step, as the run counted them."""
        return sum(self.phases[name][0] for name in clock.PREPARING) if self.phases else None


def timed(case: Case, source: Path, cache: Path, run: Path) -> Timing:
    """A process of `fitune train`.

    Args:
        case: what is trained.
        source: the `src` folder that is used.
        cache: what was prepared before, if anything.
        run: a new folder.
    """
    given = {"--model": case.model, "--data": case.data, "--output": run, "--method": "lora", "--max-steps": STEPS}
    arguments = [str(part) for pair in given.items() for part in pair]
    fixed = {"FITUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(source)}
    environment = {**os.environ, **fixed, "OMP_NUM_THREADS": str(case.threads)}
    command = [sys.executable, "-m", "fitune", "train", *arguments]
    since, before, began = processor.moment(), os.times(), time.perf_counter()
    shown: list[str] = []
    first = cpu_first = 0.0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            shown.append(line)
            if line.startswith(FIRST):
                first, taken = time.perf_counter() - began, psutil.Process(process.pid).cpu_times()
                cpu_first = taken.user + taken.system
    if process.returncode or not first:
        raise SystemExit("".join(shown))
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    phases = {one["name"]: (one["seconds"], one["cpu_seconds"]) for one in found.get("phases", [])}
    # this process has waited for the child, whose seconds count as other processes': they are taken off
    busy = max(0.0, processor.others(since) - cpu / (time.perf_counter() - began))
    return Timing(first, cpu_first, cpu, busy, phases)


def pairs(case: Case, sources: Sequence[Path], repeats: int) -> dict[tuple[Path, str], list[Timing]]:
    """Cold and warm processes of each version, in turn."""
    found: dict[tuple[Path, str], list[Timing]] = defaultdict(list)
    for number in range(repeats):
        for source in sources:
            with tempfile.TemporaryDirectory(prefix="fitune-start-") as folder:
                for kind in ("cold", "warm"):
                    run = Path(folder) / f"run-{kind}"
                    one = timed(case, source, Path(folder) / "cache" / "data", run)
                    found[source, kind].append(one)
                    print(f"{number + 1}/{repeats} {source} {kind}: {_line(one)}", flush=True)
    return found


def _line(one: Timing) -> str:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, (seconds, _) in one.phases.items() if name in clock.PREPARING)
    before = f"; before it {one.before:.2f}: {parts}" if one.before is not None else ""
    cpu = f"{one.cpu_to_step_1:.2f} CPU s, {one.cpu:.2f} in all"
    return f"{one.to_step_1:.2f} s until step 1 was made, {cpu}; {one.busy:.1f} cores busy{before}"


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """The medians, and every process."""
    befores = [one.before for one in timings if one.before is not None]
    names = [name for name in clock.WHAT if all(name in one.phases for one in timings)]
    return {
        **{
            name: round(statistics.median(getattr(one, name) for one in timings), 2)
            for name in ("to_step_1", "cpu_to_step_1", "cpu")
        },
        "before_step_1": round(statistics.median(befores), 2) if befores else None,
        "phases": {
            name: [round(statistics.median(one.phases[name][n] for one in timings), 3) for n in (0, 1)]
            for name in names
        },
        "processes": [asdict(one) for one in timings],
    }


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=bundled() / "model")
    parser.add_argument("--data", type=Path, default=bundled() / "data" / "train.jsonl")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=processor.cores())
    parser.add_argument("--than", type=Path, help="the src folder of another version")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sources = [SRC, *([args.than.resolve()] if args.than else [])]
    for source in sources:  # as an installed version is
        compileall.compile_dir(source, quiet=1)
    case = Case(args.model.resolve(), args.data.resolve(), args.threads)
    found = pairs(case, sources, args.repeats)
    runs = [
        {"version": "this" if source == SRC else "other", "cache": kind, **summary(timings)}
        for (source, kind), timings in found.items()
    ]
    for run in runs:
        print({name: value for name, value in run.items() if name not in ("phases", "processes")})
    if args.out:
        args.out.write_text(json.dumps(_record(args, case, runs), indent=1) + "\n", encoding="utf-8")
    return 0


def _commit(source: Path) -> str:
    """The last that changed what was measured."""
    command = ["git", "log", "-1", "--format=%H", "--", "."]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False).stdout.strip()


def _record(args: argparse.Namespace, case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    than = {"than": _commit(args.than)} if args.than else {}
    return {
        "command": f"python benchmarks/start.py --model {case.model.name} --data {case.data.name} "
        f"--repeats {args.repeats} --threads {case.threads}{' --than SRC' if than else ''}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(SRC),
        **than,
        "data_sha256": sha256(case.data),
        "machine": {
            "cores": processor.cores(),
            "processor": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "runs": runs,
    }


if __name__ == "__main__":
    sys.exit(main())
