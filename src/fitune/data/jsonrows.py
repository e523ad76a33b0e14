"""JSON to rows: a list of them, one a line, or a list inside an object.

In: a file. Out: its rows, each with the line that it starts on. How it begins decides how it is read, not its name.
Lines are read as a stream, a list is held whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

from fitune.core.errors import DataError, shorten
from fitune.core.records import Source
from fitune.data.encodings import Item, Notice, check_row, lines_of
from fitune.data.formats import TURNS
from fitune.data.turns import ROLE_KEYS

# Names under which an object holds rows, in the order in which they are looked for
WRAPPERS = ("train", "data", "rows", "items", "records", "examples", "samples", "instances", "dataset")
FRAME = {"row", "row_idx", "truncated_cells"}  # the keys around a row that the hub's viewer gives


class _Decoder(json.JSONDecoder):
    """JSON, in which an object with two values of one key is noticed: Python would keep the last one."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self._twice: set[str] = set()

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self._twice |= {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        return made

    def item(self, row: Any, file: str, line: int) -> Item:
        """The row that was decoded last, or what is wrong with it."""
        if not self._twice:
            return row, Source(file, line)
        received = shorten(", ".join(sorted(self._twice)), 200)
        self._twice.clear()
        return DataError("two values of one key", file=file, line=line, received=received, expected="each key once")


def read_json(path: Path, notice: Notice) -> Iterator[Item]:
    """The rows of a JSON file."""
    with lines_of(path, notice) as lines:
        blank = 0
        for line in lines:
            if line.strip():
                break
            blank += 1
        else:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        if line.lstrip().startswith("["):
            text = "".join(lines)
            if text.strip() and _is_conversation(line):  # a conversation a line
                yield from _parse_lines(chain([line], StringIO(text, newline="\n")), str(path), blank + 1)
            else:
                yield from _parse_array("\n" * blank + line + text, str(path))
            return
        rest: Iterable[str] = lines
        if line.lstrip().startswith("{"):
            following = next((more for more in lines if more.strip()), "")
            if not following or not _is_row(line):  # an object that is the whole file
                text = line + following + "".join(lines)
                if (found := _wrapped(text, path, notice, blank)) is not None:
                    yield from found
                    return
                rest = iter(StringIO(text[len(line) :], newline="\n"))
            else:
                rest = chain([following], lines)
        yield from _parse_lines(chain([line], rest), str(path), blank + 1)


def _is_conversation(line: str) -> bool:
    """A list of turns, and not of rows, that is closed at the end of its line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(values) and all(
        isinstance(one, (str, list)) or (isinstance(one, dict) and one.keys() & set(ROLE_KEYS)) for one in values
    )


def _is_row(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _wrapped(text: str, path: Path, notice: Notice, blank: int) -> Iterator[Item] | None:
    """The rows of a list that stands in an object, such as {"data": [...]}; None: the file is no such object."""
    try:
        values, places = _members(text)
    except (ValueError, IndexError, RecursionError):
        return None
    lists = [name for name, value in values.items() if _holds_rows(name, value, alone=len(values) == 1)]
    if not lists:
        table = _of_table(values)
        if table is not None:
            notice(f"{path}: read as a table, as pandas writes it")
            return ((row, Source(str(path), number)) for number, row in enumerate(table, 1))
        return None
    chosen = next((name for name in WRAPPERS if name in lists), lists[0])
    others = ", ".join(name for name in lists if name != chosen)
    notice(f"{path}: the rows are the list {chosen!r}" + (f"; left alone: {others}" if others else ""))
    columns = values.get("columns")
    padded = "\n" * blank + text
    rows = _elements(padded, str(path), blank + places[chosen])
    return (_unpacked(item, columns) for item in rows)


def _of_table(values: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table that pandas wrote: columns of {number: cell}, rows by their number, or columns as lists."""
    inner = list(values.values())
    if not inner:
        return None
    if all(isinstance(one, dict) and one and one.keys() == inner[0].keys() for one in inner):
        if all(name.isdigit() for name in inner[0]):
            return [{name: column[at] for name, column in values.items()} for at in inner[0]]
        return inner if all(name.isdigit() for name in values) else None
    texts = (isinstance(one, list) and len(one) > 1 and all(isinstance(cell, str) for cell in one) for one in inner)
    if len(inner) > 1 and all(texts) and len({len(one) for one in inner}) == 1:
        return [dict(zip(values, cells, strict=True)) for cells in zip(*inner, strict=True)]
    return None


def _members(text: str) -> tuple[dict[str, object], dict[str, int]]:
    """The values of the one object that a text is, and where each begins.

    Raises:
        ValueError, IndexError: it is no such text.
    """
    decoder = json.JSONDecoder()
    at = text.index("{") + 1
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    while text[at := _skip(text, at)] != "}":
        name, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if text[at] != ":":
            raise ValueError("no colon")
        places[name] = _skip(text, at + 1)
        values[name], at = decoder.raw_decode(text, places[name])
    if text[at + 1 :].strip():
        raise ValueError("more than one object")
    return values, places


def _holds_rows(name: str, value: object, *, alone: bool) -> bool:
    """A list of objects that are no turns, under a name for rows or under the only name; or of lists, as pandas splits
    a table."""
    if not isinstance(value, list) or not value:
        return False
    rows = all(isinstance(row, dict) and not row.keys() & set(ROLE_KEYS) for row in value)
    if name == "data" and not alone and all(isinstance(row, list) for row in value):
        return True
    return rows and (name in WRAPPERS or (alone and name not in TURNS))


def _unpacked(item: Item, columns: object) -> Item:
    """A row out of its frame: {"row_idx": 0, "row": {...}} of a viewer, or the cells of a table whose columns stand
    beside it."""
    if isinstance(item, DataError):
        return item
    row, where = item
    if isinstance(row, dict) and isinstance(row.get("row"), dict) and row.keys() <= FRAME:
        return row["row"], where
    if isinstance(row, list) and isinstance(columns, list) and len(columns) == len(row):
        return dict(zip(map(str, columns), row, strict=True)), where
    return row, where


def _parse_lines(lines: Iterable[str], file: str, first: int) -> Iterator[Item]:
    decoder = _Decoder()
    for number, line in enumerate(lines, first):
        line = line.lstrip("\ufeff")  # files with a mark that were put together
        if not line.strip():
            continue
        check_row(len(line), Path(file), number)
        try:
            row = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            if number == first and line.strip() == "{":
                raise DataError(
                    "an object over several lines",
                    file=file,
                    line=number,
                    expected="one object a line, or a list of objects",
                    fix="put [ before the first object, commas between them, and ] behind the last",
                ) from None
            received = shorten(line.strip())
            yield DataError(
                f"not JSON ({_reason(error)})", file=file, line=number, received=received, expected="one object a line"
            )
            continue
        yield decoder.item(row, file, number)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error.args[0]).split(":")[0].lower()


def _skip(text: str, at: int) -> int:
    """The place of the next character that is no space and no comma."""
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _parse_array(text: str, file: str) -> Iterator[Item]:
    """The elements of a JSON list that is all of a text."""
    at = yield from _elements(text, file, text.index("["))
    end = text.count("\n") + 1
    if at >= len(text):
        raise DataError("the list is not closed: the file is cut off", file=file, line=end, expected="]")
    if rest := text[at + 1 :].strip():
        raise DataError("text behind the end of the list", file=file, received=shorten(rest[:60]), expected="one list")


def _elements(text: str, file: str, start: int) -> Generator[Item, None, int]:
    """The elements of the JSON list at a place, each with the line it starts on; returns the place of its end."""
    decoder = _Decoder()
    at, line, counted = start + 1, 1, 0
    while (at := _skip(text, at)) < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        begun = at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"broken JSON ({_reason(error)})",
                file=file,
                line=getattr(error, "lineno", line),
                received=shorten(text[at : at + 60]),
                expected="a list of objects, separated by commas",
                fix="nothing after this place can be read; fix the file there",
            ) from None
        check_row(at - begun, Path(file), line)
        yield decoder.item(row, file, line)
    return at
