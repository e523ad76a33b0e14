"""Samples on disk: a million rows in a few hundred megabytes of files, and next to none of memory.

In: samples, one after the other. Out: a sequence of the same samples, read through memory maps. Three flat files:
ids (int32), mask (one byte a token), and a table with one fixed-size record per sample. No pickle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fitune.records import Sample, Source

IDS, MASK, TABLE, META = "ids.i32", "mask.u8", "table.bin", "store.json"
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # first token, in tokens
        ("length", "<i4"),
        ("file", "<i4"),  # number of the source file; -1: no source
        ("line", "<i8"),
        ("cut_prompt", "<i4"),
        ("cut_answer", "<i4"),
        ("ends_whole", "u1"),
    ]
)


class StoreWriter:
    """Appends samples to the files of a folder that exists and is empty.

    Example:
        >>> with StoreWriter(folder) as writer:
        ...     for sample in samples:
        ...         writer.append(sample)
        >>> store = SampleStore(folder)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        self.tokens = self.count = 0

    def __enter__(self) -> StoreWriter:
        self._ids, self._mask, self._table = ((self.folder / name).open("wb") for name in (IDS, MASK, TABLE))
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._ids, self._mask, self._table):
            file.close()
        if error[0] is None:
            meta = {"files": list(self.files), "count": self.count, "tokens": self.tokens}
            (self.folder / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")

    def append(self, sample: Sample) -> None:
        """One more sample."""
        source = sample.source
        file = -1 if source is None else self.files.setdefault(source.file, len(self.files))
        record = np.array(
            (
                self.tokens,
                len(sample),
                file,
                0 if source is None else source.line,
                sample.cut_prompt,
                sample.cut_answer,
                sample.ends_whole,
            ),
            RECORD,
        )
        self._ids.write(sample.ids.astype("<i4", copy=False).tobytes())
        self._mask.write(sample.mask.astype(np.uint8).tobytes())
        self._table.write(record.tobytes())
        self.tokens += len(sample)
        self.count += 1


class SampleStore(Sequence[Sample]):
    """The samples of a folder that a StoreWriter filled, in the order they were appended.

    Raises:
        ValueError: the files do not belong together (a store that was not finished).
    """

    def __init__(self, folder: Path) -> None:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
        self.files: list[str] = meta["files"]
        self.table: NDArray[Any] = _map(folder / TABLE, RECORD)
        self._ids: NDArray[np.int32] = _map(folder / IDS, np.dtype("<i4"))
        self._mask: NDArray[np.bool_] = _map(folder / MASK, np.dtype(np.bool_))
        if len(self.table) != meta["count"] or not len(self._ids) == len(self._mask) == meta["tokens"]:
            raise ValueError(f"{folder}: not a finished store")

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        record = self.table[index]
        start, end = int(record["offset"]), int(record["offset"]) + int(record["length"])
        file = int(record["file"])
        return Sample(
            self._ids[start:end],
            self._mask[start:end],
            Source(self.files[file], int(record["line"])) if file >= 0 else None,
            int(record["cut_prompt"]),
            int(record["cut_answer"]),
            bool(record["ends_whole"]),
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[n] for n in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample."""
        return np.asarray(self.table["length"])


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """The file as an array that is read when it is looked at; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, kind)
    if path.stat().st_size % kind.itemsize:
        raise ValueError(f"{path}: cut off")
    return np.memmap(path, kind, mode="r")
