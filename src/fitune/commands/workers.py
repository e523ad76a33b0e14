"""`fitune train --workers N`: the same command in N processes of this machine, until one of them ends.

In: the command line. Out: its exit code. The processes meet in a file of a private folder, and their connections stay
on the loopback interface: no port is open for the network. (torch's own launcher serves a port on all of them, and its
processes meet by pickled states.) Ctrl-C and SIGTERM go to process 0, which finishes the step and saves. Where a
process dies, the others find it in their next exchange; those that have not ended by themselves a while later are
ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fitune.commands.signals import NAMES
from fitune.core import processor
from fitune.core.parallel import LOOPBACK, PARENT, STORE
from fitune.core.ranklog import last_of

GRACE = 12.0  # seconds in which the others may find out by themselves that one is gone
DONE = 2.0  # seconds for the others once process 0 has ended well
FORCE = 3.0  # seconds between the wish and the force to end
LOOK = 0.1  # seconds between two looks at the processes


@dataclass
class _Worker:
    """One of the processes. log: what it writes; None: it writes to the terminal."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def end(self) -> str:
        """How it ended."""
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"process {self.rank} of this run {how}"

    def last(self) -> list[str]:
        """Its last words."""
        return [f"  {line}" for line in last_of(self.log)] if self.log else []


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run the command in so many processes.

    Args:
        count: how many.
        arguments: of `fitune`, the verb first.

    Returns:
        The exit code: that of process 0 where it is not 0, else that of another that failed, else 0.
    """
    with tempfile.TemporaryDirectory(prefix="fitune-") as place:
        workers = [_start(rank, count, arguments, Path(place)) for rank in range(count)]
        with _passed_on(workers[0].process):
            first = _wait(workers)
            _finish(workers, GRACE if first else DONE)
        if first is not None and (first.rank or first.process.returncode < 0):
            heard = (
                first if first.rank else workers[1]
            )  # process 0 writes to the terminal; another has heard of its end
            sys.stderr.write("\n".join([first.end(), *heard.last()]) + "\n")
        if first is None:
            return 0  # whatever was left of the others, as where the run was finished before, was ended
        codes = [worker.process.returncode for worker in workers]
        return next((code if code > 0 else 1 for code in codes if code), 0)


def _start(rank: int, count: int, arguments: Sequence[str], place: Path) -> _Worker:
    log = place / f"process-{rank}.log" if rank else None
    command = [sys.executable, "-m", "fitune", *arguments]
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, PARENT: 1}
    own = {STORE: str(place / "store"), **{name: str(value) for name, value in numbers.items()}}
    environment = {**_shared(count), **os.environ, **own}
    with log.open("wb") if log else _terminal() as out:
        # a session of its own: Ctrl-C reaches it once, through this process. Its input ends with this process.
        process = subprocess.Popen(  # noqa: S603  # the command that was typed
            command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
        )  # fmt: skip
    return _Worker(rank, process, log)


@contextmanager
def _terminal() -> Iterator[None]:
    yield None


def _shared(count: int) -> Mapping[str, str]:
    """What the processes share: the machine's cores, and its loopback interface."""
    threads = {"OMP_NUM_THREADS": str(max(1, processor.cores() // count))}
    return {**threads, **({"GLOO_SOCKET_IFNAME": LOOPBACK[sys.platform]} if sys.platform in LOOPBACK else {})}


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, signals that stop a run go to this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if process.poll() is None:
            process.send_signal(number)

    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: Sequence[_Worker]) -> _Worker | None:
    """Until process 0 has ended, or one has failed; the one that failed first."""
    while True:
        failed = next((worker for worker in workers if worker.code), None)
        if failed is not None or workers[0].code is not None:
            return failed
        time.sleep(LOOK)


def _finish(workers: Sequence[_Worker], grace: float) -> None:
    """Those that are left end by themselves soon, or are ended."""
    for seconds, stop in ((grace, None), (FORCE, signal.SIGTERM), (None, signal.SIGKILL)):
        for worker in workers:
            if stop is not None and worker.code is None:
                worker.process.send_signal(stop)
        end = time.monotonic() + (seconds or FORCE)
        while time.monotonic() < end and any(worker.code is None for worker in workers):
            time.sleep(LOOK)
    for worker in workers:
        worker.process.wait()
        if worker.process.stdin is not None:
            worker.process.stdin.close()
