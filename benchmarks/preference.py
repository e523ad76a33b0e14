"""Preferences in fitune and in TRL: the same rows, the same weights; loss, rewards, gradients and operations.

    python benchmarks/preference.py --out FILE.json
    python benchmarks/preference.py --objectives dpo --steps 1 --shape tiny

TRL is installed into an environment of its own below build/against (`against.py`; pip alone needs the network). Both
compute every batch in a process of their own, in float32 on the CPU. Compared are the loss, both rewards and the
gradients of all of LoRA's tensors: a difference above 1e-5, of the largest value where that is above 1, is listed, and
ends with exit code 1. That is done with rows of short answers: a random model gives an answer of 600 tokens a
log-probability of -7,000, of which float32 holds no more than three digits behind the point, in either system.

Operations and memory are those of rows as they come. Operations are counted by torch; fitune's are those of one epoch,
with the pass that gives the reference its log-probabilities, TRL's with the forward pass of its reference in every
step, without the activation checkpointing that is its default. Memory is fitune's own: the most that a batch takes,
beside that of tuning on answers of as many tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import against

CLOSE = 1e-5
SHORT = range(8, 81)  # characters of both answers of the rows that are compared
MOST_FLOPS, MOST_PEAK = 0.6, 1.1  # of TRL's operations; of the memory of tuning on answers
# settings that are not the defaults of both, so that each has a part in what is compared
OBJECTIVES: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.15},
    "ipo": {"beta": 0.3},
    "kto": {"beta": 0.15, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "orpo": {"beta": 0.4},
    "orpo-whole": {"beta": 0.4},
    "simpo": {"beta": 2.5, "gamma": 0.7},
}


def plain(name: str) -> str:
    """The name of a trained tensor in both."""
    return name.replace(".default.", ".").removeprefix("base_model.model.")


def apart(one: float | None, other: float | None) -> float:
    """How far two figures are apart, of the larger one where that is above 1."""
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return abs(one - other) / max(1.0, abs(one), abs(other))


def gradients_apart(ours: Path, theirs: Path) -> tuple[float, int]:
    """The largest difference of a gradient, of the largest one of its batch; and how many tensors were compared."""
    here, there = ({plain(name): one for name, one in load_file(path).items()} for path in (ours, theirs))
    if here.keys() != there.keys():
        missing = sorted(here.keys() ^ there.keys())
        raise SystemExit(f"trained tensors differ: {', '.join(missing[:4])}")
    worst = 0.0
    for number in sorted({name.split(".", 1)[0] for name in here}):
        names = [name for name in here if name.startswith(f"{number}.")]
        largest = max(float(there[name].abs().max()) for name in names)
        worst = max(worst, max(float((here[name] - there[name]).abs().max()) for name in names) / largest)
    return worst, len(here)


def compared(ours: dict[str, Any], theirs: dict[str, Any], folders: tuple[Path, Path]) -> dict[str, Any]:
    """What both computed of an objective, side by side."""
    pairs = list(zip(ours["batches"], theirs["batches"], strict=True))
    gradients, tensors = gradients_apart(*(folder / "gradients.safetensors" for folder in folders))
    loss = max(apart(one["loss"], other["loss"]) for one, other in pairs)
    rewards = max(apart(one[side], other[side]) for one, other in pairs for side in ("chosen", "rejected"))
    flops = [sum(batch["flops"] for batch in one["batches"]) for one in (ours, theirs)]
    flops[0] += ours.get("reference_flops", 0)
    return {
        "batches": len(pairs), "tensors": tensors, "loss": loss, "rewards": rewards, "gradients": gradients,
        "equal": max(loss, rewards, gradients) <= CLOSE,
        "losses": [[one["loss"], other["loss"]] for one, other in pairs],
        "flops": {"fitune": flops[0], "trl": flops[1], "share": flops[0] / flops[1]},
        "peak": {"bytes": ours["peak"], "sft": ours["sft_peak"], "share": ours["peak"] / ours["sft_peak"]},
        "tokens": sum(batch["tokens"] for batch in ours["batches"]),
        "versions": {"fitune": ours["versions"], "trl": theirs["versions"]},
    }  # fmt: skip


def one(bench: against.Bench, shared: dict[str, Any], name: str) -> dict[str, Any]:
    """An objective in both."""
    settings = {**shared, "objective": name, "options": OBJECTIVES[name]}
    ours = bench.run("preference_fitune", "fitune", settings, f"preference-{name}-fitune")
    folders = tuple(bench.work / "runs" / f"preference-{name}-{system}" for system in ("fitune", "trl"))
    computed = {"computed": str(folders[0] / "result.json")}
    theirs = bench.run("preference_trl", "trl", {**settings, **computed}, f"preference-{name}-trl")
    return compared(ours, theirs, (folders[0], folders[1]))


def short(data: Path, count: int, path: Path) -> None:
    """The first rows whose answers are short."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    some = [row for row in rows if all(len(row[side]["value"]) in SHORT for side in ("chosen", "rejected"))]
    if len(some) < count:
        raise SystemExit(f"{data}: {len(some)} rows with short answers, {count} needed; fix: fewer --steps")
    path.write_text(json.dumps(some[:count], ensure_ascii=False), encoding="utf-8")


