"""Files to rows.

In: a file, a folder of files, a folder that `datasets` saved, or the id of a data set on the hub. Out: parsed rows in
order, each with its file and line (Parquet and Arrow: the row's number). READERS is the whole list of kinds: a new one
is a row of that table. Files are read as a stream, only a JSON list is held whole. A row that cannot be parsed comes as
a DataError in its place; a file that cannot be read on from some place raises one.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fitune.core.errors import DataError, FituneError, shorten
from fitune.core.files import expand, names_near
from fitune.core.records import Source
from fitune.data.encodings import Item, Notice, encoding_of, head_of, lines_of, not_text
from fitune.data.jsonrows import read_json
from fitune.data.tables import read_arrow, read_csv, read_parquet, read_xlsx

LFS = b"version https://git-lfs"
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # describe data, hold none
DESCRIBES = re.compile(r"(readme|licen[cs]e|notice|source|changelog|citation|authors)\b", re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
TRAIN, NOT_TRAIN = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])") for words in ("train", "test|valid|validation|val|dev")
)


STREAM = "-"  # what other commands call standard input


def from_a_stream() -> DataError:
    """Why standard input is not read in place of a file: a run reads its rows several times."""
    return DataError(
        "standard input cannot be read in place of a file",
        received=STREAM,
        expected="a path: rows are read several times, and again when a run is resumed",
        fix="write it to a file first: ... > rows.jsonl; then --data rows.jsonl",
    )


def locate(name: str) -> Path:
    """Where data lies: the path as it is, or the folder that a hub id was fetched to.

    Raises:
        DataError: it looks like a hub id, but the hub does not give it.
    """
    path = expand(name)
    with _with_the_name(path):
        if name == STREAM and not path.exists():
            raise from_a_stream()
        if path.exists() or not HUB_ID.fullmatch(name) or _suffix(path) in READERS:
            return path
    from huggingface_hub import snapshot_download

    wanted = [f"*{suffix}{packed}" for suffix in (*FOLDER_SUFFIXES, ".txt") for packed in ("", ".gz")]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; each is reported as it is
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
    with _with_the_name(path):
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
        raise DataError(
            "no data in this folder", file=path, expected=f"files named {', '.join((*FOLDER_SUFFIXES, *DOCUMENTS))}"
        )
    return found


def _in_folder(folder: Path) -> list[Path]:
    """Data files at any depth; hidden ones, and those that only describe data, are left alone."""
    everything = [
        path
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    ]
    found = [path for path in everything if _suffix(path) in FOLDER_SUFFIXES and path.name not in METADATA]
    if _is_snapshot(folder):
        texts = [path for path in everything if _suffix(path) == ".txt"]  # every data set there has a README.md
        return _train_split(folder, found or texts)
    return found or [path for path in everything if _suffix(path) in DOCUMENTS]


def documents_beside(path: Path) -> int:
    """How many documents of a folder are left alone because there are rows in it, its README and such not counted."""
    if not path.is_dir() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return 0
    if all(_suffix(file) in DOCUMENTS for file in _in_folder(path)):
        return 0
    texts = (file for file in path.rglob("*") if _suffix(file) in DOCUMENTS and file.is_file())
    return sum(not DESCRIBES.match(file.name) for file in texts)


def _is_snapshot(folder: Path) -> bool:
    """A data set in the cache of huggingface_hub: datasets--org--name/snapshots/<revision>."""
    return folder.parent.name == "snapshots" and folder.parents[1].name.startswith("datasets--")


def _train_split(folder: Path, found: list[Path]) -> list[Path]:
    """Data sets on the hub hold their test rows beside: where names show the splits, the others are left out."""
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


def read(path: Path, notice: Notice = lambda text: None) -> Iterator[Item]:
    """The rows of one file, in order; what cannot be parsed comes as a DataError in its place.

    Args:
        path: the file.
        notice: receives how it was understood, where nothing in it says so.

    Raises:
        DataError: the file cannot be read, or not beyond some place.
    """
    with _with_the_name(path):
        head = head_of(path)
        if not head:
            raise DataError("the file is empty", file=path, expected="rows to train on")
        if head.startswith(LFS):
            raise DataError("a pointer of Git LFS, not the data itself", file=path, fix="fetch it: git lfs pull")
        reader = READERS.get(_suffix(path))
        if reader is None and not head.decode(encoding_of(path), "ignore").lstrip().startswith(("[", "{")):
            raise DataError(
                "unknown kind of file",
                file=path,
                received=path.suffix or "a name without an ending",
                expected=", ".join(READERS),
                fix="save it as one of these (an old spreadsheet: as .xlsx, or CSV in UTF-8)",
            )
        yield from (reader or read_json)(path, notice)


def read_rows(path: Path) -> Iterator[Item]:
    """The rows of a file or of all files of a folder. See `read`."""
    for file in files(path):
        yield from read(file)


@contextmanager
def _with_the_name(path: Path) -> Iterator[None]:
    """What goes wrong inside is reported with the file's name."""
    try:
        yield
    except FituneError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"the gzip file is cut off or broken ({error})", file=path, fix="download or pack it again"
        ) from None
    except UnicodeDecodeError as error:
        raise not_text(path, error) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", file=path) from None


def _suffix(path: Path) -> str:
    """`.csv` of rows.CSV, and of rows.csv.gz too."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def _read_document(path: Path, notice: Notice) -> Iterator[Item]:
    """A file of plain text is one document, unless it is rows in JSON under another name."""
    with lines_of(path, notice) as lines:
        text = "".join(lines)
    if _holds_rows(text):
        notice(f"{path}: read as rows in JSON, which it holds, not as plain text")
        yield from read_json(path, lambda text: None)
    elif text.strip():
        yield {"text": text}, Source(str(path), 1)
    else:
        yield DataError("the document is empty", file=path, line=1, expected="some text to train on")


def _holds_rows(text: str) -> bool:
    """Is a text nothing but JSON objects, one a line or all in a list?"""
    start = text.lstrip("\ufeff \t\r\n")[:1]
    try:
        if start == "{":
            return all(isinstance(json.loads(line), dict) for line in text.split("\n") if line.strip())
        rows = json.loads(text) if start == "[" else []
    except (ValueError, RecursionError):
        return False
    return bool(rows) and all(isinstance(row, dict) for row in rows)


READERS: dict[str, Callable[[Path, Notice], Iterator[Item]]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
    ".xlsx": read_xlsx,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": _read_document,
    ".md": _read_document,
    ".markdown": _read_document,
}
DOCUMENTS = (".txt", ".md", ".markdown")  # in a folder: read where nothing else is there, since data has its README
# Arrow files that lie about are a cache of `datasets` more often than data: its own folders are known by state.json.
FOLDER_SUFFIXES = tuple(suffix for suffix in READERS if suffix != ".arrow" and suffix not in DOCUMENTS)
