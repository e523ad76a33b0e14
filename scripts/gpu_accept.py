"""Everything that only a GPU can show, in eight minutes, on a machine with next to nothing installed.

    python scripts/gpu_accept.py --out DIR [--seconds 480] [--only NAME ...] [--dry-run]

Sections (`scripts/gpu_checks.py`) run in processes of their own, each with a deadline, so that one that fails, hangs or
breaks the driver stops no other; this process imports no torch. Each check is a line of JSON in DIR/gpu.jsonl, written
and synced when it is known; DIR/sections.log has what the sections printed, DIR/summary.txt the table that ends the
run, also where it is asked to stop. Where the folder takes no more, the rest is printed. `--dry-run` goes through every
section on a CPU, with tiny models: it shows that the code runs, not what a GPU does. Packages that a bare machine lacks
are taken from `.whl/`, which `scripts/gpu_prepare.py` fills. docs/gpu.md says how to report what came out.

Exit code: 1 where a check failed, or a section ended without one; else 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHECKS = Path(__file__).with_name("gpu_checks.py")
WHEELS, PREPARED = ROOT / ".whl", ROOT / ".gpu" / "prepared.json"  # of scripts/gpu_prepare.py
RESULTS, SUMMARY, LOG = "gpu.jsonl", "summary.txt", "sections.log"
MARK = "RESULT "  # begins a line of a section that is a check
SECONDS = 480.0
DRY = 5  # times as long where there is no GPU, and perhaps other work beside
LEAST = 10.0  # seconds under which a section is not begun
GRACE = 3.0  # seconds between the wish and the force to end
LAST = 1500  # characters of what a failed section printed last
WIDTH = 200  # of a line of the summary
LOG_MOST = 4 * 2**20  # characters of the log: it must not take the room of the results

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the acceptance. seconds: its share of 480; what a stage leaves over is there for those behind it."""

    name: str
    seconds: int


# Those of a stage run side by side, where cores allow it: they mostly wait for processes to start and for plans. What
# shows most stands first, for a machine that is taken away early.
STAGES = (
    (Section("machine", 75),),
    (Section("kernels", 130), Section("resume", 130), Section("memory", 130)),
    (Section("throughput", 75),),
    (Section("parallel", 35),),
    (Section("runs", 85),),
    (Section("capped", 80),),
)
SECTIONS = tuple(itertools.chain(*STAGES))
CORES = 8  # from which on stages run side by side


