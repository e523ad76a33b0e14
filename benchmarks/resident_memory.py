"""Resident memory, open files and temporary files of a long run whose steps all have other lengths.

    python benchmarks/resident_memory.py [--steps 1000] [--every 100] [--kinds fp32 bf16 nf4] [--out FILE.json]

Each kind is a `fitune.train` of the bundled model in a process of its own: LoRA on all linear layers, two rows of 6 to
100 words a step, a checkpoint every 100 steps, an evaluation every 250. Prints a line every so many steps: `sizes` are
the numbers of tokens that the model has met so far, `unrounded` how many it would have met without a filler; `files`
are open file descriptors, `temporary` what lies in the folder for temporary files. The summary has the most that the
process grew after step 100, as a share of what it held there; above 3 % the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROWS, SHORTEST, LONGEST = 2, 6, 100
SETTLED = 100  # the step from which on nothing may grow
ALLOWED = 0.03
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "nf4": {"precision": "fp32", "quant": "nf4"},
    "nf4 in bf16": {"precision": "bf16", "quant": "nf4"},
}


def rows(path: Path, count: int) -> None:
    """Questions and answers of all lengths."""
    draw = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = draw.randint(SHORTEST, LONGEST)
            asked, answered = draw.randint(1, length - 2), length
            words = [draw.choice("abcdefghij") for _ in range(answered)]
            row = {"instruction": " ".join(words[:asked]), "output": " ".join(words[asked:])}
            file.write(json.dumps(row) + "\n")


def open_files(process: Any) -> int:
    """How many files, or on Windows handles, a process of psutil has open."""
    return int(process.num_fds() if hasattr(process, "num_fds") else process.num_handles())


def run(kind: str, steps: int, every: int, folder: Path) -> list[dict[str, float]]:
    """The run, in this process: a line for each so many steps."""
    import psutil

    import fitune
    from fitune.commands.demo import bundled
    from fitune.core.events import Watcher
    from fitune.core.records import StepRecord
    from fitune.models.kernels import placed

    process, lines, met, given = psutil.Process(), [], set(), set()
    place = placed.place

    def counting(batch: Any, *args: Any, **kwargs: Any) -> Any:
        made = place(batch, *args, **kwargs)
        met.add(made.positions.shape[-1])
        given.add(len(batch.ids))
        return made

    placed.place = counting

    class Look(Watcher):
        def step(self, record: StepRecord) -> None:
            if record.step % every and record.step != 1:
                return
            line = {
                "step": record.step,
                "resident_mib": round(process.memory_info().rss / 2**20, 1),
                "files": open_files(process),
                "temporary": len(list(Path(tempfile.gettempdir()).iterdir())),
                "sizes": len(met),
                "unrounded": len(given),
            }
            lines.append(line)
            print(json.dumps(line), flush=True)

    data = folder / "rows.jsonl"
    rows(data, steps * ROWS + 40)
    settings = {
        **KINDS[kind],
        "model": str(bundled() / "model"),
        "data": [str(data)],
        "output": str(folder / "run"),
        "lora": {"targets": "all-linear"},
        "batch_size": ROWS,
        "max_steps": steps,
        "save_every": 100,
        "eval_every": 250,
        "val_rows": 40,
        "sample_prompts": 0,
        "seed": 1,
    }
    fitune.train(**settings, watch=Look())
    return lines


def grown(lines: list[dict[str, float]], what: str = "resident_mib") -> float:
    """The most behind the step from which on nothing may grow, as a share of what was held there."""
    behind = [line[what] for line in lines if line["step"] >= SETTLED]
    return max(behind) / behind[0] - 1


def in_its_own_process(kind: str, steps: int, every: int) -> dict[str, Any]:
    """The run's lines, printed as they come."""
    with tempfile.TemporaryDirectory(prefix="fitune-resident-") as name:
        temporary, cache = Path(name) / "tmp", Path(name) / "cache"
        temporary.mkdir()
        environment = {**os.environ, "TMPDIR": str(temporary), "FITUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--child", kind, "--steps", str(steps), "--every", str(every)]
        command += ["--folder", name]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for text in process.stdout or ():
                if not text.startswith("{"):
                    continue
                line = json.loads(text)
                lines.append(line)
                print(f"{kind:>12}  " + "  ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: failed")
    settled = next(line for line in lines if line["step"] >= SETTLED)
    return {
        "kind": kind,
        "grown": round(grown(lines), 4),
        "files_grown": int(max(line["files"] for line in lines if line["step"] >= SETTLED) - settled["files"]),
        "temporary_grown": int(lines[-1]["temporary"] - settled["temporary"]),
        "lines": lines,
    }


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["fp32", "bf16", "nf4"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run(args.child, args.steps, args.every, args.folder)
        return 0
    found = [in_its_own_process(kind, args.steps, args.every) for kind in args.kinds]
    for one in found:
        print(
            f"{one['kind']}: grew by at most {one['grown']:.1%} after step {SETTLED}, open files by "
            f"{one['files_grown']}, temporary files by {one['temporary_grown']}"
        )
    if args.out:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
        record = {
            "command": f"python benchmarks/resident_memory.py --steps {args.steps} --kinds {' '.join(args.kinds)}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": _threads()},
            "versions": versions,
            "runs": found,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(one["grown"] > ALLOWED or one["files_grown"] > 0 or one["temporary_grown"] > 0 for one in found))


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
