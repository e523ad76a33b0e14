"""Processes of their own for what takes long: they go on when the page is closed, and when its server ends.

In: the arguments of a command. Out: a process that runs it, with what it prints in a log beside the runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fitune.core.files import disk

TAIL = 6_000  # characters of a log that are shown


@dataclass
class Processes:
    """Those that this server started, by name; the logs of all stand in the folder.

    Args:
        logs: the folder of the logs.
        work: the working folder.
    """

    logs: Path
    work: Path
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Run `fitune ARGUMENTS`.

        Raises:
            RunFolderError: the log cannot be written.
        """
        log = self.log(name)
        with disk(self.logs, "free some space"):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("ab")  # a run that goes on writes behind what it wrote before
        # -P: no module of the working folder takes the place of one of Python's
        command = [sys.executable, "-P", "-m", "fitune", *arguments]
        with file, self.lock:
            self.started[name] = subprocess.Popen(  # noqa: S603  # our own command; no shell
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=self.work,
                env={**os.environ, "NO_COLOR": "1"}, start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> Path:
        """Where what it prints goes."""
        return self.logs / f"{name.replace('/', '-')}.log"

    def tail(self, name: str) -> str:
        """The end of what it printed; empty where there is no log."""
        try:
            with self.log(name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                return file.read().decode("utf-8", "replace").replace("\r", "\n")
        except OSError:
            return ""

    def code(self, name: str) -> int | None:
        """Its exit code; None: it works, or is none of this server's."""
        process = self.started.get(name)
        return None if process is None else process.poll()

    def works(self, name: str) -> bool:
        """Is it one of this server's that has not ended?"""
        return name in self.started and self.started[name].poll() is None

    def end(self, name: str) -> None:
        """End it; a run that has begun saves the step in progress."""
        if self.works(name):
            self.started[name].terminate()

    def names(self) -> list[str]:
        """All that this server started, the newest first."""
        return list(reversed(self.started))
