"""Files to rows.

In: a file, a folder of files, a folder that `datasets` saved, or the id of a data set on the hub. Out: parsed rows in
order, each with its file and line (Parquet and Arrow: the row's number). READERS is the whole list of kinds: a new one
is a row of that table. Files are read as a stream, only a JSON list is held whole. A row that cannot be parsed comes as
a DataError in its place; a file that cannot be read on from some place raises one.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from fitune.errors import DataError, FituneError, shorten
from fitune.files import names_near
from fitune.records import Source

Item = tuple[Any, Source] | DataError

BOMS = (  # UTF-32's begins with UTF-16's, so it is asked first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
GZIP = b"\x1f\x8b"
LFS = b"version https://git-lfs"
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # describe data, hold none
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TRAIN, NOT_TRAIN = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])") for words in ("train", "test|valid|validation|val|dev")
)


def locate(name: str) -> Path:
    """Where data lies: the path as it is, or the folder that a hub id was fetched to.

    Raises:
        DataError: it looks like a hub id, but the hub does not give it.
    """
    path = Path(name).expanduser()
    with _told(path):
        if path.exists() or not HUB_ID.fullmatch(name) or _suffix(path) in READERS:
            return path
    from huggingface_hub import snapshot_download

    wanted = [f"*{suffix}{packed}" for suffix in FOLDER_SUFFIXES for packed in ("", ".gz")]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; each is told as it is
        raise DataError(
            "no such file or folder, and the hub does not give it",
            file=name,
            received=" ".join(str(error).split())[:300],
            expected="a file, a folder, or the id of a data set on the hub (org/name)",
            fix="check the spelling and the network, or download it by hand and give the folder",
        ) from error


def files(path: Path) -> list[Path]:
    """The files that are read for a path: itself, or what a folder holds, sorted by name.

    Raises:
        DataError: there is nothing to read.
    """
    with _told(path):
        if not path.exists():
            raise DataError("no such file", file=path, fix=names_near(path))
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise DataError("neither a file nor a folder", file=path, fix="write the rows to a file first")
        if (path / "dataset_dict.json").is_file():
            return _saved_split(path)
        if (path / "state.json").is_file():
            return _saved(path)
        found = _in_folder(path)
    if not found:
        raise DataError("no data in this folder", file=path, expected=f"files named {', '.join(FOLDER_SUFFIXES)}")
    return found


def _in_folder(folder: Path) -> list[Path]:
    """Data files at any depth; hidden ones, and those that only describe data, are left alone."""
    found = []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if _suffix(path) in FOLDER_SUFFIXES and path.name not in METADATA and not hidden and path.is_file():
            found.append(path)
    return _train_split(folder, found) if _is_snapshot(folder) else found


def _is_snapshot(folder: Path) -> bool:
    """A data set in the cache of huggingface_hub: datasets--org--name/snapshots/<revision>."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("datasets--")


def _train_split(folder: Path, found: list[Path]) -> list[Path]:
    """Data sets on the hub hold their test rows beside: where names tell the splits, the others are left out."""
    names = {path: path.relative_to(folder).as_posix().lower() for path in found}
    if not any(TRAIN.search(name) for name in names.values()):
        return found
    return [path for path in found if TRAIN.search(names[path]) or not NOT_TRAIN.search(names[path])]


def _described(path: Path, key: str) -> list[Any]:
    """A list out of a JSON file that `datasets` wrote."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[key]
        if isinstance(values, list):
            return values
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise DataError("broken: not what `datasets` writes", file=path, expected=f"an object with a list {key!r}")


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that `save_to_disk` wrote, in its order."""
    state = folder / "state.json"
    found = []
    for entry in _described(state, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError("broken: not what `datasets` writes", file=state, received=shorten(entry))
        if not (folder / name).is_file():
            raise DataError("a part of this data set is missing", file=folder, expected=name, fix="copy it again")
        found.append(folder / name)
    return found


def _saved_split(folder: Path) -> list[Path]:
    """The split to train on of a DatasetDict: the only one, or the one called train."""
    splits = _described(folder / "dataset_dict.json", "splits")
    chosen = splits[0] if len(splits) == 1 else "train"
    if chosen not in splits:
        fix = f"name one of its folders, for example {folder / str(splits[0])}" if splits else None
        raise DataError("which split?", file=folder, received=", ".join(map(str, splits)), expected="train", fix=fix)
    return _saved(folder / str(chosen))


def read(path: Path) -> Iterator[Item]:
    """The rows of one file, in order; what cannot be parsed comes as a DataError in its place.

    Raises:
        DataError: the file cannot be read, or not beyond some place.
    """
    with _told(path):
        head = _head(path)
        if not head:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        if head.startswith(LFS):
            raise DataError("a pointer of Git LFS, not the data itself", file=path, fix="fetch it: git lfs pull")
        reader = READERS.get(_suffix(path))
        if reader is None and not head.decode(_encoding(head), "ignore").lstrip().startswith(("[", "{")):
            raise DataError(
                "unknown kind of file",
                file=path,
                received=path.suffix or "a name without an ending",
                expected=", ".join(READERS),
                fix="save it as one of these (a spreadsheet: as CSV in UTF-8)",
            )
        yield from (reader or _read_json)(path)


def read_rows(path: Path) -> Iterator[Item]:
    """The rows of a file or of all files of a folder. See `read`."""
    for file in files(path):
        yield from read(file)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong inside is told with the file's name."""
    try:
        yield
    except FituneError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"the gzip file is cut off or broken ({error})", file=path, fix="download or pack it again"
        ) from None
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None


