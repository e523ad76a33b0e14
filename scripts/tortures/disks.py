"""Full and failing disks: at every write of a run.

EIO or ENOSPC at an event (opening, renaming, syncing, making a folder) once or from there on; a limit to the size of
files (EFBIG, as a full quota); a small file system of its own that is really full, where this process may mount one.
The run must say so and end with exit code 2; with the trouble gone it goes on, and ends as the unbroken one.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tortures.children import Ran, Trouble, fitune
from tortures.kinds import MAIN, Bench, Verdict, drawn, go_on, judged

ALWAYS = 10**9


def case(bench: Bench, seed: int, number: int) -> tuple[str, Verdict]:
    """A run on a bad disk; see kills.case."""
    numbers = drawn(seed, "disk", number)
    kind = MAIN[number % len(MAIN)]
    place = bench.root / "disk" / str(number)
    way = ("EIO once", "EIO", "ENOSPC", "size", "ENOSPC", "full")[number % 6]
    if way == "full":
        with small_disk(place / "disk", numbers.randrange(40, 1400)) as disk:
            if disk is not None:
                return _on_small_disk(bench, kind, disk, place)
        way = "size"
    run = place / "run"
    events = bench.unbroken(kind)["events"]
    at = numbers.randrange(len(events))
    if way == "size":
        size = int(10 ** numbers.uniform(1.5, 5.5))
        trouble, case = Trouble(run, file_size=size), f"{kind}, files of at most {size} bytes"
    else:
        error = errno.EIO if way.startswith("EIO") else errno.ENOSPC
        trouble = Trouble(run, fail_at=at, times=1 if "once" in way else ALWAYS, number=error)
        case = f"{kind}, {way} at event {at} ({events[at].replace(str(bench.finished(kind)), 'RUN')})"
    ended = fitune(*bench.words(kind, run), place=place, trouble=trouble)
    if (bad := _reports_it(ended, trouble.file_size)) is not None:
        return case, bad
    if ended.code == 0:
        return f"{case}, passed over", judged(bench, kind, run, ended)
    again, how = go_on(bench, kind, run, place)
    return f"{case}, {how}", judged(bench, kind, run, again)


def _reports_it(ended: Ran, most: int | None) -> Verdict | None:
    """What is wrong with how a run ended on a bad disk. most: bytes of a file; what is printed goes into one, too."""
    cut = most is not None and len(ended.err.encode()) >= most
    if ended.traceback:
        return Verdict("TRACEBACK", ended.last())
    if ended.code == 2 and not cut and "error:" not in ended.err and ended.err.strip():
        return Verdict("TRACEBACK", f"no message: {ended.last()}")
    return None


def _on_small_disk(bench: Bench, kind: str, disk: Path, place: Path) -> tuple[str, Verdict]:
    run = disk / "run"
    size = shutil.disk_usage(disk).total // 1024
    case = f"{kind}, a disk of {size} KiB"
    ended = fitune(*bench.words(kind, run), place=place)
    if (bad := _reports_it(ended, None)) is not None:
        return case, bad
    if ended.code:
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True)
        ended, how = go_on(bench, kind, run, place)
        case = f"{case}, {how}"
    return case, judged(bench, kind, run, ended)


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path | None]:
    """A file system of so many KiB; None where this process may not mount one."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False, capture_output=True)
