"""Tables to rows: CSV, Excel, Parquet and Arrow.

In: a file with a header or a schema. Out: its rows, each with its line (Parquet, Arrow and Excel: the row's number).
"""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, time
from itertools import chain
from pathlib import Path
from typing import Any

from fitune.core.errors import DataError, shorten
from fitune.core.records import Source
from fitune.data.encodings import BOMB, BOMB_RATIO, MOST_ROW, Item, Notice, head_of, lines_of, too_large

MOST_COLUMNS = 10_000
MOST_BOOK = 1 << 30  # bytes of a workbook, unpacked
MOST_ROWS, LEAST_ROWS, ROWS_A_BYTE = 10**9, 10**5, 8  # rows of Parquet: all alike, they take next to nothing


def read_csv(path: Path, notice: Notice, *, delimiter: str) -> Iterator[Item]:
    """Rows below a header; a quoted cell may hold line breaks, and the row's line is the one it starts on."""
    csv.field_size_limit(MOST_ROW)  # the default, 128 KiB, is less than a long answer
    with lines_of(path, notice, newline="") as lines:
        first = next(lines, "")
        if delimiter == "," and (other := _other_delimiter(first)):
            delimiter = other
            notice(f"{path}: its cells are separated by {other!r}")
        lines = chain([first], lines)
        table = _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), str(path))
        line, header = next(table, (1, []))
        if not header:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        _refuse_twice(header, path, line)
        for line, cells in table:
            if len(cells) == len(header):
                yield dict(zip(header, cells, strict=True)), Source(str(path), line)
            else:
                yield DataError(
                    "another number of cells than the header has",
                    file=path,
                    line=line,
                    received=f"{len(cells)}: {shorten(cells)}",
                    expected=f"{len(header)}: {', '.join(header)}",
                    fix='put cells that hold a separator or a line break into "quotes"',
                )


def _other_delimiter(header: str) -> str | None:
    """What separates the cells of a file that is called CSV and has no comma in its header."""
    return None if "," in header else next((mark for mark in ("\t", ";") if mark in header), None)


def check_columns(count: int, path: str | Path, line: int | None = None) -> None:
    """Raises DataError for a table, or a row, of more columns than any data has."""
    if count > MOST_COLUMNS:
        raise DataError(
            "too many columns",
            file=path,
            line=line,
            received=f"{count:,}",
            expected=f"{MOST_COLUMNS:,} at most",
            fix="keep the columns that hold questions and answers",
        )


def _refuse_twice(header: Sequence[str], path: Path, line: int | None = None) -> None:
    """Raises DataError for two columns of one name, or more of them than any data has."""
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise DataError("two columns of one name", file=path, line=line, received=shorten(", ".join(twice), 200))
    check_columns(len(header), path, line)


def _csv_rows(reader: Any, file: str) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each row that is not blank."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"broken CSV ({error})",
                file=file,
                line=line,
                expected='closed "quotes", and "" for a quote inside them',
                fix="nothing after this place can be read; fix the file there",
            ) from None
        if cells:
            yield line, cells


def read_xlsx(path: Path, notice: Notice) -> Iterator[Item]:
    """The rows of the first sheet that has any, below its header; formulas as what they last gave."""
    import openpyxl

    _check_zip(path)
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = [(sheet.title, rows) for sheet in book.worksheets if len(rows := _cells(sheet)) > 1]
        book.close()
    except Exception as error:  # the library raises many kinds; each is reported as it is
        raise DataError(
            "cannot be read as Excel",
            file=path,
            received=" ".join(str(error).split())[:200],
            expected="a whole .xlsx file",
            fix="open it and save it again as .xlsx, or as CSV in UTF-8",
        ) from None
    if not sheets:
        raise DataError("the file is empty", file=path, expected="a header and rows below it")
    title, rows = sheets[0]
    if len(sheets) > 1:
        others = ", ".join(name for name, _ in sheets[1:])
        notice(f"{path}: the rows are those of the sheet {title!r}; left alone: {others}")
    line, header = rows[0]
    width = max((n for n, name in enumerate(header, 1) if name is not None), default=0)
    names = [str(name) if name is not None else f"column {n}" for n, name in enumerate(header[:width], 1)]
    _refuse_twice(names, path, line)
    for line, cells in rows[1:]:
        yield (
            {name: cell for name, cell in zip(names, cells, strict=False) if cell is not None},
            Source(str(path), line),
        )


def _check_zip(path: Path) -> None:
    """Raises DataError for a workbook, which is a zip, that unpacks to what no table does."""
    try:
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(one.file_size for one in packed.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # what is wrong with it is reported by who reads it
    if unpacked > MOST_BOOK or unpacked > max(BOMB, BOMB_RATIO * path.stat().st_size):
        raise too_large(path, f"{path.stat().st_size:,} bytes unpack to {unpacked:,}")


def _cells(sheet: Any) -> list[tuple[int, list[Any]]]:
    """Number and cells of each row that is not empty. Excel knows no difference between 42 and "42": numbers and dates
    are texts, as they look."""
    found = []
    sheet.reset_dimensions()  # what the file says of its size may be anything
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        values = [_cell(value) for value in cells]
        if any(value is not None for value in values):
            found.append((number, values))
    return found


def _cell(value: object) -> Any:
    if isinstance(value, (date, time)):
        return str(value).removesuffix(" 00:00:00")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def read_parquet(path: Path, notice: Notice) -> Iterator[Item]:
    from pyarrow import parquet

    with _arrow(path, "Parquet"), parquet.ParquetFile(path, pre_buffer=False) as file:  # else all row groups are held
        _refuse_twice(file.schema_arrow.names, path)
        rows = file.metadata.num_rows
        if rows > MOST_ROWS or (rows > LEAST_ROWS and rows > ROWS_A_BYTE * path.stat().st_size):
            raise too_large(path, f"{path.stat().st_size:,} bytes hold {rows:,} rows")
        yield from _batches(file.iter_batches(batch_size=256), path)


def read_arrow(path: Path, notice: Notice) -> Iterator[Item]:
    """What `datasets` saves is an Arrow stream; others write Arrow files."""
    import pyarrow

    with _arrow(path, "Arrow"), pyarrow.memory_map(str(path)) as source:
        if head_of(path).startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(source)
            _refuse_twice(file.schema.names, path)
            yield from _batches((file.get_batch(n) for n in range(file.num_record_batches)), path)
        else:
            stream = pyarrow.ipc.open_stream(source)
            _refuse_twice(stream.schema.names, path)
            yield from _batches(stream, path)


@contextmanager
def _arrow(path: Path, kind: str) -> Iterator[None]:
    """pyarrow's errors are of many kinds; each is reported as it is."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        raise DataError(
            f"cannot be read as {kind}",
            file=path,
            received=" ".join(str(error).split())[:200],
            expected=f"a whole {kind} file",
            fix="download or write it again",
        ) from None


def _batches(batches: Iterable[Any], path: Path) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, step := _step(batch)):
            for row in batch.slice(start, step).to_pylist():
                number += 1
                yield _without_nulls(row), Source(str(path), number)


def _step(batch: Any) -> int:
    """Rows that become Python's own at a time: long ones few, so that they do not take the memory of all."""
    rows, held = int(batch.num_rows), max(1, int(batch.nbytes))
    return max(1, min(256, rows * MOST_ROW // held))


def _without_nulls(value: object) -> Any:
    """In a column store every struct has every field: what a row did not have stands there as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
