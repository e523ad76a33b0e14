"""One process at a time in a run folder.

In: a folder. Out: a lock that the operating system holds for this process, so that it is gone with it, however it
ends. The lock is on a file, `run.lock`, which says who holds it; the file alone, left behind by a process that was
killed, locks nothing.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fitune.core.errors import RunFolderError
from fitune.core.files import LOCK, disk

TRIES, APART = 10, 0.05  # a reader that asks who holds it has it for a moment
NOT_HERE = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without locks


class InUseError(RunFolderError):
    """Another process works in the run folder."""


class _NoLocksError(OSError):
    """The file system has no locks."""


if os.name == "nt":
    import msvcrt

    FAR = 1 << 30  # the byte that is locked: what is locked cannot be read, and the text is to be read

    def _lock(handle: int) -> bool:
        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # of Windows alone
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                return False
            raise _NoLocksError(error.errno, error.strerror) from error
        return True
else:
    import fcntl

    def _lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno in NOT_HERE:
                raise _NoLocksError(error.errno, error.strerror) from error
            raise
        return True


@contextmanager
def held(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process of fitune works in the folder, which is made where it is not there.

    Args:
        folder: of a run.
        report: receives a warning where the file system has no locks; then there is none.

    Raises:
        InUseError: another process has it; the message says which.
        RunFolderError: something that is no file has the lock's name.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with disk(folder, "choose another --output"):
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire(folder, report)
        try:
            yield
        finally:
            if handle is not None:
                _release(folder / LOCK, handle)
    finally:
        with suppress(OSError):
            for place in made:  # those that stayed empty: nothing was begun
                place.rmdir()


def _acquire(folder: Path, report: Callable[[str], None]) -> int | None:
    path = folder / LOCK
    if path.exists() and not path.is_file():
        raise RunFolderError(
            f"{path}: not a file, so this run cannot be locked against other processes",
            received="a folder" if path.is_dir() else "a pipe or a device",
            fix="remove it, and run this command again",
        )
    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _lock(handle) and _is_file(handle, path):
                _write(handle)
                return handle
        except _NoLocksError:
            os.close(handle)
            report(f"{folder}: this file system has no locks: see to it that no other process works in this folder")
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(APART)
    raise _in_use(folder)


def _is_file(handle: int, path: Path) -> bool:
    """Is this still the file of that name? Who held it may have removed it in between."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return os.name == "nt" or (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)


def _write(handle: int) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": platform.node(), "started": started}) + "\n"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())


def _release(path: Path, handle: int) -> None:
    """Remove the file, then let go of it; Windows removes none that is open."""
    if os.name == "nt":
        os.close(handle)
    try:
        with suppress(OSError):
            path.unlink()
    finally:
        if os.name != "nt":
            os.close(handle)


def holder(folder: Path) -> str | None:
    """Who works in the folder: process, host, since when. None: nobody, as far as can be known."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        return None if _lock(handle) else _holder_of(folder)
    except OSError:
        return None
    finally:
        os.close(handle)


def process(folder: Path) -> int | None:
    """The process of this machine that works in the folder; None: none does, or one of another machine."""
    if holder(folder) is None:
        return None
    try:
        found = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return int(found["pid"]) if found["host"] == platform.node() and int(found["pid"]) > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check(folder: Path) -> None:
    """Raises InUseError where another process works in the folder."""
    if holder(folder) is not None:
        raise _in_use(folder)


def _holder_of(folder: Path) -> str:
    try:
        found = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _in_use(folder: Path) -> InUseError:
    return InUseError(
        f"{folder}: another process works in this run folder",
        received=_holder_of(folder),
        fix="wait until it has ended, or end it; then go on with --resume. For another run choose another --output",
    )
