"""`fitune serve` in a process of its own, and clients for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(*arguments: object, log: Path) -> Iterator[str]:
    """The address of a server; its standard error goes to a file."""
    command = [sys.executable, "-m", "fitune", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file, subprocess.Popen(command, stderr=file, env=environment) as process:
        try:
            yield _address(process, log, command)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path, command: Sequence[str]) -> str:
    while process.poll() is None:
        if found := re.search(r"serving at (\S+);", log.read_text()):
            return found[1]
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"{' '.join(command)}\n{log.read_text()}")