def _not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    """The error's own place counts from the last chunk: the line is found by reading again."""
    line, encoding = None, error.encoding.upper()
    if encoding.startswith("UTF-8"):
        encoding = "UTF-8"
        with _bytes(path) as stream:
            line = next((n for n, raw in enumerate(stream, 1) if not _decodes(raw)), None)
    bad = error.object[error.start : error.start + 1]
    return DataError(
        f"not {encoding}",
        file=path,
        line=line,
        received=f"byte 0x{bad.hex()}" if bad else "no byte",
        expected=f"{encoding} text",
        fix="save it as UTF-8; Chinese files are often GBK: iconv -f gbk -t utf-8",
    )


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _suffix(path: Path) -> str:
    """`.csv` of rows.CSV, and of rows.csv.gz too."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def _bytes(path: Path) -> BinaryIO:
    """The file, unpacked where it is packed."""
    file = path.open("rb")
    packed = file.read(2) == GZIP
    file.seek(0)
    if not packed:
        return file
    file.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


def _head(path: Path) -> bytes:
    with _bytes(path) as file:
        return file.read(256)


def _encoding(head: bytes) -> str:
    return next((name for bom, name in BOMS if head.startswith(bom)), "utf-8-sig")


@contextmanager
def _text(path: Path, newline: str) -> Iterator[Iterator[str]]:
    """The file's lines as text.

    Raises:
        DataError: a NUL character, which no text holds; there the file ends for us.
    """
    with io.TextIOWrapper(_bytes(path), _encoding(_head(path)), newline=newline) as stream:
        yield _without_nul(stream, path)


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(
                "a NUL character: this is no text",
                file=path,
                line=number,
                received=shorten(line[:60]),
                expected="text in UTF-8, or in UTF-16 with a byte order mark",
                fix="the file is broken or of another kind; save it anew as UTF-8",
            )
        yield line


def _read_json(path: Path) -> Iterator[Item]:
    """A list of rows, or one row a line: what the file begins with tells, not its name."""
    with _text(path, newline="\n") as lines:
        blank = 0
        for line in lines:
            if line.strip():
                break
            blank += 1
        else:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        if line.lstrip().startswith("["):
            yield from _parse_array("\n" * blank + line + "".join(lines), str(path))
        else:
            yield from _parse_lines(chain([line], lines), str(path), blank + 1)


def _parse_lines(lines: Iterable[str], file: str, first: int) -> Iterator[Item]:
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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
        yield row, Source(file, number)


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
    """The elements of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted = 1, 0
    while (at := _skip(text, at)) < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"broken JSON ({_reason(error)})",
                file=file,
                line=getattr(error, "lineno", line),
                received=shorten(text[at : at + 60]),
                expected="a list of objects, separated by commas",
                fix="nothing after this place can be read; mend the file there",
            ) from None
        yield row, Source(file, line)
    end = text.count("\n") + 1
    if at >= len(text):
        raise DataError("the list is not closed: the file is cut off", file=file, line=end, expected="]")
    if rest := text[at + 1 :].strip():
        raise DataError("text behind the end of the list", file=file, received=shorten(rest[:60]), expected="one list")


def _read_csv(path: Path, *, delimiter: str) -> Iterator[Item]:
    """Rows below a header; a quoted cell may hold line breaks, and the row's line is the one it starts on."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long answer
    with _text(path, newline="") as lines:
        table = _csv_rows(csv.reader(lines, delimiter=delimiter, strict=True), str(path))
        line, header = next(table, (1, []))
        if not header:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError("two columns of one name", file=path, line=line, received=", ".join(map(repr, twice)))
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
                fix="nothing after this place can be read; mend the file there",
            ) from None
        if cells:
            yield line, cells


def _read_parquet(path: Path) -> Iterator[Item]:
    from pyarrow import parquet

    with _arrow(path, "Parquet"), parquet.ParquetFile(path, pre_buffer=False) as file:  # else all row groups are held
        yield from _batches(file.iter_batches(batch_size=256), path)


def _read_arrow(path: Path) -> Iterator[Item]:
    """What `datasets` saves is an Arrow stream; others write Arrow files."""
    import pyarrow

    with _arrow(path, "Arrow"), pyarrow.memory_map(str(path)) as source:
        if _head(path).startswith(b"ARROW1"):
            file = pyarrow.ipc.open_file(source)
            yield from _batches((file.get_batch(n) for n in range(file.num_record_batches)), path)
        else:
            yield from _batches(pyarrow.ipc.open_stream(source), path)


@contextmanager
def _arrow(path: Path, kind: str) -> Iterator[None]:
    """pyarrow's errors are of many kinds; each is told as it is."""
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
        for row in batch.to_pylist():
            number += 1
            yield _without_nulls(row), Source(str(path), number)


def _without_nulls(value: Any) -> Any:
    """In a column store every struct has every field: what a row did not have stands there as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
# Arrow files that lie about are a cache of `datasets` more often than data: its own folders are known by state.json.
FOLDER_SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".arrow")
