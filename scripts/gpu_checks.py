"""The sections of `scripts/gpu_accept.py`: each is run in a process of its own, by name.

In: a section's name, a folder, `--dry-run` for a CPU with tiny models. Out: a line of JSON for each check, in the
folder's gpu.jsonl. A section that cannot go on raises: that it ended is a check of the caller's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]
if (ROOT / "src").is_dir():  # not everything that is needed to install this package is on a bare machine
    sys.path.insert(0, str(ROOT / "src"))

from gpu_accept import _write as write  # noqa: E402

WORK = Path(tempfile.gettempdir()) / f"fitune-gpu-{os.getuid() if hasattr(os, 'getuid') else 'me'}"
CASES = ROOT / ".gpu" / "cases.json"  # of scripts/gpu_prepare.py
PATIENCE = 50  # seconds for one command
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "4090": 165.0, "L40S": 362.0}  # 16 bits, dense, data sheets


@dataclass(frozen=True)
class Here:
    """Where the results go, and on what."""

    section: str
    out: Path
    dry: bool

    @property
    def device(self) -> str:
        """For `--device`."""
        return "cpu" if self.dry else "cuda"

    def say(self, check: str, passed: bool, **figures: Any) -> None:
        """A check is known."""
        write(self.out, {"section": self.section, "check": check, "passed": bool(passed), **figures})


SECTIONS: dict[str, Callable[[Here], None]] = {}


def section(run: Callable[[Here], None]) -> Callable[[Here], None]:
    """Register a section under its function's name."""
    return SECTIONS.setdefault(run.__name__, run)


