"""What a process of a run of several leaves in the run folder: logs/rank-1.log.

In: the folder, the number of the process. Out: lines, and the stack of a process that is late: it is written by a timer
of the C library that needs nothing of the process, which may wait anywhere (no torch).
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

FOLDER = "logs"
MOVED = "goes on in "  # the last line of what a process wrote before its log was there
LAST = 12  # lines of what a process wrote last
LONGEST = 80  # lines of a stack, and of what came after it
STACK = "Timeout ("  # what a stack begins with
MOST = 2**16  # bytes of a log that are looked at


def path_of(run: Path, rank: int) -> Path:
    """The log of a process."""
    return run / FOLDER / f"rank-{rank}.log"


class RankLog:
    """The log of this process.

    Args:
        run: the run folder.
        rank: the number of this process.
        all_of_it: what it prints goes there, too.
    """

    def __init__(self, run: Path, rank: int, *, all_of_it: bool) -> None:
        self.run = run
        path = path_of(run, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8", buffering=1)
        if all_of_it:
            sys.stderr.write(f"{MOVED}{path.absolute()}\n")
            sys.stderr.flush()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(self.file.fileno(), stream.fileno())

    def line(self, text: str) -> None:
        """One more line."""
        self.file.write(f"{text}\n")

    def write_stack_after(self, seconds: float) -> None:
        """Write down where this process is, unless it is `in_time`."""
        faulthandler.dump_traceback_later(seconds, file=self.file)

    def in_time(self) -> None:
        """It is not late."""
        faulthandler.cancel_dump_traceback_later()

    def end_of(self, rank: int) -> str:
        """What a process wrote last; of one that is late, from its stack on."""
        path = path_of(self.run, rank)
        return "\n".join([f"{path} ends with:", *(f"  {line}" for line in last_of(path))])


def last_of(path: Path) -> list[str]:
    """The last lines of a log: from the last stack on, where there is one, and of a log that goes on in another, of
    that one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - MOST))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        return [str(error)]
    if lines and lines[-1].startswith(MOVED):
        return [*lines[-LAST:-1], *last_of(Path(lines[-1].removeprefix(MOVED)))]
    stacks = [at for at, line in enumerate(lines) if line.startswith(STACK)]
    late = bool(stacks) and len(lines) - stacks[-1] <= LONGEST
    return lines[max(0, stacks[-1] - 1) :] if late else lines[-LAST:]
