"""Task six of the page: merge and export a run, and download what came out.

In: a run, and what is to be made of it. Out: a process of its own that makes it, beside the runs; and its files, those
of a folder in one ZIP.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from fitune.commands.serve.errors import Refused
from fitune.commands.ui.paths import EXPORTS, Roots
from fitune.commands.ui.processes import Processes
from fitune.commands.ui.runs import EXPORT
from fitune.commands.ui.settings import Form, command

PIECE = 1 << 20  # bytes
SUFFIXES = {"gguf": ".gguf", "gguf-lora": ".gguf"}  # of what is one file; the others are folders


class Handed(Form):
    """What is to be made of a run. type: of the numbers of a GGUF."""

    run: str = Field(max_length=400)
    to: Literal["merge", "gguf", "gguf-lora", "ollama", "vllm"]
    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q4_0"] = "auto"


def arguments(asked: Handed, roots: Roots, output: Path) -> list[str]:
    """The command's arguments."""
    run, there = roots.shown(roots.run(asked.run)), roots.shown(output)
    if asked.to == "merge":
        return ["merge", run, "--output", there]
    numbers = ["--type", asked.type] if asked.type != "auto" and asked.to != "vllm" else []
    return ["export", run, "--to", asked.to, *numbers, "--output", there]


def hand_over(asked: Handed, roots: Roots, processes: Processes) -> dict[str, object]:
    """Start it.

    Raises:
        Refused: there is no such run, or it has no result yet.
    """
    if not (roots.run(asked.run) / "result.json").is_file():
        raise Refused(400, f"{asked.run}: has no result yet; expected: a finished run", param="run")
    folder = roots.runs / EXPORTS
    folder.mkdir(parents=True, exist_ok=True)
    stem, number = f"{asked.run.replace('/', '-')}-{asked.to}", 1
    while os.path.lexists(output := folder / f"{stem}-{number}{SUFFIXES.get(asked.to, '')}") or processes.works(
        EXPORT + output.name
    ):
        number += 1
    made = arguments(asked, roots, output)
    processes.start(EXPORT + output.name, made)
    return {"name": output.name, "command": command(*made)}


def listed(roots: Roots, processes: Processes) -> list[dict[str, object]]:
    """What was made, and what is being made."""
    folder = roots.runs / EXPORTS
    there = {path.name: path for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else {}
    begun = [name.removeprefix(EXPORT) for name in processes.names() if name.startswith(EXPORT)]
    found: list[dict[str, object]] = [
        {"name": name, "state": _state(processes.code(EXPORT + name)), "log": processes.tail(EXPORT + name)}
        for name in begun
        if name not in there
    ]
    for name, path in sorted(there.items(), key=lambda item: item[1].stat().st_mtime, reverse=True):
        works = processes.works(EXPORT + name)
        log = processes.tail(EXPORT + name)
        state = "running" if works else "finished"
        found.append({"name": name, "state": state, "path": roots.shown(path), "bytes": size(path), "log": log})
    return found


def _state(code: int | None) -> str:
    return "running" if code is None else "finished" if code == 0 else "failed"


def size(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in _files(path))


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder; links are left out, so that nothing from elsewhere comes along."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if not (path := Path(place) / name).is_symlink())


def downloaded(text: str, roots: Roots) -> Path:
    """What may be downloaded: an adapter of a run, or what was exported.

    Raises:
        Refused: it is something else.
    """
    real, runs = roots.path(text, roots.runs), Path(os.path.realpath(roots.runs))
    parts = real.relative_to(runs).parts
    if not parts or not ((parts[0] == EXPORTS and len(parts) > 1) or parts[-1] == "adapter"):
        raise Refused(403, f"{text[:200]}: no result of a run; expected: its adapter, or an export", param="path")
    return real


class _Pipe:
    """What a ZIP is written to, until it is sent."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        """See io."""
        self.pieces.append(bytes(piece))
        return len(piece)

    def flush(self) -> None:
        """See io."""

    def close(self) -> None:
        """See io."""

    def taken(self) -> bytes:
        """All of it, which is gone then."""
        whole = b"".join(self.pieces)
        self.pieces.clear()
        return whole


def zipped(folder: Path) -> Iterator[bytes]:
    """The files of a folder as one ZIP, piece by piece. Weights hardly get smaller, so nothing is compressed."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as target:
        for path in _files(folder):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            with path.open("rb") as source, target.open(name, mode="w", force_zip64=True) as place:
                while piece := source.read(PIECE):
                    place.write(piece)
                    yield pipe.taken()
    yield pipe.taken()
