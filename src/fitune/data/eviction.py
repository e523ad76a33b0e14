"""How much the cache of prepared data may hold, and what goes when it holds more.

In: the cache's folder. Out: its entries with their sizes; those that were not used for the longest time are removed,
and none that a living process uses: whoever reads an entry holds a lock on it, of the operating system's, which is gone
with the process. Where there are no locks only what nobody used for days is removed. Only folders that fitune writes
are looked at.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fitune.core.scratch import TEMPORARY, sweep
from fitune.core.units import GIB, MIB

KINDS = ("rows", "samples", "given", "plan", "reference")  # of entries
ENTRY = re.compile(rf"({'|'.join(KINDS)})-[0-9a-f]+-\d+")
IDLE = 86400.0  # seconds without use, where nobody can be asked who uses it

if os.name == "nt":

    def hold(path: Path) -> int | None:
        """Windows locks no folder."""
        return None

    def unused(path: Path) -> bool:
        """Was it not used for long?"""
        return time.time() - path.stat().st_mtime > IDLE

else:
    import fcntl

    def hold(path: Path) -> int | None:
        """A handle by which this process uses an entry until it is closed; None: there are no locks here.

        Raises:
            FileNotFoundError: the entry was just removed.
        """
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            there = path.stat()
        except BlockingIOError:
            os.close(handle)
            raise FileNotFoundError(path) from None
        except FileNotFoundError:
            os.close(handle)
            raise
        except OSError:
            os.close(handle)
            return None
        if there.st_ino != os.fstat(handle).st_ino:
            os.close(handle)
            raise FileNotFoundError(path)
        return handle

    def unused(path: Path) -> bool:
        """Does nobody use the entry?"""
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - path.stat().st_mtime > IDLE
        finally:
            os.close(handle)
        return True


@dataclass(frozen=True)
class Entry:
    """A folder of prepared data. used: when it was last, in seconds."""

    path: Path
    bytes: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """What is kept in a cache, the longest unused first."""
    found = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # another process may remove it meanwhile
                size = sum(file.stat().st_size for file in path.iterdir())
                found.append(Entry(path, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.path))


def shrink(folder: Path, most: int, report: Callable[[str], None] = lambda text: None) -> tuple[int, int]:
    """Remove what was not used for the longest time until the rest fits.

    Args:
        folder: the cache.
        most: bytes that may stay.
        report: receives what was removed, and why.

    Returns:
        How many entries and bytes were removed.
    """
    kept = entries(folder)
    total, gone, freed = sum(entry.bytes for entry in kept), 0, 0
    for entry in kept:
        if total - freed <= most:
            break
        with suppress(OSError):
            if unused(entry.path):
                remove(entry.path)
                gone, freed = gone + 1, freed + entry.bytes
    if gone:
        report(
            f"cache {folder}: {gone} of {len(kept)} entries removed, {size_text(freed)}, the longest unused first: "
            f"it may hold {size_text(most)} (--cache-size)"
        )
    return gone, freed


def clean(folder: Path) -> tuple[int, int]:
    """Remove all that no living process uses, and what dead ones left behind; how many entries, and their bytes."""
    if folder.is_dir():
        sweep(folder)
    return shrink(folder, 0)


def remove(path: Path) -> None:
    """An entry, at once out of everybody's sight."""
    gone = path.with_name(f"{TEMPORARY}gone-{uuid.uuid4().hex[:8]}")
    path.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def size_text(count: int) -> str:
    """Bytes for a person."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.1f} MiB"
