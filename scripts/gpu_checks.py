"""The sections of `scripts/gpu_accept.py`: each is run in a process of its own, by name.

In: names of sections; `--dry-run` for a CPU with tiny models. Out: a printed line of JSON for each check. A section
that cannot go on raises: that it ended is a check of the caller's. Those with figures of speed and memory stand in
gpu_figures.py.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
SOURCES = [str(ROOT / name) for name in ("src", "scripts", "benchmarks")]  # a bare machine cannot install the package
sys.path[:0] = SOURCES

import gpu_report  # noqa: E402
from gpu_accept import MARK  # noqa: E402

PATIENCE = 90.0  # seconds for one command
STEPS, KILLED_AT = 12, 4  # of a run that is killed
WORKERS = 6  # of pytest on one GPU: a test takes little of it, and its process seconds to start


@dataclass(frozen=True)
class Here:
    """On what a section runs, and where to. together: sections share this process, and commands run in it as well.
    seconds: what the section has."""

    section: str
    dry: bool
    work: Path
    together: bool = False
    seconds: float = 600.0

    @property
    def device(self) -> str:
        """For `--device`."""
        return "cpu" if self.dry else "cuda"

    @property
    def at_once(self) -> int:
        """How many commands may run side by side."""
        return 1 if self.together else 2 if self.dry else 6

    def say(self, check: str, passed: bool, **figures: Any) -> None:
        """A check is known."""
        row = {"section": self.section, "check": check, "passed": bool(passed), **figures}
        print(MARK + json.dumps(row, ensure_ascii=False, default=str), flush=True)


SECTIONS: dict[str, Callable[[Here], None]] = {}


def section(run: Callable[[Here], None]) -> Callable[[Here], None]:
    """Register a section under its function's name."""
    return SECTIONS.setdefault(run.__name__, run)


# ---- commands ----


def fitune(here: Here, *args: object, good: Sequence[int] = (0,), beside: int = 1) -> Any:
    """A command of fitune with --json, to its result; RuntimeError with its last words where its exit code is not a
    good one. beside: how many processes run at the same time."""
    words = [*map(str, args), "--json"]
    seconds = PATIENCE * (5 if here.dry else 1)
    code, out, errors = _inside(words) if here.together else _outside(words, seconds, beside)
    if code not in good:
        raise RuntimeError(f"fitune {' '.join(words)}: exit code {code}: {errors[-800:]}")
    begins = min(at for at in (out.find("{"), out.find("["), len(out)) if at >= 0)
    return json.loads(out[begins:])


def _outside(words: Sequence[str], seconds: float, beside: int) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fitune", *words], capture_output=True, text=True, encoding="utf-8", errors="replace",
        timeout=seconds, env=environment(beside),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def _inside(words: Sequence[str]) -> tuple[int, str, str]:
    from fitune.cli.main import main as typed

    out, errors, code = io.StringIO(), io.StringIO(), 0
    typing = patch.object(sys, "argv", ["fitune", *words])
    with typing, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            typed()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code, out.getvalue(), errors.getvalue()


def environment(beside: int = 1) -> dict[str, str]:
    """Of a process that finds the package here, and has its share of the cores where others run beside it: torch takes
    a thread for each core otherwise, and so many threads wait for each other."""
    path = os.pathsep.join([*SOURCES[:2], *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // beside))} if beside > 1 else {}
    return {**os.environ, **threads, "PYTHONPATH": path}


# ---- machine ----


@section
def machine(here: Here) -> None:
    """Versions; which kernels attention takes, and what a new length costs; the rate of matrix products."""
    import torch

    from fitune.engine import environment as around
    from fitune.models.devices import pick_device
    from fitune.models.kernels import fused, target

    device = pick_device(here.device)
    found: dict[str, Any] = around.describe(device)
    total = torch.cuda.mem_get_info(device)[1] >> 20 if device.type == "cuda" else found["memory_mib"]
    here.say("versions", True, **found["device"], total_mib=total, python=found["python"], **found["packages"])
    size = 256 if here.dry else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a, device, times=10)
    here.say("matrix products", True, bf16_tflops=round(2 * size**3 / seconds / 1e12, 3))
    for name, own in (("torch's choice", False), ("a run's choice", True)):
        kernels, lengths = attention_of(device, own=own)
        passed = bool(kernels) and not (own and any("cudnn" in kernel.lower() for kernel in kernels))
        here.say(f"attention: {name}", passed, seconds_of_new_lengths=lengths, kernels=kernels)
    refused = fused.refusal(target.of(device))
    here.say("fused kernels", here.dry or refused is None, **({"why": refused} if refused else {}))
    checks = fitune(here, "doctor", good=(0, 1))["checks"]
    wrong = [f"{one['name']}: {one['text']}"[:160] for one in checks if one["level"] != "ok"]
    broken = any(one["level"] == "broken" for one in checks)  # a CUDA build of torch where no GPU is, in a dry run
    here.say("doctor", here.dry or not broken, checks=len(checks), not_ok=wrong)
    starts(here)


def starts(here: Here) -> None:
    """Say the seconds of a new process that imports torch, of one that uses the device, of one that imports what
    training needs, and of one of fitune that only says its version."""
    parts = {
        "torch": ["-c", "import torch"],
        "device": ["-c", f"import torch; a = torch.ones(64, 64, device={here.device!r}); (a @ a).sum().item()"],
        "training": ["-c", "import fitune.commands.train"],
        "version": ["-m", "fitune", "--version"],
    }
    for name, words in parts.items():
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, env=environment(), timeout=PATIENCE, check=True)
        here.say(f"seconds of a start: {name}", True, seconds=round(time.perf_counter() - began, 2))


