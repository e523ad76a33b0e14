"""Rows that Python has in memory, as a file that a run can read, and read again.

In: a list of dicts, a `datasets.Dataset` or DatasetDict, a data frame, an Arrow table, columns, or anything that yields
dicts. Out: the path of a JSON lines file in the cache, named by its content; a run copies it into its own folder, so
that resuming needs nothing else. None of these libraries is imported: what an object can do decides what it is.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from fitune.core.config import RunConfig
from fitune.core.errors import DataError, shorten
from fitune.core.files import sha256, sync
from fitune.core.options import DataSource
from fitune.core.scratch import Scratch
from fitune.data.cache import Cache

KIND = "given"  # of the cache's folders
OURS = re.compile(rf"{KIND}-[0-9a-f]{{64}}-\d+")
FOLDER = "data"  # of a run, for rows that had no file
FIX = 'data=["rows.jsonl"] names files; data=[{"prompt": ..., "completion": ...}, ...] are rows'


def sources(value: object, name: str, cache: Cache) -> list[Any]:
    """What `data` is in Python as sources: paths stay, rows become files.

    Args:
        value: a path, a source as in YAML ({path, take, ...}), rows, or a list of any of them.
        name: data or eval_data.
        cache: where files are written; they are there as long as it is.

    Raises:
        DataError: rows that cannot be written as JSON, or rows and paths mixed up.
    """
    if _is_source(value):
        return [value]
    if not isinstance(value, (list, tuple)) or (value and _is_row(value[0])):
        return [_file(value, name, cache)]
    if any(_is_row(one) for one in value):
        raise DataError(f"{name}: rows and files in one list", received=shorten(value), fix=FIX)
    return [one if _is_source(one) else _file(one, name, cache) for one in value]


def _is_source(value: object) -> bool:
    named = isinstance(value, Mapping) and "path" in value and set(value) <= set(DataSource.model_fields)
    return isinstance(value, (str, PurePath, DataSource)) or named


def _is_row(value: object) -> bool:
    if _is_conversation(value):
        return True
    return isinstance(value, Mapping) and not _is_source(value) and not _is_splits(value) and not _is_columns(value)


def _is_conversation(value: object) -> bool:
    """Turns without a name: [{"role": "user", ...}, {"role": "assistant", ...}]."""
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_turn(one) for one in value)


def _is_columns(value: object) -> bool:
    """Columns by name: lists of one length that hold no turns."""
    if not isinstance(value, Mapping) or not value:
        return False
    columns = list(value.values())
    lists = all(isinstance(one, Sequence) and not isinstance(one, (str, bytes)) for one in columns)
    return lists and len({len(one) for one in columns}) == 1 and not any(_is_turn(one[0]) for one in columns if one)


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and bool({"role", "from"} & set(value))


def _is_splits(value: object) -> bool:
    """A DatasetDict: tables by the names of their splits."""
    return isinstance(value, Mapping) and bool(value) and all(hasattr(one, "column_names") for one in value.values())


def _file(table: object, name: str, cache: Cache) -> str:
    """The rows as a file of the cache; the same rows are the same file."""
    with tempfile.TemporaryDirectory(prefix="fitune-") as folder:
        path = Path(folder) / f"{name}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as out:
            count = 0
            for count, row in enumerate(_rows(table, name), 1):
                out.write(_line(row, f"{name}[{count - 1}]") + "\n")
        if not count:
            raise DataError("no rows", file=name, received=shorten(table), expected="rows to train on")

        def write(target: Path) -> None:
            shutil.copyfile(path, target / path.name)

        return str(cache.entry(KIND, sha256(path), write) / path.name)


def _rows(table: Any, name: str) -> Iterator[Any]:
    """The rows of whatever holds some."""
    if _is_splits(table):
        split = next(iter(table)) if len(table) == 1 else "train"
        if split not in table:
            raise DataError(
                f"{name}: which split?", received=", ".join(map(str, table)), expected="train", fix=f"{name}=ds[SPLIT]"
            )
        return _rows(table[split], name)
    if _is_columns(table):
        return (dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True))
    for method, how in (("to_pylist", {}), ("iter_rows", {"named": True}), ("to_dict", {"orient": "records"})):
        if hasattr(table, method) and not hasattr(table, "column_names" if method == "to_dict" else "keys"):
            return iter(getattr(table, method)(**how))  # Arrow, polars, pandas
    if isinstance(table, Iterable) and not isinstance(table, (str, bytes, Mapping)):
        return iter(table)  # `datasets`, lists, generators, csv.DictReader
    raise DataError(f"{name}: no rows", received=shorten(table), expected="paths or rows", fix=FIX)


def _line(row: object, where: str) -> str:
    row = {"messages": row} if _is_conversation(row) else row
    if not isinstance(row, Mapping):
        raise DataError("not a row", file=where, received=shorten(row), expected="a dict of columns", fix=FIX)
    try:
        return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError("cannot be written as JSON", file=where, received=str(error)) from error


def _plain(value: object) -> Any:
    """Values as JSON has them; what a table marks as missing is left out."""
    if isinstance(value, Mapping):
        plain = {str(key): _plain(one) for key, one in value.items()}
        return {key: one for key, one in plain.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' words for missing
        return None
    for method in ("tolist", "isoformat"):  # numpy's numbers and arrays; dates
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    raise TypeError(f"a {type(value).__name__} {shorten(value)}")


def keep(config: RunConfig, run: Path) -> tuple[RunConfig, dict[str, str]]:
    """Copy rows that had no file into the run's folder.

    Returns:
        The config that reads them there, and the new path of each old one.
    """
    moved: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for name in ("data", "eval_data"):
        changes[name] = []
        for source in getattr(config, name):
            path = Path(source if isinstance(source, str) else source.path)
            if OURS.fullmatch(path.parent.name):
                moved[str(path)] = _copied(path, run.absolute() / FOLDER)
            new = moved.get(str(path), str(path))
            changes[name].append(new if isinstance(source, str) else source.model_copy(update={"path": new}))
    return (config.model_copy(update=changes) if moved else config), moved


def _copied(path: Path, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    target = folder / f"{path.stem}-{path.parent.name.split('-')[1][:8]}{path.suffix}"
    with Scratch(target, file=True) as temporary:
        shutil.copyfile(path, temporary)
        sync(temporary)
        temporary.replace(target)
    sync(folder)
    return str(target)
