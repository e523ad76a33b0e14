"""What the page may look at: the folders that the user gave, and nothing else.

In: paths as the page sends them. Out: real paths below one of the folders, or a refusal. Links are followed before the
look, so none leads out; names that begin with a dot are of nobody's data.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from fitune.commands.serve.errors import Refused
from fitune.core import catalog
from fitune.core.begun import CONFIG
from fitune.core.files import TEMPORARY, disk
from fitune.data.readers import READERS
from fitune.models import hub

UPLOADS, EXPORTS, LOGS = "uploads", "exports", "logs"  # beside the runs
LONGEST = 120  # characters of a file's name
MOST_ENTRIES = 2_000  # of a folder that are listed


@dataclass(frozen=True)
class Roots:
    """The folders.

    Args:
        work: the working folder; what the page sends begins there.
        runs: where run folders lie, and beside them uploads and exports.
        more: further folders that may be looked at: those of the hub's cache and of the package, and the user's.
    """

    work: Path
    runs: Path
    more: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every folder."""
        return (self.work, self.runs, *self.more)

    def path(self, text: str, *inside: Path) -> Path:
        """The real path that a text means.

        Args:
            text: as the page sent it.
            inside: the folders that it may lie in; none: any of them.

        Raises:
            Refused: it is no path, lies elsewhere, or nothing is there.
        """
        if not text or "\0" in text or len(text) > 4096 or ".." in re.split(r"[/\\]", text):
            raise Refused(400, f"not a path: {text[:80]!r}", param="path")
        try:
            real = Path(os.path.realpath(self.work / text, strict=True))
        except (OSError, ValueError):
            raise Refused(404, f"nothing is there: {text[:200]}", param="path") from None
        for root in inside or self.all:
            if real.is_relative_to(there := Path(os.path.realpath(root))):
                if any(part.startswith(".") for part in real.relative_to(there).parts):
                    continue
                return real
        folders = ", ".join(dict.fromkeys(map(str, inside or self.all)))
        raise Refused(
            403,
            f"{text[:200]}: outside the folders of this page ({folders}); fix: fitune ui --folder FOLDER",
            param="path",
        )

    def shown(self, path: Path) -> str:
        """A path as one types it in the working folder."""
        work = Path(os.path.realpath(self.work))
        if not path.is_relative_to(work) or path == work:
            return str(path)
        short = path.relative_to(work).as_posix()
        return f"./{short}" if short.startswith("-") else short

    def model(self, name: str) -> str:
        """A model by what the user may name: a folder here, a name of the catalog, or an id of a hub.

        Raises:
            Refused: it is none of these.
        """
        is_path = name.startswith((".", "~", "/", "\\")) or (self.work / name).exists() or ".." in name
        if not is_path and (catalog.get(name) is not None or hub.parse(name) is not None):
            return name
        return self.shown(self.path(name))

    def run(self, name: str) -> Path:
        """A run folder by its name below the runs.

        Raises:
            Refused: there is none.
        """
        folder = self.path(str(self.runs / name) if name else "", self.runs)
        if not (folder / CONFIG).is_file():
            raise Refused(404, f"no run of that name: {name[:200]}", param="run")
        return folder

    def run_names(self) -> Iterator[str]:
        """The names of all runs, the newest first; a link that leads elsewhere is none."""
        there = Path(os.path.realpath(self.runs))
        folders = [one.parent for depth in ("*", "*/*") for one in self.runs.glob(f"{depth}/{CONFIG}")]
        found = [folder for folder in folders if Path(os.path.realpath(folder)).is_relative_to(there)]
        for folder in sorted(found, key=lambda one: one.stat().st_mtime, reverse=True):
            yield folder.relative_to(self.runs).as_posix()

    def listed(self, text: str) -> list[dict[str, object]]:
        """What lies in a folder: folders, those that hold a model, and files that data can be read from."""
        folder = self.path(text)
        if not folder.is_dir():
            raise Refused(400, f"not a folder: {text[:200]}", param="path")
        found: list[dict[str, object]] = []
        for entry in sorted(folder.iterdir(), key=lambda one: (one.is_file(), one.name.lower()))[:MOST_ENTRIES]:
            kind = _kind(entry)
            if kind and not entry.name.startswith("."):
                found.append({"name": entry.name, "path": self.shown(entry), "kind": kind})
        return found


def _kind(entry: Path) -> str:
    if entry.is_dir():
        return "run" if (entry / CONFIG).is_file() else "model" if (entry / "config.json").is_file() else "folder"
    return "data" if is_data(entry.name) else ""


def is_data(name: str) -> bool:
    """Does a file's name say that rows can be read from it?"""
    return Path(name.lower().removesuffix(".gz")).suffix in READERS


def file_name(name: str) -> str:
    """The name under which an upload is kept.

    Raises:
        Refused: it is no plain file name, or not one of data.
    """
    if (
        not name
        or name != Path(name.replace("\\", "/")).name
        or name.startswith(".")
        or re.search(r"[\x00-\x1f]", name)
    ):
        raise Refused(400, f"not a file name: {name[:80]!r}", param="name")
    if not is_data(name):
        raise Refused(400, f"{name[:80]}: expected a file of data: {', '.join(sorted(READERS))}", param="name")
    kept = re.sub(r"[^\w.() -]", "_", name)
    return kept[-LONGEST:].lstrip(".- ")


async def keep(folder: Path, name: str, pieces: AsyncIterator[bytes]) -> Path:
    """Write an upload, whole or not at all; nothing that is there is overwritten.

    Raises:
        Refused: it is too large, or the name is none.
        RunFolderError: it cannot be written.
    """
    name = file_name(name)
    with disk(folder, "free some space"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            with temporary.open("xb") as file:
                async for piece in pieces:
                    file.write(piece)
            target, number = folder / name, 1
            while os.path.lexists(target):
                number += 1
                target = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
            temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target
