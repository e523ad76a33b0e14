"""Kills, full disks, damage, races and malformed inputs, drawn from a seed: `python scripts/torture.py --minutes 10`.

Writes results/torture.json: of each kind how many cases were tried, refused by name, or ended as if nothing had
happened, and of each bad one (SILENT: believed though it is wrong; TRACEBACK; DEAD END: nothing goes on; SLOW) its
name, which repeats it:

    python scripts/torture.py --seed 1 --case damage:17

The minutes decide how many cases there are (for 10: 200 kills, 60 bad disks, 1,500 damaged folders, 28 races, 325
inputs), not when it stops: the same seed and minutes are the same cases everywhere. It takes about twice as long on two
cores (`--minutes 4 --seed 5`: 502 s).
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

from tortures import damage, disks, inputs, kills, races  # noqa: E402
from tortures.kinds import BAD, MAIN, Bench, Verdict  # noqa: E402

FULL = {"kill": 200, "disk": 60, "damage": 1500, "race": 28, "input": 325}  # cases of ten minutes
Case = Callable[[int], tuple[str, Verdict]]


def warm() -> None:
    """Import what every child needs, so that none has to; nothing is computed here, so forking stays safe."""
    from fitune.core import imports, quiet

    atexit.register(quiet.at_the_end)
    with imports.for_good():  # as the command does it
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import pyarrow.parquet  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        from fitune.cli import main as cli  # noqa: F401
        from fitune.commands import chat, evaluate, merge, train  # noqa: F401

    torch.set_num_threads(1)


def cases(bench: Bench, seed: int, counts: dict[str, int], workers: int) -> dict[str, Case]:
    """Of each kind what does its n-th case; whatever these are compared with is made first."""
    killed = kills.kinds_of(counts["kill"]) if counts.get("kill") else []
    damaged = sorted({kind for kind, _ in damage.pairs(counts["damage"])}) if counts.get("damage") else []
    few: tuple[str, ...] = MAIN if counts.get("disk") or counts.get("race") else ()
    few = few[: max(counts.get("disk", 0), -(-counts.get("race", 0) // len(races.PAIRS)))]
    bench.prepare(list(dict.fromkeys(["lora", *killed, *damaged, *few])), workers)
    made: dict[str, Case] = {
        "kill": partial(kills.case, bench, seed, kinds=killed),
        "disk": partial(disks.case, bench, seed),
        "race": partial(races.case, bench, seed),
        "input": partial(inputs.case, bench, seed),
    }
    if counts.get("damage"):
        made["damage"] = partial(damage.case, bench, seed, compare=damage.prepare(bench, counts["damage"], workers))
    return made


def tried(made: dict[str, Case], todo: list[tuple[str, int]], workers: int) -> Iterator[dict[str, Any]]:
    """The rows of all cases, so many at once, each in a process of its own."""
    waiting, running = list(reversed(todo)), dict[int, tuple[str, int, int]]()
    while waiting or running:
        while waiting and len(running) < workers:
            kind, number = waiting.pop()
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _one(made[kind], kind, number, writing)
            os.close(writing)
            running[pid] = kind, number, reading
        pid, _ = os.wait()
        if pid in running:
            kind, number, reading = running.pop(pid)
            with os.fdopen(reading) as stream:
                text = stream.read()
            yield json.loads(text or "null") or _row(kind, number, "", Verdict("TRACEBACK", "the case itself died"))


def _one(case: Case, kind: str, number: int, writing: int) -> None:
    """In a process of its own: do a case and hand its row over."""
    import traceback

    try:
        row = _row(kind, number, *case(number))
    except BaseException:
        row = _row(kind, number, "", Verdict("TRACEBACK", f"the case itself failed: {traceback.format_exc()[-600:]}"))
    with os.fdopen(writing, "w") as stream:
        json.dump(row, stream)
    os._exit(0)


def _row(kind: str, number: int, what: str, verdict: Verdict) -> dict[str, Any]:
    return {"case": f"{kind}:{number}", "what": what, "result": verdict.result, "says": verdict.says}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """What came of it, a line a kind."""
    heads = ("tried", "refused", "equal", *BAD)
    lines = [f"{'':8}" + "".join(f"{head:>11}" for head in heads)]
    for kind in FULL:
        found = Counter(row["result"] for row in rows if row["case"].startswith(f"{kind}:"))
        if found:
            lines.append(f"{kind:8}" + "".join(f"{n:>11,}" for n in (found.total(), *(found[h] for h in heads[1:]))))
    return lines


def record(rows: list[dict[str, Any]], seed: int, minutes: float, seconds: float) -> dict[str, Any]:
    """For results/torture.json."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    each = {kind: [row for row in rows if row["case"].startswith(f"{kind}:")] for kind in FULL}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python scripts/torture.py --minutes {minutes:g} --seed {seed}",
        "seconds": round(seconds),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "kills_inside_a_save": sum("inside a save" in row["what"] for row in each["kill"]),
        "counts": {kind: {"tried": len(some), **Counter(row["result"] for row in some)} for kind, some in each.items()},
        "bad": [row for row in rows if row["result"] in BAD],
    }


def main(given: argparse.Namespace) -> int:
    """Try all of it, or one case; 1 where anything was bad."""
    warm()
    began = time.monotonic()
    share = given.minutes / 10
    counts = {kind: max(1, round(number * share)) for kind, number in FULL.items()}
    counts = {kind: n for kind, n in counts.items() if not given.kinds or kind in given.kinds}
    with tempfile.TemporaryDirectory(prefix="fitune-torture-") as folder:
        os.environ["FITUNE_CACHE"] = f"{folder}/cache"
        os.environ["HOME"] = folder
        bench = Bench(Path(given.keep or folder).absolute())
        bench.root.mkdir(exist_ok=True, parents=True)
        if given.case:
            kind, number = given.case.split(":")
            row = next(
                tried(cases(bench, given.seed, {kind: counts.get(kind, 1)}, given.workers), [(kind, int(number))], 1)
            )
            print(json.dumps(row, ensure_ascii=False, indent=1))
            return int(row["result"] in BAD)
        made = cases(bench, given.seed, counts, given.workers)
        rows = []
        for row in tried(made, [(kind, n) for kind, count in counts.items() for n in range(count)], given.workers):
            rows.append(row)
            if row["result"] in BAD:
                print(f"{row['result']:10} {row['case']:12} {row['what']}: {row['says']}", flush=True)
    print("\n".join(table(rows)))
    if given.output:
        text = json.dumps(
            record(rows, given.seed, given.minutes, time.monotonic() - began), ensure_ascii=False, indent=1
        )
        Path(given.output).write_text(f"{text}\n", encoding="utf-8")
    return int(any(row["result"] in BAD for row in rows))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What is typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", help="KIND:NUMBER, of a row: that one again, of the same seed and minutes")
    parser.add_argument("--kinds", nargs="+", choices=list(FULL), help="only these")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--keep", help="a new folder for the runs, which stays")
    parser.add_argument("--output", default="results/torture.json", help="empty: none is written")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(arguments()))
