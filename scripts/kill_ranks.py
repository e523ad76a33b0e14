"""Random processes of a run killed at random moments: `python scripts/kill_ranks.py --kills 60`.

One of several processes gets SIGKILL, after a time that is drawn, or as a checkpoint is written; the run goes on with
--resume and is killed again, until it is through. Each time the rest must end within 30 seconds, with an exit code that
is not 0 and a message that names the process, and the step where there was one; the end must be, bit for bit, that of a
run that nobody killed. Half of the runs are in shards. Prints a line for each kill, and the counts as JSON at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

SOON = 30.0  # seconds in which the rest end
STEPS, EVERY = 24, 2  # of a run, and between two checkpoints
WAYS = ("replicate", "shard")
LOOK = 0.002  # seconds between two looks for a checkpoint that is being written


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = Killing(Path(place), args.workers, random.Random(args.seed)).all(args.kills)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["bad"] else 0


@dataclass
class Killing:
    """Runs that are killed."""

    place: Path
    workers: int
    drawn: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0
    whole: dict[str, str] = field(default_factory=dict)  # SHA-256 of what an unbroken run tuned
    begun: bool = False  # had the processes that were killed last made a step?

    def all(self, kills: int) -> dict[str, object]:
        """So many kills."""
        self._inputs()
        for way in WAYS:
            output = self.place / f"whole-{way}"
            began = time.monotonic()
            out = self._start(way, output).communicate()[0]
            self.seconds = time.monotonic() - began
            self.whole[way] = digest(output) if (output / "result.json").exists() else out
        number = 0
        while self.counts["kills"] < kills:
            self._run(WAYS[number % 2], self.place / f"run-{number}", kills)
            number += 1
        return {**self.counts, "slowest_end_seconds": round(self.slowest, 1), "bad": self.bad}

    def _inputs(self) -> None:
        from support import tiny

        tiny.save("llama", self.place / "llama")
        tiny.write_rows(self.place / "rows.jsonl", 40)

    def _start(self, way: str, output: Path) -> subprocess.Popen[str]:
        """A run, or the rest of one that was begun there."""
        new = (
            "--model", self.place / "llama", "--data", self.place / "rows.jsonl", "--method", "full",
            "--precision", "fp32",
            "--max-steps", STEPS, "--save-every", EVERY, "--eval-every", 2 * EVERY, "--sample-prompts", 2,
            "--parallel", way,
        )  # fmt: skip
        how = ("--resume",) if (output / "seal.json").exists() else new
        typed = ("train", *how, "--output", output, "--workers", self.workers)
        return subprocess.Popen(
            [sys.executable, "-m", "fitune", *map(str, typed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def _run(self, way: str, output: Path, kills: int) -> None:
        """A run that is killed until it is through."""
        while True:
            rank, inside = self.drawn.randrange(self.workers), self.drawn.random() < 0.5
            after = self.drawn.uniform(0.2, 0.9) * self.seconds
            process = self._start(way, output)
            killed = self.counts["kills"] < kills and self._kill(process, output, rank, None if inside else after)
            began = time.monotonic()
            out, _ = process.communicate()
            if not killed:
                break
            self._judge(way, rank, process.returncode, out, time.monotonic() - began)
        self.counts["runs"] += 1
        same = (output / "result.json").exists() and digest(output) == self.whole[way]
        if not same:
            self.bad.append(f"{way}: other bits, or no end: {out[-1000:]}")
        print(f"{way}: through, {'the same bits' if same else 'OTHER BITS'}", flush=True)

    def _kill(self, process: subprocess.Popen[str], output: Path, rank: int, after: float | None) -> bool:
        """Kill a process of the run after a time, or inside a save that is not its first; False: it was through."""
        end, before = time.monotonic() + (after or 600), lines(output)
        saves = (steps(output) // EVERY + self.drawn.randrange(1, 4)) * EVERY  # a save comes right behind that step
        while process.poll() is None:
            if (after is None and steps(output) >= saves) or time.monotonic() > end:
                break
            time.sleep(LOOK if after is None else 0.05)
        child = of_rank(process, rank)
        if child is None or process.poll() is not None:
            return False
        self.counts["kills"] += 1
        self.counts["inside a save"] += after is None
        self.counts["of process 0"] += rank == 0
        self.begun = bool(set(lines(output)) - set(before))  # one that goes on makes logged steps again
        os.kill(child, signal.SIGKILL)
        return True

    def _judge(self, way: str, rank: int, code: int, out: str, seconds: float) -> None:
        self.slowest = max(self.slowest, seconds)
        wrong = [] if code else ["exit code 0"]
        wrong += [] if seconds < SOON else [f"{seconds:.0f} s until the rest ended"]
        wrong += [] if f"process {rank} of this run was killed by signal 9" in out else [f"process {rank} is not named"]
        wrong += [] if not self.begun or re.search(r"step \d+", out) else ["no step is named"]
        wrong += [] if not self.begun or rank == 0 or re.search(r"^  \S", out, re.MULTILINE) else ["no last words"]
        if wrong:
            print(out[-1000:], flush=True)
            self.bad.append(f"{way}: {'; '.join(wrong)}: {out[-1000:]}")
        print(f"{way}: process {rank}, the rest after {seconds:.1f} s, {'; '.join(wrong) or 'good'}", flush=True)


def of_rank(process: subprocess.Popen[str], rank: int) -> int | None:
    """The id of one of the processes that this one started."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        for child in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    except OSError:
        pass
    return None


def steps(output: Path) -> int:
    """How many steps the log has."""
    return sum(line.endswith(b"\n") for line in lines(output))


def lines(output: Path) -> list[bytes]:
    """Of the log; with their seconds no two steps that were made have the same."""
    file = output / "steps.jsonl"
    return file.read_bytes().splitlines(keepends=True) if file.exists() else []


def digest(folder: Path) -> str:
    """SHA-256 of what a run tuned."""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
