"""The files that W&B and SwanLab write where there is no network: records in the log format of LevelDB.

In: a file, also one that a killed process left. Out: its records, whole ones alone. The format:
https://github.com/google/leveldb/blob/main/doc/log_format.md, behind a header of 7 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4  # parts of a record


def records(file: Path) -> Iterator[bytes]:
    """The records of a file, up to the first that is not whole."""
    data, at, parts = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # too little for a part: filled with zeros
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        end = at + HEADER + size
        if not FULL <= kind <= LAST or end > len(data):
            return
        parts = data[at + HEADER : end] if kind in (FULL, FIRST) else parts + data[at + HEADER : end]
        if kind in (FULL, LAST):
            yield parts
        at = end