def attention_of(device: Any, *, own: bool) -> tuple[list[str], list[float]]:
    """The kernels of torch's attention, forward and backward, and seconds of three new lengths and an old one."""
    import torch
    from torch.nn import functional as F

    from fitune.models import determinism

    def run(length: int) -> None:
        q = torch.randn(1, 8, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    kinds = [torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with determinism.kernels(device) if own else contextlib.nullcontext():
        with torch.profiler.profile(activities=kinds) as seen:
            run(300)
        lengths = [round(timed(partial(run, n), device, times=1, warm=0), 4) for n in (311, 312, 313, 311)]
    names = [event.key for event in seen.key_averages()]
    known = ("flash", "fmha", "attention", "cudnn", "mha", "softmax")
    return [n[:60] for n in names if any(word in n.lower() for word in known)][:6], lengths


def timed(work: Callable[[], Any], device: Any, *, times: int, warm: int = 3) -> float:
    """Seconds of one call, the device waited for."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warm):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


# ---- kernels ----


@section
def kernels(here: Here) -> None:
    """The tests that need a GPU, but for resuming, which is a section; without a GPU, that they are found."""
    files = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text("utf-8")
    ]
    if here.together:
        files = [file for file in files if file.endswith("test_gpu.py")]
    chosen = ["-m", "cuda and not full", "-k", "not new_processes"]
    side_by_side = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    real = ["-q", "--no-header", "--no-summary", "--timeout", "60", *side_by_side]
    how = ["--collect-only", "-q"] if here.dry else real
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu_report", *chosen, *how, *files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(WORKERS),
                              timeout=max(1.0, here.seconds - 5))  # fmt: skip
        out, ended = done.stdout + done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        out, ended = (late.stdout or b"").decode("utf-8", "replace"), "not done in time"
    print(out, flush=True)
    counts = outcomes(out, collected=here.dry)
    passed = ended == "exit code 0" and not counts["failed"] and not counts["skipped"] and counts["ran"] > 0
    here.say("pytest -m cuda", passed, ended=ended, **counts)


def outcomes(out: str, *, collected: bool) -> dict[str, Any]:
    """Of pytest's output with the plugin gpu_report: how many tests ran and were skipped, the names of those that
    failed, and the seconds of the three that took longest."""
    if collected:
        return {"ran": len(re.findall(r"^\S+::\S+", out, re.MULTILINE)), "skipped": 0, "failed": []}
    found = [json.loads(text) for text in re.findall(rf"^{gpu_report.MARK}({{.+}})$", out, re.MULTILINE)]
    failed = [row["test"].removeprefix("tests/") for row in found if row["outcome"] == "failed"]
    skipped = sum(row["outcome"] == "skipped" for row in found)
    slowest = sorted(found, key=lambda row: -row["seconds"])[:3]
    longest = {row["test"].split("/")[-1]: row["seconds"] for row in slowest}
    return {"ran": len(found) - skipped, "skipped": skipped, "failed": failed[:20], "longest": longest}


# ---- resume ----


@section
def resume(here: Here) -> None:
    """A run that is killed and goes on, and the same run once more, have the same bits, in new processes. The runs go
    on side by side: what they cost is their start."""
    cases: tuple[tuple[str, tuple[str, Any]], ...] = (
        ("lora with dropout", ("--lora.dropout", 0.1)),
        ("nf4", ("--quant", "nf4")),
    )
    cases = cases[: 1 if here.together else None]
    runs = {(name, n): bundled(here, f"{name}-{n}", *flags) for name, flags in cases for n in ("one", "two", "killed")}
    with ThreadPoolExecutor(here.at_once) as pool:
        begun = {key: pool.submit(_begin, here, key[1], run) for key, run in runs.items()}
    with ThreadPoolExecutor(here.at_once) as pool:
        again = {name: pool.submit(fitune, here, *_resumed(runs[name, "killed"]), beside=2) for name, _ in cases}
    for name, _ in cases:
        failed = [str(one.exception())[:300] for one in (*(begun[name, n] for n in ("one", "two", "killed")),
                                                         again[name]) if one.exception()]  # fmt: skip
        if failed:
            here.say(f"{name}: runs", False, why=failed)
            continue
        first, second, last = (_digest(runs[name, n]) for n in ("one", "two", "killed"))
        here.say(f"{name}: twice the same", first == second, sha256=first[:12])
        figures = {"killed_after": begun[name, "killed"].result(), "of": STEPS, "sha256": last[:12]}
        here.say(f"{name}: killed and resumed", first == last, **figures)


@dataclass(frozen=True)
class Run:
    """A run of `fitune train`: its folder, and what is typed."""

    folder: Path
    args: tuple[object, ...]


def bundled(here: Here, name: str, *flags: object) -> Run:
    """A short run of the bundled model."""
    from fitune.commands import demo

    folder, parts = here.work / name.replace(" ", "-"), demo.bundled()
    fixed = ("--model", parts / "model", "--data", parts / "data" / "train.jsonl", "--device", here.device)
    small = ("--max-steps", STEPS, "--save-every", 1, "--batch-size", 4, "--sample-prompts", 0, "--val-share", 0)
    precision = ("--precision", "fp32" if here.dry else "bf16")
    return Run(folder, ("train", *fixed, *small, *precision, *flags, "--output", folder))


def _resumed(run: Run) -> tuple[object, ...]:
    return ("train", "--resume", "--output", run.folder)


def _begin(here: Here, kind: str, run: Run) -> int:
    """A whole run, or one that is killed; the steps that it had done."""
    if kind != "killed":
        fitune(here, *run.args, beside=here.at_once)
        return STEPS
    return _kill(run, here.at_once)


def _kill(run: Run, beside: int) -> int:
    """Begin a run, and kill its process when some steps are written, by a signal that it cannot catch; how many.

    Raises:
        RuntimeError: it ended before.
    """
    written = run.folder / "steps.jsonl"
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "fitune", *map(str, run.args)], stdout=subprocess.DEVNULL,
                                 stderr=errors, env=environment(beside))  # fmt: skip
        while child.poll() is None and _lines(written) < KILLED_AT:
            time.sleep(0.002)
        ended = child.poll()
        child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        child.wait()
        errors.seek(0)
        if ended is not None:
            raise RuntimeError(f"exit code {ended} before it was killed: {errors.read()[-300:]}")
    return _lines(written)


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _digest(run: Run) -> str:
    files = sorted((run.folder / "adapter").rglob("*.safetensors"))
    assert files, f"no adapter in {run.folder}"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> int:
    """See the module's text."""
    import gpu_figures  # noqa: F401  # registers its sections
    import gpu_parallel  # noqa: F401  # as well

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--work", type=Path, help="for runs and models; a temporary one otherwise")
    parser.add_argument("--seconds", type=float, default=600.0, help="what a section has")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--together", action="store_true", help="commands run in this process too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as own:
        work = args.work or Path(own)
        return max([go(Here(name, args.dry_run, work, args.together, args.seconds)) for name in args.sections])


def go(here: Here) -> int:
    """One section. 1: it could not go on; why is printed."""
    began = time.perf_counter()
    try:
        SECTIONS[here.section](here)
        print(f"{here.section}: {time.perf_counter() - began:.1f} s, {time.process_time():.1f} s of a core so far")
    except Exception as error:  # another section may still run
        traceback.print_exc()
        here.say("goes to its end", False, why=f"{type(error).__name__}: {error}"[:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.modules["gpu_checks"] = sys.modules["__main__"]  # gpu_figures imports it
    sys.exit(main())
