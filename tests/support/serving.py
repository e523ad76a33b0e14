"""`fitune serve` in a process of its own, and clients for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from support import forks


@contextmanager
def served(*arguments: object, log: Path) -> Iterator[str]:
    """The address of a server; its standard error goes to a file."""
    words = ("serve", *map(str, arguments), "--port", "0", "--device", "cpu")
    process = forks.start(forks.command, *words, out=log.with_name("printed"), err=log)
    try:
        yield _address(process, log)
    finally:
        process.terminate()
        process.join()


def _address(process: BaseProcess, log: Path) -> str:
    while process.is_alive():
        if log.exists() and (found := re.search(r"serving at (\S+);", log.read_text(encoding="utf-8"))):
            return found[1]
        process.join(0.1)
    raise AssertionError(log.read_text(encoding="utf-8"))
