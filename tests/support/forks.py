"""Processes that have what this one has imported, where the system can fork: to import it anew takes four seconds each.

In: what is to run, and files for what it prints. Out: a process. For tests of what processes do to each other; how a
command begins is tested with processes that begin anew (core/test_processor.py, core/test_clock.py).
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fitune.cli import main as cli

# macOS forks too, but not with libraries of its own at work
WAY = get_context("fork") if sys.platform == "linux" else get_context("spawn")


def start(
    work: Callable[..., object],
    *arguments: object,
    out: Path,
    err: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """A process that does some work and ends with its exit code.

    Args:
        work: a function of a module of `support` (of these, a new process can import one by its name).
        arguments: for it.
        out, err: what it prints goes there.
        environment: is added to this one's.
    """
    process = WAY.Process(target=_run, args=(work, arguments, out, err, environment or {}))
    process.start()
    return process


def command(*words: str) -> None:
    """Work: the command line."""
    sys.argv = ["fitune", *words]
    cli.main()


def script(path: Path, *words: str) -> None:
    """Work: a script."""
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def _run(
    work: Callable[..., object], arguments: tuple[object, ...], out: Path, err: Path, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    with out.open("w", encoding="utf-8", buffering=1) as printed, err.open("w", encoding="utf-8", buffering=1) as heard:
        os.dup2(printed.fileno(), 1)
        os.dup2(heard.fileno(), 2)
        sys.stdout, sys.stderr = printed, heard
        work(*arguments)