def measured(bench: against.Bench, shared: dict[str, Any], count: int) -> dict[str, Any]:
    """Operations and memory of DPO, on rows as they come."""
    found = one(bench, {**shared, "steps": count}, "dpo")
    asked = {"flops": found["flops"]["share"] <= MOST_FLOPS, "peak": found["peak"]["share"] <= MOST_PEAK}
    return {**found, "holds": asked}


def line(name: str, found: dict[str, Any]) -> str:
    """For people."""
    differs = "" if found["equal"] else "   DIFFERS"
    figures = ("loss", "rewards", "gradients")
    return f"{name:<11}" + "".join(f" {figure} {found[figure]:.1e} " for figure in figures) + differs


def work_line(found: dict[str, Any]) -> str:
    """The same."""
    return (
        f"operations {found['flops']['share']:.3f} of TRL's; memory {found['peak']['share']:.3f} of answers; "
        + ", ".join(f"{name}: {'holds' if held else 'TOO MUCH'}" for name, held in found["holds"].items())
    )


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--shape", default="46.6M", choices=["46.6M", "0.5B", "tiny"])
    parser.add_argument("--steps", type=int, default=3, help="batches of each objective")
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch")
    parser.add_argument("--measured", type=int, default=4, help="batches whose operations are counted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path,
                        default=Path(os.environ.get("FITUNE_SHARED", against.ROOT.parent / "shared")))  # fmt: skip
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=against.WORK)
    parser.add_argument("--interpreter", nargs="+", default=[], metavar="NAME=PATH", help="an environment of yours")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--add", action="store_true", help="keep what else the file of --out has")
    args = parser.parse_args()
    args.tokenizer = args.tokenizer or args.shared / "tokenizers" / "qwen2"
    args.data = args.data or args.shared / "data" / "dpo_zh_demo.json"
    return args


def main() -> int:
    """See the module's text."""
    args = parsed()
    for path in (args.tokenizer, args.data):
        if not path.exists():
            sys.exit(f"{path}: not there; fix: --tokenizer FOLDER --data ROWS.json, or --shared FOLDER with both")
    given = dict(pair.split("=", 1) for pair in args.interpreter)
    bench = against.Bench(args.work, {name: Path(path) for name, path in given.items()}, args.threads)
    folder = bench.work / "inputs" / f"preference-{args.shape}"
    folder.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {
        "shape": args.shape, "precision": "fp32", "tokenizer": str(args.tokenizer.resolve()), "rank": 8, "alpha": 16.0,
        "targets": ["q_proj", "v_proj"], "seed": 7, "raw": str(args.data.resolve()), "model": str(folder / "model"),
        "adapter": str(folder / "adapter"), "batch": args.batch, "steps": args.steps,
    }  # fmt: skip
    bench.run("preference_prepare", "fitune", {**shared, "work": str(folder)}, "preference-prepare")
    rows = folder / "short.json"
    short(args.data, args.steps * args.batch, rows)
    found = {}
    for name in args.objectives:
        found[name] = one(bench, {**shared, "raw": str(rows)}, name)
        print(line(name, found[name]), flush=True)
    work = measured(bench, shared, args.measured)
    print(work_line(work), flush=True)
    where = {"commit": against.commit(), "date": datetime.now(UTC).date().isoformat(), "threads": args.threads,
             "processor": against.processor(), "data": args.data.name, "tokenizer": args.tokenizer.name}  # fmt: skip
    numbers = " ".join(f"--{name} {getattr(args, name)}" for name in ("shape", "steps", "batch", "measured"))
    asked = f"python benchmarks/preference.py {numbers} --objectives {' '.join(args.objectives)}"
    record = {"command": asked, **where, "settings": OBJECTIVES, "objectives": found, "work": work}
    if args.out:
        there = json.loads(args.out.read_text(encoding="utf-8"))["runs"] if args.add and args.out.exists() else []
        args.out.write_text(json.dumps({"runs": [*there, record]}, indent=1) + "\n", encoding="utf-8")
    return int(any(not one["equal"] for one in found.values()) or not all(work["holds"].values()))


if __name__ == "__main__":
    sys.exit(main())
