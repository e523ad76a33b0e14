"""Prepared data that is kept, so that the same rows are not read and encoded twice.

In: a key made of everything that decides the content, and a function that writes it. Out: a sealed folder. It is
written under a name of its own and renamed, so two runs at once never see half of it: the one that comes second takes
what the first one made. A folder that does not match its checksums is made again. Nothing but prepared data lies here:
the cache may be deleted whenever no run is going on.

    CACHE/rows-<key>-<n>/      see store.py
    CACHE/reference-<key>-<n>/ what the reference model gives answers of preferences
    CACHE/samples-<key>-<n>/   what is made anew gets the next number: another run may be reading the one before
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from platformdirs import user_cache_path

from fitune.core.errors import RunFolderError
from fitune.core.files import disk, expand, is_whole, seal, sync
from fitune.core.scratch import OURS, TEMPORARY, Scratch, anywhere
from fitune.data import eviction

DAYS = 30  # what no run has used for so long is removed when something new comes
FIX = "free some space, choose another folder with --cache, or keep nothing with --cache none"


def default_folder() -> Path:
    """FITUNE_CACHE, else the system's folder for caches: on Linux $XDG_CACHE_HOME/fitune/data or ~/.cache/fitune/data.

    Raises:
        RunFolderError: this user has no home folder, and no variable names another place.
    """
    if named := os.environ.get("FITUNE_CACHE"):
        return Path(named)
    missing = RunFolderError("no home folder for a cache", fix="set HOME, or FITUNE_CACHE to a folder")
    try:
        folder = user_cache_path("fitune", appauthor=False, opinion=False)
    except RuntimeError:
        raise missing from None
    if not folder.is_absolute():  # versions of platformdirs that leave ~ as it is
        raise missing
    return folder / "data"


class Cache:
    """A folder of sealed folders.

    Args:
        folder: where; None: a temporary folder that goes with this object.
        most: bytes that it may hold; above, what was not used for the longest time goes.
        report: receives what was removed.
    """

    def __init__(
        self, folder: Path | None = None, *, most: int | None = None, report: Callable[[str], None] = lambda text: None
    ) -> None:
        self._most, self._report = most, report
        self._handles: dict[Path, int | None] = {}
        weakref.finalize(self, _close, self._handles)
        with disk(Path(tempfile.gettempdir()), "free some space, or name another place: TMPDIR"):
            self._temporary = anywhere() if folder is None else None
        self.folder = self._temporary.path if self._temporary else expand(folder or Path())
        self.found: set[str] = set()  # entries that were there already
        self._used: set[Path] = set()
        self._forgotten: set[Path] = set()
        with disk(self.folder, FIX):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the user's data

    def newest(self, kind: str, key: str) -> Path | None:
        """The newest whole entry of that key; marks it as used."""
        for path in reversed(self._all(kind, key)):
            if path not in self._forgotten and self._holds(path) and is_whole(path):
                with suppress(OSError):
                    os.utime(path)
                return path
        return None

    def _holds(self, path: Path) -> bool:
        """From now on this process uses the entry: nobody removes it. False: somebody just does."""
        if path not in self._handles:
            try:
                self._handles[path] = eviction.hold(path)
            except OSError:
                return False
        return True

    def _all(self, kind: str, key: str) -> list[Path]:
        """Every entry of that key, the oldest first."""
        found = self.folder.glob(f"{kind}-{key}-*")
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))

    def entry(self, kind: str, key: str, write: Callable[[Path], object]) -> Path:
        """The folder of that key; `write` fills a new one where there is none.

        Raises:
            RunFolderError: the disk is full, or the cache cannot be written.
        """
        path = self.newest(kind, key)
        if path is not None:
            self.found.add(path.name)
            self._used.add(path)
            return path
        self._sweep()
        with disk(self.folder, FIX):
            with Scratch(self.folder / kind) as temporary:
                write(temporary)
                seal(temporary)
                path = self._publish(temporary, kind, key)
            sync(self.folder)
        self._used.add(path)
        self._holds(path)
        if self._most is not None:
            eviction.shrink(self.folder, self._most, self._report)
        return path

    def _publish(self, temporary: Path, kind: str, key: str) -> Path:
        """Rename to the next number; where another run was faster, its folder is as good."""
        for _ in range(10):
            if (other := self.newest(kind, key)) is not None:
                return other
            last = self._all(kind, key)
            number = int(last[-1].name.rpartition("-")[2]) + 1 if last else 1
            path = self.folder / f"{kind}-{key}-{number}"
            try:
                temporary.replace(path)
                return path
            except OSError:
                continue  # another run took the number
        raise OSError(f"cannot publish {path}")

    def forget(self) -> None:
        """Do not use again what was asked for so far: some of it turned out wrong. It stays where it is for whoever is
        reading it, until it is swept."""
        self._forgotten |= self._used
        self.found.clear()
        self._used.clear()

    def _sweep(self) -> None:
        """Remove what has not been used for long, and what killed runs left."""
        now = time.time()
        for path in self.folder.iterdir():
            with suppress(OSError):  # another run may remove it at the same time
                days = (now - path.stat().st_mtime) / 86400
                if OURS.fullmatch(path.name):
                    continue  # under construction, or gone with its process
                ours = path.name.startswith((TEMPORARY, *(f"{kind}-" for kind in eviction.KINDS))) and path.is_dir()
                if ours and path.name.startswith(TEMPORARY) and days > 1:
                    shutil.rmtree(path, ignore_errors=True)
                elif ours and days > DAYS and eviction.unused(path):
                    eviction.remove(path)


def _close(handles: dict[Path, int | None]) -> None:
    for handle in handles.values():
        if handle is not None:
            os.close(handle)


def key(*parts: object) -> str:
    """A name for everything that decides the content: JSON values, bytes."""
    found = hashlib.sha256()
    for part in parts:
        text = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        found.update(len(text).to_bytes(8, "little") + text)
    return found.hexdigest()[:40]


def code_version(room: Path | None = None) -> str:
    """Changes whenever the code that prepares data does, or what it stands on.

    Args:
        room: the folder of that code, beside `core`; None: this one, as it was when it was first asked for.
    """
    return _code_here() if room is None else _code_in(room)


@cache
def _code_here() -> str:
    return _code_in(Path(__file__).parent)


def _code_in(room: Path) -> str:
    found = hashlib.sha256()
    files = {file.relative_to(room).as_posix(): file for file in room.rglob("*.py")}
    for name, file in sorted({**files, "records.py of core": room.parent / "core" / "records.py"}.items()):
        found.update(name.encode() + file.read_bytes())
    for name in ("transformers", "tokenizers", "sentencepiece", "jinja2"):
        found.update(metadata.version(name).encode())
    return found.hexdigest()


def folder_digest(folder: Path) -> str:
    """Of the files that make a tokenizer: every small file of the folder, by name and content."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja", ".tiktoken"):
            found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()