@dataclass
class Results:
    """The checks so far, in memory and on the disk as long as that takes them; at: seconds since the beginning."""

    out: Path
    began: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)
    full: str = ""
    logged: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, section: str, check: str, passed: bool, **figures: Any) -> None:
        """One more check: when this returns, it is on the disk."""
        row = {"section": section, "check": check, "passed": passed, **figures}
        row["at"] = round(time.monotonic() - self.began, 1)
        with self._lock:
            self.rows.append(row)
            print(line(row), flush=True)
            self._to(RESULTS, json.dumps(row, ensure_ascii=False) + "\n")

    def log(self, text: str) -> None:
        """What a section printed; not without end."""
        if self.logged < LOG_MOST:
            self.logged += len(text)
            self._to(LOG, text if self.logged < LOG_MOST else text[:1000] + "\n... (no more is kept)\n", synced=False)

    def end(self, seconds: float) -> bool:
        """The summary, as the last line of the results, as a table, and printed. Passed?"""
        if self.full:
            self.add("all", "folder of the results", False, why=self.full)
        failed = [f"{row['section']}: {row['check']}" for row in self.rows if not row["passed"]]
        text = table(self.rows)
        self.add("all", "summary", not failed, checks=len(self.rows), failed=failed, seconds=round(seconds, 1))
        text += line(self.rows[-1]) + "\n"
        self._to(SUMMARY, text, mode="w")
        print(f"\n{text}", flush=True)
        return not failed

    def _to(self, name: str, text: str, mode: str = "a", *, synced: bool = True) -> None:
        try:
            with (self.out / name).open(mode, encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
        except OSError as error:  # a full disk, a folder that went away: the run goes on, and prints
            self.full = f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class How:
    """How sections are run. together: all of them in one process, which saves imports; without deadlines of their
    own. packages: a folder for the path, or None. work: for runs and models, deleted at the end. children: processes
    that were started, to end them."""

    dry: bool
    together: bool
    work: Path
    packages: Path | None = None
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, names: Sequence[str], seconds: float) -> list[str]:
        """What starts a process that goes through sections."""
        flags = [*(["--dry-run"] if self.dry else []), *(["--together"] if self.together else [])]
        given = ["--work", str(self.work), "--seconds", f"{seconds:.0f}"]
        return [sys.executable, str(CHECKS), *names, *given, *flags]

    def environment(self) -> dict[str, str]:
        """Of these processes. The tree stands before the packages: among them is a wheel of fitune, which may be of
        another commit."""
        ahead = [str(ROOT / "src"), *([str(self.packages)] if self.packages else [])]
        path = os.pathsep.join([*ahead, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    """See the module's text."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    stages = chosen(args.only, beside=not args.dry_run and (os.cpu_count() or 1) >= CORES)
    seconds = args.seconds or SECONDS * (DRY if args.dry_run else 1)
    results, began = Results(args.out), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="fitune-gpu-"))
    signal.signal(signal.SIGTERM, _stop)
    try:
        results.add("all", "begin", True, **header(dry=args.dry_run))
        packages = unpack(WHEELS, work / "packages", results)
        run_all(stages, results, seconds, How(args.dry_run, args.together, work, packages))
    except (KeyboardInterrupt, SystemExit):
        results.add("all", "interrupted", False)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the summary comes, whatever else is wished
        passed = results.end(time.monotonic() - began)
        shutil.rmtree(work, ignore_errors=True)
    return 0 if passed else 1


def parsed() -> argparse.Namespace:
    """What is typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; three files")
    parser.add_argument("--seconds", type=float, help=f"for all sections: {SECONDS:.0f}; {DRY} times that in a dry run")
    parser.add_argument("--only", nargs="*", choices=[one.name for one in SECTIONS], help="these sections")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny models")
    parser.add_argument("--together", action="store_true", help="of a dry run: all sections in one process")
    args = parser.parse_args()
    if args.together and not args.dry_run:
        parser.error("--together is for a dry run: on a GPU one section must not take another with it")
    return args


def header(*, dry: bool) -> Row:
    """Date, commit, what this is."""
    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    if not commit and PREPARED.exists():  # a copy without its history
        commit = json.loads(PREPARED.read_text(encoding="utf-8")).get("commit", "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "changed": bool(changed),
        "dry_run": dry, "python": sys.version.split()[0],
    }  # fmt: skip


def git(*words: str) -> str:
    """What git answers here; nothing where there is none."""
    with suppress(OSError):
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


# ---- packages that are not here ----


def unpack(wheels: Path, into: Path, results: Results) -> Path | None:
    """Those of the wheels whose package is not installed, or is older than what fitune asks for, as a folder for the
    path; None: there are none.

    Wheels that were made for another Python cannot be used: that is a failed check.
    """
    found = sorted(wheels.glob("*.whl"))
    least = {name: bound for path in found if path.name.startswith("fitune-") for name, bound in bounds(path).items()}
    missing = [path for path in found if not installed(path, least)]
    wrong = [path.name for path in missing if not fits(path.name)]
    for path in missing:
        with zipfile.ZipFile(path) as packed:
            packed.extractall(into)
    if found:
        names = [path.name.split("-")[0] for path in missing]
        why = {"why": f"for another Python: {', '.join(wrong)}"} if wrong else {}
        results.add("all", "packages", not wrong, unpacked=names, installed_already=len(found) - len(missing), **why)
    return into if missing else None


def bounds(path: Path) -> dict[str, tuple[int, ...]]:
    """The lowest versions that a wheel asks of other packages."""
    with zipfile.ZipFile(path) as packed:
        name = next(name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        text = packed.read(name).decode("utf-8")
    asked = re.findall(r"^Requires-Dist: ([\w.-]+).*?>=([\d.]+)", text, re.MULTILINE)
    return {plain(name): numbers(version) for name, version in asked}


def plain(name: str) -> str:
    """A package's name as wheels write it."""
    return re.sub(r"[-_.]+", "_", name).lower()


def numbers(version: str) -> tuple[int, ...]:
    """Of a version, to compare it."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def installed(path: Path, least: Mapping[str, tuple[int, ...]]) -> bool:
    """Is a wheel's package here, and not too old?"""
    name = path.name.split("-")[0]
    try:
        return numbers(metadata.version(name)) >= least.get(plain(name), ())
    except metadata.PackageNotFoundError:
        return False


def fits(name: str) -> bool:
    """Can this Python use a wheel of that name?"""
    python, abi = name.removesuffix(".whl").split("-")[-3:-1]
    found = re.match(r"cp3(\d+)$", python)
    minor = sys.version_info.minor
    return found is None or (minor >= int(found[1]) if abi == "abi3" else minor == int(found[1]))


# ---- sections ----


def run_all(stages: Sequence[Sequence[Section]], results: Results, seconds: float, how: How) -> None:
    """Each section in a process of its own, as long as there is time."""
    if how.together:
        run([one.name for stage in stages for one in stage], results, seconds, how)
        return
    end = time.monotonic() + seconds
    for at, stage in enumerate(stages):
        left = end - time.monotonic()
        share = left * most(stage) / sum(most(one) for one in stages[at:])
        if share < LEAST:
            for section in stage:
                results.add(section.name, "ended", False, why="no time left")
            continue
        with ThreadPoolExecutor(len(stage)) as pool:
            running = [pool.submit(run, [one.name], results, share, how) for one in stage]
            try:
                for one in running:
                    one.result()
            except BaseException:  # the pool waits for its threads, and each of them for its child
                for child in how.children:
                    end_group(child)
                raise


def most(stage: Sequence[Section]) -> int:
    """Seconds of the longest section of a stage."""
    return max(one.seconds for one in stage)


def chosen(only: Sequence[str] | None, *, beside: bool) -> list[list[Section]]:
    """The stages of the wanted sections; one section each where none shall run beside another."""
    wanted = [[one for one in stage if not only or one.name in only] for stage in STAGES]
    return [part for stage in wanted if stage for part in ([stage] if beside else [[one] for one in stage])]


def run(names: Sequence[str], results: Results, seconds: float, how: How) -> None:
    """Sections in one process; that it ended, and how, is a check too."""
    began, name = time.monotonic(), names[0] if len(names) == 1 else "all"
    results.log(f"==== {' '.join(names)}\n")
    child = subprocess.Popen(
        how.command(names, seconds), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=how.environment(), text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
    )  # fmt: skip
    how.children.append(child)
    last: deque[str] = deque(maxlen=60)
    reader = threading.Thread(target=read, args=(child, results, last, name), daemon=True)
    reader.start()
    code: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(seconds)
    finally:
        end_group(child)
        reader.join(GRACE)
    why = {"why": "too late" if code is None else f"exit code {code}", "last": "".join(last)[-LAST:]} if code else {}
    if code is None:
        why = {"why": f"not done after {seconds:.0f} s", "last": "".join(last)[-LAST:]}
    results.add(name, "ended", code == 0, seconds=round(time.monotonic() - began, 1), **why)


def read(child: subprocess.Popen[str], results: Results, last: deque[str], name: str) -> None:
    """Take down what a section prints: checks, and the rest."""
    assert child.stdout is not None
    for text in child.stdout:
        if not text.startswith(MARK):
            last.append(text)
            results.log(text)
            continue
        try:
            row = json.loads(text.removeprefix(MARK))
            results.add(row.pop("section"), row.pop("check"), row.pop("passed"), **row)
        except (ValueError, KeyError, TypeError):
            results.add(name, "a broken line", False, why=text[:80])


def end_group(child: subprocess.Popen[str]) -> None:
    """End a section and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    child.wait()


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the summary must still be written
    raise SystemExit(1)


# ---- what is printed ----


def line(row: Row) -> str:
    """A check in a line: section, check, passed or failed, and its figures."""
    rest = {key: value for key, value in row.items() if key not in ("section", "check", "passed", "last")}
    figures = " ".join(", ".join(f"{key} {value}" for key, value in rest.items()).split())
    return f"{row['section']:<11}{row['check']:<40}{'passed' if row['passed'] else 'FAILED'}  {figures}"[:WIDTH]


def table(rows: Iterable[Row]) -> str:
    """A line for each check."""
    return "".join(line(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
