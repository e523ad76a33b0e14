"""Files of a model on a hub: which of them are downloaded, and whether they fit on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from fitune.core.errors import ModelError
from fitune.core.units import MIB

WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.bin")
OnBytes = Callable[[str, int, int], None]  # file, bytes that are there, all its bytes


@dataclass(frozen=True)
class Downloaded:
    """A model in the cache: its folder, and the number and bytes of its files."""

    folder: str
    id: str
    revision: str
    files: int
    bytes: int

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Remote:
    """A file on a hub. size: bytes. sha256: where the hub names it."""

    path: str
    size: int
    sha256: str | None = None


def chosen(files: Sequence[Remote], only: Sequence[str] = ()) -> list[Remote]:
    """The files to download: of weights in two formats the safetensors, and nothing from subfolders."""
    if only:
        return [file for file in files if file.path in only]
    safe = any(file.path.endswith(".safetensors") for file in files)
    wanted = [file for file in files if "/" not in file.path and any(fnmatch(file.path, kind) for kind in WANTED)]
    return [file for file in wanted if not (safe and (file.path.endswith(".bin") or ".bin.index" in file.path))]


def size(path: Path) -> int:
    """Bytes of a file; -1: there is none."""
    return path.stat().st_size if path.is_file() else -1


def check_room(folder: Path, needed: int, name: str, free: int | None = None) -> None:
    """Raises ModelError where so many bytes do not fit on the disk."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    there = shutil.disk_usage(place).free if free is None else free
    if needed > there:
        raise ModelError(
            f"{name}: does not fit on the disk",
            received=f"{there / MIB:,.0f} MiB free at {place}",
            expected=f"{needed / MIB:,.0f} MiB",
            fix="free some space, or set HF_HOME (hub) or FITUNE_CACHE (ModelScope) to a folder on another disk",
        )
