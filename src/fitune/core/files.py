"""Files that are there whole or not at all.

In: what is to be written. Out: atomic writes, folders sealed with a manifest of SHA-256 sums, and an error that names a
full disk. A folder is written under a temporary name, each file synced, its manifest last; then it is renamed. What
has no manifest, or does not match it, does not count. A manifest lists exactly the files that are there, and holds a
sum of itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fitune.core.errors import ConfigError, FituneError, RunFolderError, nearest
from fitune.core.scratch import TEMPORARY as TEMPORARY
from fitune.core.scratch import Scratch
from fitune.core.units import MIB

MANIFEST = "MANIFEST.json"
LOCK = "run.lock"  # of a run folder that a process works in: see locks.py
UMASK = os.umask(0o022)  # the only way to ask for it is to set it
os.umask(UMASK)
HALF = re.compile("[\ud800-\udfff]")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FIX = "free some space or choose another --output, then go on with --resume; earlier checkpoints are whole"


@contextmanager
def disk(folder: Path, fix: str = FIX) -> Iterator[None]:
    """A write that fails is reported as what it is: a full disk, a folder that cannot be written, or a folder that
    stands where a file is to be, by its name."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if isinstance(error, IsADirectoryError) and (there := error.filename2 or error.filename):
            raise RunFolderError(
                f"{there}: cannot be written", received="a folder of that name", expected="a file",
                fix="move it away, and run this command again",
            ) from error  # fmt: skip
        raise RunFolderError(
            f"{folder}: {'the disk is full' if number in FULL else 'cannot be written'}",
            received=os.strerror(number) if number else str(error),
            fix=fix,
        ) from error


@contextmanager
def full_disk(fix: str = FIX) -> Iterator[None]:
    """A disk that is full is reported as that, wherever it was noticed: libraries raise what they like."""
    try:
        yield
    except FituneError:
        raise
    except Exception as error:
        if (number := _error_number(error)) not in FULL:
            raise
        place = getattr(error, "filename", None) or "a file could not be written"
        raise RunFolderError(f"{place}: the disk is full", received=os.strerror(number or 0), fix=fix) from error


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
    """A file that is there whole or not at all; what is no Unicode text stands there escaped."""
    with disk(path.parent):
        with Scratch(path, file=True) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            sync(temporary)
            temporary.replace(path)
        sync(path.parent)


def write_json(path: Path, value: object) -> None:
    """JSON, atomically."""
    write_atomic(path, json_text(value))


def json_text(value: object) -> str:
    """A value as it stands in a JSON file."""
    return as_json(value, indent=1) + "\n"


def as_json(value: object, **how: Any) -> str:
    """JSON that every reader takes: it has no word for what is not finite, so that is null."""
    return in_unicode(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **how))


def in_unicode(text: str) -> str:
    """JSON with half characters escaped: a name that is not UTF-8 has them, and no file takes them as they are."""
    return text if text.isascii() else HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def _finite(value: object) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


PIECE = 1 << 26  # bytes; larger files are summed in pieces, side by side


def tree(path: Path) -> str:
    """The SHA-256 of the SHA-256 sums of a file's pieces: one thread does some 1.3 GB a second, several do more."""
    pieces = range(0, path.stat().st_size, PIECE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return hashlib.sha256(b"".join(threads.map(lambda start: _piece(path, start), pieces))).hexdigest()


def _piece(path: Path, start: int) -> bytes:
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, MIB)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = PIECE
        while left and (count := file.readinto(buffer[: min(left, len(buffer))])):
            found.update(buffer[:count])
            left -= count
    return found.digest()


def summed(path: Path) -> dict[str, Any]:
    """A file's length and sum: `sha256`, or of a large one `sha256_tree` (see `tree`)."""
    size = path.stat().st_size
    return {"bytes": size, "sha256_tree": tree(path)} if size > PIECE else {"bytes": size, "sha256": sha256(path)}


