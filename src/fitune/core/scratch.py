"""What is under construction: beside its final place, under a name of this process's own.

In: a final path. Out: a file or folder to write, which is renamed when it is whole. Its process holds a lock of the
operating system's on it, which is gone with the process however that ends; so the next one knows the leftovers of the
dead, also across containers that share a disk, and removes these and no others. Where there are no locks nothing is
removed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"
OURS = re.compile(rf"{re.escape(TEMPORARY)}.*\.(\d+)-[0-9a-f]{{8}}", re.DOTALL)
LONGEST = 150  # characters of a final name that go into one of ours; a file system takes 255 bytes

if os.name == "nt":

    def _lock(path: Path) -> int | None:
        """Windows removes no file that is open, and locks no folder: there the name says whose it is."""
        return None

    def _is_dead(path: Path) -> bool:
        import psutil

        found = OURS.fullmatch(path.name)
        return found is not None and not psutil.pid_exists(int(found[1]))

else:
    import fcntl

    def _lock(path: Path) -> int | None:
        """A handle that holds the lock; None: another process has it, there is no such file, or there are no locks."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there, mine = os.lstat(path), os.fstat(handle)
            if (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev):
                return handle
        except OSError:
            pass
        os.close(handle)
        return None

    def _is_dead(path: Path) -> bool:
        handle = _lock(path)
        if handle is None:
            return False
        os.close(handle)
        return True


class Scratch:
    """A folder or an empty file of this process's own.

    Args:
        final: beside which it stands; what dead processes left there is removed.
        file: is it a file? Else a folder that nobody else can read.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, final: Path, *, file: bool = False) -> None:
        sweep(final.parent)
        while True:
            name = f"{TEMPORARY}{_short(final.name)}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self.path = final.with_name(name)
            if file:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            else:
                self.path.mkdir(mode=0o700)
            handle = _lock(self.path)
            if handle is not None or self.path.exists():  # else another process swept it before it was locked
                break
        self._end = weakref.finalize(self, _end, self.path, handle)

    def close(self) -> None:
        """Remove it, where it was not renamed, and let go of it."""
        self._end()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def _end(path: Path, handle: int | None) -> None:
    try:
        remove(path)
    finally:
        if handle is not None:
            os.close(handle)


def _short(name: str) -> str:
    """A name that leaves room for more."""
    return name.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")


def remove(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sweep(folder: Path) -> None:
    """Remove what processes of ours that are dead left in a folder."""
    with suppress(OSError):
        for entry in [*os.scandir(folder)]:
            if entry.name.startswith(TEMPORARY) and OURS.fullmatch(entry.name) and _is_dead(Path(entry.path)):
                remove(Path(entry.path))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process of ours is at work on a file: it waits until it may be. Where there are no locks, and on
    Windows, all are."""
    path.touch()
    if os.name == "nt":
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def anywhere() -> Scratch:
    """A folder in the system's place for temporary files."""
    return Scratch(Path(tempfile.gettempdir()) / "fitune")
