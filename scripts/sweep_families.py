"""Every causal model type of the installed transformers, tuned: the table in docs/models.md.

    python scripts/sweep_families.py OUT.json                      # all types, each in three ways
    python scripts/sweep_families.py OUT.json --only mamba llama   # these; all else in OUT.json stays as it is
    python scripts/sweep_families.py OUT.json --ways lora --jobs 2
    python scripts/sweep_families.py --table                       # results/families.json as the page has it
    python scripts/sweep_families.py --table --write               # puts it there

In: tiny random models (tests/support/every_type.py). Out: a row of each type in OUT.json (tests/support/sweep.py). Each
type has a process of its own, so a crash or an endless loop is that type's result and ends nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads, and would wait for them

from support import every_type, sweep  # noqa: E402  # the path of the tests comes first

RESULTS, PAGE = ROOT / "results" / "families.json", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- scripts/sweep_families.py -->", "<!-- end -->"
MOST_SECONDS = 120  # of a processor, for one type


def one(kind: str, ways: list[str], out: Path) -> None:
    """Sweep a type in this process, and write its row."""
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    nothing = io.StringIO()
    quiet = contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing)
    with tempfile.TemporaryDirectory() as place, quiet[0], quiet[1]:
        row = sweep.swept(kind, Path(place), ways)
    out.write_text(json.dumps(asdict(row)), encoding="utf-8")


def forked(kind: str, ways: list[str], out: Path) -> int:
    """The number of a process that sweeps a type: what is imported here needs not be imported there."""
    number = os.fork()
    if number == 0:
        status = 1
        try:
            one(kind, ways, out)
            status = 0
        finally:
            os._exit(status)
    return number


def all_of(kinds: list[str], ways: list[str], jobs: int, found: dict[str, dict[str, object]], target: Path) -> None:
    """Sweep types, so many at once; each is written when it is done."""
    left, running = list(kinds), dict[int, tuple[str, Path]]()
    with tempfile.TemporaryDirectory() as place:
        while left or running:
            while left and len(running) < jobs:
                kind = left.pop(0)
                out = Path(place) / f"{kind}.json"
                running[forked(kind, ways, out)] = kind, out
            number, status = os.wait()
            kind, out = running.pop(number)
            if out.is_file():
                row = json.loads(out.read_text(encoding="utf-8"))
            else:
                why = f"the process ended by itself ({os.waitstatus_to_exitcode(status)})"
                row = asdict(sweep.failed(kind, why))
            print(sweep.line(row), flush=True)
            found[kind] = sweep.merged(found.get(kind), row)
            sweep.write(found, target)


def page(*, write: bool) -> None:
    """Print the table, or put it into its page."""
    lines = "\n".join(sweep.table(sweep.read(RESULTS)))
    if not write:
        print(lines)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{lines}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description="Every causal model type of transformers, tuned.")
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--only", nargs="+", default=list(every_type.TYPES))
    parser.add_argument("--ways", nargs="+", default=list(sweep.WAYS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        page(write=asked.write)
        return
    if asked.out is None:
        parser.error("OUT.json, or --table")
    sweep.warm()
    part = asked.only != list(every_type.TYPES) or asked.ways != list(sweep.WAYS)
    found = sweep.read(asked.out) if asked.out.is_file() and part else {}
    all_of(asked.only, asked.ways, asked.jobs, found, asked.out)


if __name__ == "__main__":
    main()
