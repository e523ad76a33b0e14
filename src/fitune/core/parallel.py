"""A run of several processes, by the names of what they find in their environment (no torch).

In: the environment. Out: is this process one of several, and which.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

STORE = "FITUNE_STORE"  # a file through which the processes of one machine meet
PARENT = "FITUNE_PARENT"  # set: the process that started this one holds its input open
MOST = 64  # processes of a run that one command starts
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # by sys.platform


def size() -> int:
    """How many processes make this run, by WORLD_SIZE, as torchrun and `fitune train --workers` set it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def size_here() -> int:
    """How many of them run on this machine, by LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(size())))


def rank() -> int:
    """The number of this one."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def stop_with_parent() -> None:
    """Where the process that started this one is gone, process 0 stops as after SIGTERM: it saves and ends."""
    if PARENT in os.environ and rank() == 0:
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not its buffer, whose lock a program cannot end with
        pass
    os.kill(os.getpid(), signal.SIGTERM)
