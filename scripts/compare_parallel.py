"""The same run by one process and by several: how far losses and weights differ.

    python scripts/compare_parallel.py [--workers 2 4] [--out FILE.json] -- --model M --data D [more of fitune train]

Runs `fitune train` with these settings by one process, and by each number of processes twice. Prints how far all tuned
weights together (the norm of the difference by theirs), the worst tensor and the worst loss are off those of one
process, and whether both runs of several processes gave the same bits. Beside it, what the order of additions does to
one process: the same rows in micro-batches of half the size. Without settings: LoRA on all linear layers of the bundled
model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fitune.commands import demo

STEPS = 6
HALVES = ["--batch-size", "4", "--accumulation", "2"]  # of the default: 8 rows at once


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", help="of fitune train, after --")
    args = parser.parse_args()
    settings = args.settings or bundled()
    with tempfile.TemporaryDirectory() as place:
        alone = trained(settings, 1, Path(place) / "1")
        found = {}
        if "--batch-size" not in settings:
            other = trained([*settings, *HALVES], 1, Path(place) / "halves")
            found["1, in halves"] = compared(alone, [other])
            print(f"one process, its micro-batches in halves: {line(found['1, in halves'])}")
        for workers in args.workers:
            folders = [trained(settings, workers, Path(place) / f"{workers}-{n}") for n in range(2)]
            found[str(workers)] = compared(alone, folders)
            print(f"{workers} processes: {line(found[str(workers)])}")
    if args.out is not None:
        args.out.write_text(json.dumps({"settings": settings, "workers": found}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(one["repeated"] is False for one in found.values()) else 0


def bundled() -> list[str]:
    """LoRA on the bundled model, in fp32."""
    place = demo.bundled()
    model, data = str(place / "model"), str(place / "data" / "train.jsonl")
    few = ["--max-steps", str(STEPS), "--sample-prompts", "0", "--eval-every", str(STEPS)]
    return ["--model", model, "--data", data, "--precision", "fp32", "--lora.targets", "all-linear", *few]


def trained(settings: Sequence[str], workers: int, folder: Path) -> Path:
    """The folder of a run by so many processes."""
    command = [sys.executable, "-m", "fitune", "train", *settings, "--output", str(folder), "--workers", str(workers)]
    threads = {"OMP_NUM_THREADS": "1"}  # more would add up in another order
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return folder


def compared(alone: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """How far a run of several processes is from that of one, and whether it was repeated bit for bit."""
    ours, theirs = weights(alone), weights(folders[0])
    assert ours.keys() == theirs.keys()
    squares = {name: (squared(theirs[name].double() - one.double()), squared(one)) for name, one in ours.items()}
    tensors = {name: math.sqrt(off / max(size, 1e-60)) for name, (off, size) in squares.items()}
    together = math.sqrt(sum(off for off, _ in squares.values()) / sum(size for _, size in squares.values()))
    losses = [abs(b / a - 1) for a, b in zip(losses_of(alone), losses_of(folders[0]), strict=True)]
    worst = max(tensors, key=lambda name: tensors[name])
    again = len({digest(folder) for folder in folders}) == 1 if len(folders) > 1 else None
    return {
        "tensors": len(tensors), "weights": together, "worst": worst, "of_worst": tensors[worst], "losses": max(losses),
        "repeated": again, "sha256": digest(folders[0]),
    }  # fmt: skip


def squared(tensor: Any) -> float:
    """The square of its norm."""
    return float(tensor.double().square().sum())


def weights(folder: Path) -> dict[str, Any]:
    """What a run tuned."""
    return {
        name: one
        for file in sorted((folder / "adapter").glob("*.safetensors"))
        for name, one in load_file(file).items()
    }


def losses_of(folder: Path) -> list[float]:
    """Of each step."""
    return [json.loads(text)["loss"] for text in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


def digest(folder: Path) -> str:
    """SHA-256 of what a run tuned."""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def line(found: dict[str, Any]) -> str:
    """In one line."""
    again = {True: "; the same bits again", False: "; OTHER BITS the second time", None: ""}[found["repeated"]]
    worst = f"the worst of {found['tensors']} tensors by {found['of_worst']:.1e} ({found['worst']})"
    return f"weights {found['weights']:.1e} off, {worst}, losses {found['losses']:.1e}{again}"


if __name__ == "__main__":
    sys.exit(main())
