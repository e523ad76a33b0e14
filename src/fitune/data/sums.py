"""Sums of large files, kept, so that a model of many gigabytes is not read whole each time it is opened.

In: files. Out: their lengths and sums, as `files.summed` gives them. Those of large files lie in `sums.json` in the
cache folder, by path, length, inode, and the times of the last change to content and to the entry: a program can set
the one back, not the other. A sum that does not match is made anew before it is believed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fitune.core import files
from fitune.core.errors import RunFolderError
from fitune.core.files import write_json
from fitune.data.cache import default_folder

NAME = "sums.json"
SETTLED = 2_000_000_000  # nanoseconds since its last change: within a clock's tick two changes look like one


def summed(path: Path, *, fresh: bool = False) -> dict[str, Any]:
    """A file's length and sum.

    Args:
        path: of the file.
        fresh: read it, whatever is kept.
    """
    before = path.stat()
    if before.st_size <= files.PIECE:
        return files.summed(path)
    name, state = str(path.resolve()), _state(before)
    known = {} if fresh else _read().get(name, {})
    if known.get("state") == state and isinstance(known.get("entry"), dict):
        return dict(known["entry"])
    entry, after = files.summed(path), path.stat()
    if _state(after) == state and time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED:
        _keep(name, {"state": state, "entry": entry})
    return entry


def matches(path: Path, entry: Mapping[str, object]) -> bool:
    """Is this the file that `summed` saw?"""
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    if "sha256_tree" not in entry:
        return files.matches(path, entry)
    return summed(path) == entry or summed(path, fresh=True) == entry


def _state(found: os.stat_result) -> list[int]:
    return [found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _read() -> dict[str, Any]:
    try:
        found = json.loads((default_folder() / NAME).read_text(encoding="utf-8"))
        return {name: one for name, one in found.items() if isinstance(one, dict)}
    except (OSError, ValueError, RunFolderError, AttributeError):
        return {}


def _keep(name: str, known: dict[str, object]) -> None:
    """Write it down; of two processes at once the later one's list stays, and the other sum is made again some day."""
    kept = {path: one for path, one in _read().items() if Path(path).is_file()} | {name: known}
    with suppress(OSError, RunFolderError):
        folder = default_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(folder / NAME, kept)
