"""A run that is asked for where something lies already: is the folder free, or is a stopped run to go on there?

In: a folder. Out: whether a run of fitune's was begun in it and stopped; an error where it holds a finished run, or
anything that fitune did not write. No torch here: the command line asks before anything is loaded.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from fitune.core.config import build, read_yaml
from fitune.core.errors import FituneError, RunFolderError
from fitune.core.files import LOCK, expand, read_summed
from fitune.core.ranklog import FOLDER
from fitune.core.scratch import OURS

RUNS = Path("runs")  # where runs lie that were given no --output
CONFIG, SEAL, RESULT = "config.yaml", "seal.json", "result.json"
LOG = re.compile(r"rank-\d+\.log")
GIVEN = re.compile(r".+-[0-9a-f]{8}\.jsonl")  # rows that Python gave, copied before the settings are written


def check(folder: Path) -> bool:
    """Was a run begun there, and stopped? False: the folder is free.

    Raises:
        RunFolderError: it is no folder, or holds a finished run, or something else.
    """
    if not folder.exists():
        return False
    if folder.is_dir() and _is_free(folder):
        return False
    if folder.is_dir() and _is_ours(folder):
        if not _is_finished(folder):
            return True
        raise RunFolderError(
            f"{folder}: holds a finished run; nothing of yours is overwritten",
            fix="choose another --output; to train that run further: "
            f"fitune train --adapter {shlex.quote(str(folder))} --output NEW ...",
        )
    raise RunFolderError(f"{folder}: is not empty; nothing of yours is overwritten", fix="choose another --output")


def free_folder(name: str) -> str:
    """A run folder that is not there yet: runs/NAME-1, or the first number that is free."""
    number = 1
    while (path := RUNS / f"{name}-{number}").exists():
        number += 1
    return str(path)


def _is_free(folder: Path) -> bool:
    """Is there nothing, but for what a start leaves that was killed before it wrote the settings?"""
    return all(_of_a_start(path) for path in folder.iterdir())


def _of_a_start(path: Path) -> bool:
    if path.name == LOCK or OURS.fullmatch(path.name):
        return True
    if path.name == FOLDER and path.is_dir():
        return all(LOG.fullmatch(one.name) for one in path.iterdir())
    inside = [*path.iterdir()] if path.name in ("checkpoints", "data") and path.is_dir() else [path]
    return all(path.name == "data" and (GIVEN.fullmatch(one.name) or OURS.fullmatch(one.name)) for one in inside)


def _is_ours(folder: Path) -> bool:
    """Is it sealed, or are its settings those of a run in this folder?"""
    if not (folder / CONFIG).is_file():
        return False
    if (folder / SEAL).is_file():
        return True
    try:
        output = build(read_yaml(folder / CONFIG)).output
    except FituneError:
        return False
    return output is not None and expand(output).absolute() == folder.absolute()


def _is_finished(folder: Path) -> bool:
    seal = read_summed(folder / SEAL)
    return bool(seal["finished"]) if seal and "finished" in seal else (folder / RESULT).is_file()