def matches(path: Path, entry: Mapping[str, object]) -> bool:
    """Is this the file that `summed` saw?"""
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return bool(tree(path) == entry["sha256_tree"] if "sha256_tree" in entry else sha256(path) == entry["sha256"])


def with_own_sum(values: Mapping[str, object]) -> dict[str, object]:
    """A JSON object with a sum of itself, which separates damage to it from damage to what it describes."""
    return {**values, "sum": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def read_summed(path: Path) -> dict[str, Any] | None:
    """What `with_own_sum` gave, without the sum; None: it is damaged, or is not there."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        own = values.pop("sum")
        return values if with_own_sum(values)["sum"] == own else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def seal(folder: Path, **facts: object) -> None:
    """Sync every file, then write the manifest of their checksums: the marker that the folder is whole.

    Args:
        folder: without folders in it.
        facts: what else the manifest is to hold, JSON.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        sync(path)
    manifest = with_own_sum({"files": {path.name: summed(path) for path in files}, **facts})
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def whole(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder whose files are exactly those of it; None: it has none that matches."""
    manifest = read_summed(folder / MANIFEST) or _older(folder / MANIFEST)
    try:
        if manifest is None or not manifest["files"]:
            return None
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
        same = names == set(manifest["files"])
        same = same and all(matches(folder / name, one) for name, one in manifest["files"].items())
        return manifest if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _older(path: Path) -> dict[str, Any] | None:
    """A manifest as it was written before it had a sum of itself: the files alone."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        return {"files": files} if all(set(one) == {"bytes", "sha256"} for one in files.values()) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def is_whole(folder: Path) -> bool:
    """Does the folder have a manifest, and is every file of it there, and no other?"""
    return whole(folder) is not None


def check_new(target: Path, fix: str = "choose another --output", *, whole: bool = False) -> None:
    """Raises RunFolderError where something lies there already.

    Args:
        target: a folder that will be written.
        fix: what to do.
        whole: is it written beside, and renamed? A mount point cannot be.
    """
    if whole and target.is_dir() and os.path.ismount(target):
        raise RunFolderError(
            f"{target}: is a mount point, which no folder can be renamed to", fix=f"--output {target / 'model'}"
        )
    if target.exists() and (not target.is_dir() or any(path.name != LOCK for path in target.iterdir())):
        raise RunFolderError(f"{target}: is not empty; nothing of yours is overwritten", fix=fix)


def check_writable(target: Path) -> None:
    """Raises RunFolderError where a folder of that path cannot be made; leaves nothing behind."""
    place = next(parent for parent in (target.absolute(), *target.absolute().parents) if _is_there(parent))
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=place):
            return
    except OSError as error:
        shown = f"{place}: {os.strerror(error.errno) if error.errno else error}"
        raise RunFolderError(f"{target}: cannot be written", received=shown, fix="choose another --output") from error


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def expand(path: str | Path) -> Path:
    """A path as a user gives it, `~` for the home folder; of a user who has none, or whom nobody knows, as it is.

    Raises:
        ConfigError: it is not Unicode text. The libraries that read and write models take no other.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise ConfigError(f"{shown}: is no text in UTF-8", fix="rename it") from None
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


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
    wanted = expand(path)
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
    near = f"nearest in {place}: {', '.join(nearest(missing.name, names))}" if names else f"nothing like it in {place}"
    return near if missing == wanted else f"there is no folder {missing}; {near}"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place and name only when everything went well."""
    target = Path(os.path.realpath(target))  # a link stays one
    with disk(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with Scratch(target) as temporary:
            yield temporary
            temporary.chmod(0o777 & ~UMASK)
            sync_all(temporary)
            if os.name == "nt" and target.exists():  # elsewhere an empty one is replaced
                target.rmdir()
            temporary.replace(target)
        sync(target.parent)


def sync_all(folder: Path) -> None:
    """Force a folder with everything in it onto the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)
