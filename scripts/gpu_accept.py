"""Everything that only a GPU can show, in eight minutes, on a machine with next to nothing installed.

    python scripts/gpu_accept.py --out DIR [--seconds 480] [--only NAME ...] [--dry-run]

Sections (`scripts/gpu_checks.py`) run in processes of their own, each with a deadline, so that one that fails, hangs or
breaks the driver stops no other; this process imports no torch. Each check is a line of JSON in DIR/gpu.jsonl, written
and synced when it is known; DIR/SECTION.log has what a section printed, DIR/summary.txt the table that ends the run,
also where it is told to stop. `--dry-run` goes through every section on a CPU, with tiny models: it shows that the code
runs, not what a GPU does. `scripts/gpu_prepare.py` makes what a bare machine needs.

Exit code: 1 where a check failed, or a section ended without one; else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CHECKS = Path(__file__).with_name("gpu_checks.py")
RESULTS, SUMMARY = "gpu.jsonl", "summary.txt"
LEAST = 10.0  # seconds under which a section is not begun
DRY = 5  # times the deadlines where there is no GPU, and perhaps other work beside
GRACE = 3.0  # seconds between the wish and the force to end


@dataclass(frozen=True)
class Section:
    """A part of the acceptance. seconds: its deadline, of 480 in all."""

    name: str
    seconds: int


# What tells most stands first, for a machine that is taken away early.
SECTIONS = (
    Section("machine", 40),
    Section("kernels", 60),
    Section("resume", 75),
    Section("throughput", 120),
    Section("runs", 60),
    Section("memory", 75),
    Section("capped", 50),
)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all sections together")
    parser.add_argument("--only", nargs="*", choices=[one.name for one in SECTIONS], help="these sections")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [one for one in SECTIONS if not args.only or one.name in args.only]
    signal.signal(signal.SIGTERM, _stop)
    try:
        run_all(wanted, args.out, args.seconds, dry=args.dry_run)
    except (KeyboardInterrupt, SystemExit):
        _write(args.out, {"section": "all", "check": "interrupted", "passed": False})
    rows = read(args.out)
    text = table(rows)
    (args.out / SUMMARY).write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(row["passed"] for row in rows) else 1


def run_all(sections: Iterable[Section], out: Path, seconds: float, *, dry: bool) -> None:
    """Each section in a process of its own, as long as there is time."""
    _write(out, {"section": "all", "check": "begin", "passed": True, **_header(dry=dry)})
    end = time.monotonic() + seconds
    for section in sections:
        left = end - time.monotonic()
        if left < LEAST:
            _write(out, {"section": section.name, "check": "begun", "passed": False, "why": "no time left"})
            continue
        run_section(section, out, min(section.seconds * (DRY if dry else 1), left), dry=dry)


def run_section(section: Section, out: Path, seconds: float, *, dry: bool) -> None:
    """One section; that it ended, and how, is a check too."""
    command = [sys.executable, str(CHECKS), section.name, "--out", str(out), *(["--dry-run"] if dry else [])]
    began = time.monotonic()
    with (out / f"{section.name}.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(child)
    took = round(time.monotonic() - began, 1)
    why = {} if code == 0 else {"why": "too late" if code is None else f"exit code {code}", "last": _last(log.name)}
    _write(out, {"section": section.name, "check": "ended", "passed": code == 0, "seconds": took, **why})


def end_group(child: subprocess.Popen[Any]) -> None:
    """End a section and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def _stop(number: int, frame: object) -> None:
    raise SystemExit(1)


def _header(*, dry: bool) -> dict[str, Any]:
    """Date, commit, what this is."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = found.stdout.strip() or os.environ.get("FITUNE_COMMIT")
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "dry_run": dry}


def _last(log: str, most: int = 1500) -> str:
    return Path(log).read_text(encoding="utf-8", errors="replace")[-most:]


def _write(out: Path, row: dict[str, Any]) -> None:
    """One line, on the disk when this returns."""
    with (out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[dict[str, Any]]:
    """The checks that are there; a line that was not finished counts as a failed one."""
    rows = []
    for line in (out / RESULTS).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append({"section": "all", "check": "a broken line", "passed": False, "why": line[:80]})
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each check: section, check, passed or failed, and its figures."""
    lines = []
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ("section", "check", "passed", "last")}
        figures = ", ".join(f"{key} {value}" for key, value in rest.items())
        lines.append(
            f"{row['section']:<11}{row['check']:<34}{'passed' if row['passed'] else 'FAILED'}  {figures}"[:200]
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