def fitune(*args: object, seconds: float = PATIENCE) -> dict[str, Any]:
    """A command of fitune with --json, to its result; RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "fitune", *map(str, args), "--json"]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])}: exit code {done.returncode}: {done.stderr[-800:]}")
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


# ---- machine ----


@section
def machine(here: Here) -> None:
    """Versions; which kernels attention takes, and what a new length costs; the rate of matrix products."""
    import torch
    import transformers

    from fitune import environment
    from fitune.model import pick_device

    device = pick_device(here.device)
    here.say("versions", True, **environment.describe(device)["device"], torch=torch.__version__,
             transformers=transformers.__version__)  # fmt: skip
    size = 256 if here.dry else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a, device, times=10)
    here.say("matrix products", True, bf16_tflops=round(2 * size**3 / seconds / 1e12, 1))
    for name, own in (("torch's choice", False), ("a run's choice", True)):
        kernels, lengths = attention_of(device, own=own)
        passed = not own or not any("cudnn" in kernel.lower() for kernel in kernels)
        here.say(f"attention: {name}", passed, kernels=kernels, seconds_of_new_lengths=lengths)
    here.say("doctor", True, **_short(fitune("doctor", seconds=30)))


def attention_of(device: Any, *, own: bool) -> tuple[list[str], list[float]]:
    """The kernels of torch's attention, forward and backward, and seconds of three new lengths and an old one."""
    from contextlib import nullcontext

    import torch
    from torch.nn import functional as F

    from fitune import determinism

    def run(length: int) -> None:
        q = torch.randn(1, 8, length, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    kinds = [torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU]
    with determinism.kernels(device) if own else nullcontext():
        with torch.profiler.profile(activities=kinds) as seen:
            run(300)
        lengths = [round(timed(lambda n=n: run(n), device, times=1, warm=0), 4) for n in (311, 312, 313, 311)]
    names = [event.key for event in seen.key_averages()]
    return [n[:60] for n in names if any(w in n.lower() for w in ("flash", "fmha", "attention", "cudnn"))][:6], lengths


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


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    checks = found.get("checks") or found.get("findings") or []
    return {"not_ok": [f"{one.get('rule')}: {one.get('text')}"[:120] for one in checks if one.get("level") != "ok"]}


# ---- kernels ----


@section
def kernels(here: Here) -> None:
    """The tests that need a GPU; without one, that they are found."""
    marks = ["--collect-only"] if here.dry else []
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "--timeout", "45", *marks]
    done = subprocess.run(
        [*command, str(ROOT / "tests")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
    )
    print(done.stdout)
    failed = [line[:150] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    here.say("pytest -m cuda", done.returncode == 0, failed=failed[:20], last=done.stdout.strip()[-200:])


# ---- resume ----


@section
def resume(here: Here) -> None:
    """A run that is killed and goes on, and the same run once more, have the same bits, in new processes."""
    for name, flags in (("lora with dropout", ("--lora.dropout", 0.1)), ("nf4", ("--quant", "nf4"))):
        whole, again, broken = (_run(here, f"{name}-{n}", flags) for n in ("whole", "again", "broken"))
        _train(whole)
        _train(again)
        here.say(f"{name}: twice the same", _digest(whole) == _digest(again))
        _kill_after(broken, steps=4)
        _train(broken)
        here.say(f"{name}: killed and resumed", _digest(whole) == _digest(broken), sha256=_digest(whole)[:12])


@dataclass(frozen=True)
class _Run:
    folder: Path
    args: tuple[object, ...]


def _run(here: Here, name: str, flags: tuple[object, ...]) -> _Run:
    from fitune import demo

    folder = WORK / f"{name.replace(' ', '-')}-{os.getpid()}"
    bundled = Path(demo.__file__).parent / "bundled"
    fixed = ("--model", bundled / "model", "--data", bundled / "data" / "train.jsonl", "--device", here.device)
    small = ("--max-steps", 6, "--save-every", 1, "--batch-size", 4, "--sample-prompts", 0, "--val-share", 0)
    precision = ("--precision", "fp32" if here.dry else "bf16")
    return _Run(folder, (*fixed, *small, *precision, *flags, "--output", folder))


def _command(run: _Run) -> tuple[object, ...]:
    begun = (run.folder / "config.yaml").exists()
    return ("train", "--resume", "--output", run.folder) if begun else ("train", *run.args)


def _train(run: _Run) -> None:
    fitune(*_command(run))


def _kill_after(run: _Run, steps: int) -> None:
    """Begin a run, and kill its process when so many steps are written; no signal that it could catch."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-m", "fitune", *map(str, _command(run))],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    written = run.folder / "steps.jsonl"
    while child.poll() is None and not (written.exists() and len(written.read_bytes().splitlines()) >= steps):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    child.wait()


def _digest(run: _Run) -> str:
    files = sorted((run.folder / "adapter").rglob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# ---- throughput ----


@section
def throughput(here: Here) -> None:
    """Tokens a second of LoRA on all linear layers of a random 8B model, rank 16, bf16: many documents, one, a longer
    batch, and on nf4; the operations that took longest."""
    shapes = [("34 documents, 4,096 tokens", 34, 4096), ("1 document, 4,096 tokens", 1, 4096), ("68, 8,192", 68, 8192)]
    for quant in ("none", "nf4"):
        bench = _Bench(here, quant)
        for name, documents, tokens in shapes if quant == "none" else shapes[:1]:
            bench.measure(f"{quant}: {name}", documents, tokens)
        bench.profile(f"{quant}: longest operations")
        del bench
        _forget()


class _Bench:
    """A random model with LoRA on it, and steps of made-up batches."""

    def __init__(self, here: Here, quant: str) -> None:

        import memory_gpu
        from fitune import catalog, optim
        from fitune.config import build
        from fitune.model import pick_device, shape_of, trainable

        self.here, self.device = here, pick_device(here.device)
        self.shape = shape_of(catalog.find("llama-3.1-8b").config)
        if here.dry:
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
            self.shape.update({**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
        lora = {"rank": 16, "targets": "all-linear"}
        self.config = build({"model": "-", "data": ["-"], "precision": "bf16", "lora": lora, "quant": quant})
        self.model = memory_gpu.build_model(self.config, self.shape, self.device)
        self.model.train()
        self.trained = trainable(self.model)
        self.optimizer = optim.make(self.trained, self.config)

    def step(self, documents: int, tokens: int) -> Any:
        from fitune import determinism
        from fitune.memory.steps import made_up
        from fitune.step import training_step

        tokens = tokens // 32 if self.here.dry else tokens
        batch = made_up(min(documents, tokens), max(2, tokens // documents), self.shape.vocab_size)
        with determinism.exact(self.device):
            determinism.strict(True)
            return training_step(self.model, [batch], self.optimizer, 1.0)

    def measure(self, name: str, documents: int, tokens: int) -> None:
        seconds = timed(lambda: self.step(documents, tokens), self.device, times=2 if self.here.dry else 10,
                        warm=1 if self.here.dry else 3)  # fmt: skip
        done = self.step(documents, tokens)
        rate = done.tokens / seconds
        parameters = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        figures = {"tokens_per_second": round(rate), "ms": round(1000 * seconds, 1), "finite": done.finite}
        peak = next((value for part, value in PEAK_TFLOPS.items() if part in _gpu_name(self.device)), None)
        if peak and self.config.quant.name == "none":
            figures["share_of_peak"] = round(4 * parameters * rate / peak / 1e12, 3)
        self.here.say(name, done.finite, **figures, **_peak(self.device))

    def profile(self, name: str, most: int = 12) -> None:
        import torch

        cuda = self.device.type == "cuda"
        kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as seen:
            self.step(34, 4096)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, key))[:most]
        longest = [f"{row.key[:50]} {getattr(row, key) / 1000:.1f} ms x {row.count}" for row in rows]
        self.here.say(name, True, longest=longest)


def _gpu_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _peak(device: Any) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {}
    return {"allocated_mib": torch.cuda.max_memory_allocated(device) >> 20}


def _forget() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- memory ----


@section
def runs(here: Here) -> None:
    """Whole runs: what they took beside what was said before."""
    for name, flags in (("lora", ()), ("nf4, checkpointing", ("--quant", "nf4", "--checkpointing"))):
        run = _run(here, f"run-{name.replace(', ', '-')}", flags)
        found = fitune(*_command(run))
        off = found["peak_memory_mib"] / found["expected_memory_mib"] - 1
        figures = {key: round(found[key], 1) for key in ("peak_memory_mib", "expected_memory_mib")}
        here.say(f"{name}: peak beside plan", here.dry or off <= 0.10, off=f"{off:+.1%}", **figures)


@section
def memory(here: Here) -> None:
    """Configurations that were chosen beforehand: allocated and reserved bytes beside the plan's."""
    _cases(here, capped=False)


@section
def capped(here: Here) -> None:
    """On a card made smaller: what was said to fit goes through, and what was not, does not."""
    _cases(here, capped=True)


def _cases(here: Here, *, capped: bool) -> None:
    if here.dry:
        found = fitune("plan", _run(here, "plan", ()).args[1], "--data", _run(here, "plan", ()).args[3], "--verify",
                       "--device", "cpu")  # fmt: skip
        here.say("plan --verify", True, **{k: v for k, v in found.items() if isinstance(v, (int, float))})
        return
    import memory_gpu

    card = memory_gpu.probe()
    sizes = json.loads(CASES.read_text(encoding="utf-8"))
    near = min(sizes, key=lambda size: abs(int(size) * memory_gpu.GIB - card.total))
    for values in sizes[near]["capped" if capped else "plain"]:
        case = memory_gpu.Case(**values)
        found, why = memory_gpu.ask({"do": "run", "case": values, "card": asdict(card)})
        passed, figures = judged(found, why)
        here.say(case.name, passed, **figures)


def judged(found: dict[str, Any] | None, why: str) -> tuple[bool, dict[str, Any]]:
    """Of what was measured: did it go as was said, and the figures. Within 2.5 % where it ran; what was said to fit
    must not die, and what was said not to fit may run (plans are on the safe side)."""
    if found is None or "predicted" not in found:
        return False, {"why": why}
    said = found["predicted"]
    if "measured" not in found:
        return False, {"why": found.get("left_out") or found.get("failed") or why}
    if found["died"]:
        return not said["fits"], {"died": found["died"], "said_to_fit": said["fits"]}
    off = {name: found["measured"][f"max_{name}"] / said[name] - 1 for name in ("allocated", "reserved")}
    figures = {f"{name}_off": f"{value:+.2%}" for name, value in off.items()}
    return abs(off["allocated"]) <= 0.025, {
        **figures,
        "said_to_fit": said["fits"],
        "seconds": found["measured"]["seconds"],
    }


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    SECTIONS[args.section](Here(args.section, args.out, args.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
