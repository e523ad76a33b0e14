"""What the JSON files of a run folder hold: the types that their readers lean on.

In: a file's value. Out: the same value, when it is what `fitune train` writes. A file that was edited, or comes from
elsewhere, is refused with the field that is wrong, before a reader fails at it in its own way.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fitune.core.errors import RunFolderError, shorten

FIX = "copy the run folder again; a run that was edited by hand is no longer the run"
Kind = type | tuple[type, ...]
NUMBER, MAYBE = (int, float), (int, float, type(None))
# of each file the type of the whole, and of the fields that are read
SHAPES: dict[str, tuple[type, dict[str, Kind]]] = {
    "environment": (dict, {"packages": dict}),
    "template": (dict, {"kind": str, "jinja": (str, dict), "date": (str, type(None)), "name": str}),
    "plan": (dict, {"phases": list, "parts": dict, "kept": list, "trainable": int, "total": int}),
    "data": (dict, {"sha256": dict, "inputs": dict, "report": dict, "findings": list}),
    "before": (
        dict,
        {"base_held_out_loss": MAYBE, "held_out_loss": MAYBE, "held_out_rewards": dict, "answers": (list, dict)},
    ),
    "checks": (list, {}),
    "answers": (list, {}),
    "measured": (dict, {}),
    "result": (dict, {"run": str, "steps": int, "peak_memory_mib": NUMBER, "seconds": NUMBER}),
}
NEEDED = {"data": ("sha256",), "before": ("held_out_loss", "answers"), "template": ("kind",)}


def check(path: Path, value: Any) -> Any:
    """The value of a run's JSON file.

    Args:
        path: the file; its name says what it must hold.
        value: what was read from it.

    Raises:
        RunFolderError: it is of another type, or one of its fields is.
    """
    if path.stem not in SHAPES:
        return value
    whole, fields = SHAPES[path.stem]
    if not isinstance(value, whole):
        raise _wrong(path, "", value, whole)
    if isinstance(value, list) and not all(isinstance(one, dict) for one in value):
        raise _wrong(path, "[]", next(one for one in value if not isinstance(one, dict)), dict)
    if not isinstance(value, dict):
        return value
    for name in NEEDED.get(path.stem, ()):
        if name not in value:
            raise RunFolderError(f"{path}: no {name!r}", received=f"keys {sorted(value)[:8]}", fix=FIX)
    for name, kind in fields.items():
        if name in value and not _is(value[name], kind):
            raise _wrong(path, name, value[name], kind)
    return value


def _is(value: object, kind: Kind) -> bool:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, kinds)


def _wrong(path: Path, field: str, value: object, kind: Kind) -> RunFolderError:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
    where = f"{path}: {field}" if field else str(path)
    return RunFolderError(f"{where}: of another type", received=shorten(value), expected=names, fix=FIX)
