"""Files that are there whole or not at all.

In: what is to be written. Out: atomic writes, folders sealed with a manifest of SHA-256 sums, and a full disk told as
what it is. A folder is written under a temporary name, each file synced, its manifest last; then it is renamed. What
has no manifest, or does not match it, does not count.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fitune.errors import RunFolderError, nearest

MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
UMASK = os.umask(0o022)  # the only way to ask for it is to set it
os.umask(UMASK)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIX = "free some space or choose another --output, then go on with --resume; earlier checkpoints are whole"


@contextmanager
def disk(folder: Path, fix: str = FIX) -> Iterator[None]:
    """A write that fails is told as what it is: a full disk, or a folder that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        raise RunFolderError(
            f"{folder}: {'the disk is full' if number in FULL else 'cannot be written'}",
            received=os.strerror(number) if number else str(error),
            fix=fix,
        ) from error


def _error_number(error: Exception) -> int | None:
    """The operating system's number of an error; safetensors, written in Rust, has it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk; some systems cannot open a folder. Who may read the file
    follows from the user's umask: safetensors makes files that nobody else can."""
    if path.is_file() and os.name != "nt":
        path.chmod(0o666 & ~UMASK)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        with suppress(OSError) if path.is_dir() or os.name == "nt" else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    with disk(path.parent):
        temporary = path.with_name(f"{TEMPORARY}{path.name}")
        temporary.write_text(text, encoding="utf-8", newline="\n")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON, atomically."""
    write_atomic(path, as_json(value, indent=1) + "\n")


def as_json(value: Any, **how: Any) -> str:
    """JSON that every reader takes: it has no word for what is not finite, so that is null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **how)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Sync every file, then write the manifest of their checksums: the marker that the folder is whole."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync(path)
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def is_whole(folder: Path) -> bool:
    """Does the folder have a manifest, and does every file match it?"""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == entry["bytes"] and sha256(folder / name) == entry["sha256"]
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_new(target: Path, fix: str = "choose another --output") -> None:
    """Raises RunFolderError where something lies there already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunFolderError(f"{target}: is not empty; nothing of yours is overwritten", fix=fix)


def check_writable(target: Path) -> None:
    """Raises RunFolderError where a folder of that path cannot be made; leaves nothing behind."""
    place = next(parent for parent in (target.absolute(), *target.absolute().parents) if _is_there(parent))
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=place):
            return
    except OSError as error:
        told = f"{place}: {os.strerror(error.errno) if error.errno else error}"
        raise RunFolderError(f"{target}: cannot be written", received=told, fix="choose another --output") from error


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


MOST_NAMES = 10_000  # of a folder that are looked at


def names_near(path: str | Path, *, folders: bool = False) -> str | None:
    """What lies beside a path that is not there: the three names that are most like it. None: it is there.

    Args:
        path: as it was given.
        folders: name folders alone.

    Example:
        >>> names_near("/usr/lip")
        'nearest in /usr: lib, bin, sbin'
    """
    wanted = Path(path).expanduser()
    if _is_there(wanted):
        return None
    missing, place = wanted, wanted.parent
    while not _is_there(place):
        missing, place = place, place.parent
    try:
        found = islice(place.iterdir(), MOST_NAMES) if place.is_dir() else iter(())
        names = [p.name for p in found if missing.name.startswith(".") or not p.name.startswith(".")]
        if missing != wanted or folders:
            names = [name for name in names if (place / name).is_dir()]
    except OSError:
        names = []
    told = f"nearest in {place}: {', '.join(nearest(missing.name, names))}" if names else f"nothing like it in {place}"
    return told if missing == wanted else f"there is no folder {missing}; {told}"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place and name only when everything went well."""
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    with disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.iterdir():
                sync(path)
            if target.exists():
                target.rmdir()
            temporary.replace(target)
            sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
