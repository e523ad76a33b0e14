"""Where hidden states of frozen blocks are kept between epochs: in memory, or in a file.

In: rows of hidden states, and the place of the first one. Out: the same rows, bit for bit, or the answer that they are
not there as they were written. The file is raw numbers in the dtype that they were computed in; it belongs to one
process and goes with it, however that ends (core/scratch.py), so a later run never reads what a killed one left.

Shapes: N = rows of all documents, R = rows of one, W = width.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fitune.core.scratch import Scratch

FILE = "states.bin"


class Store(Protocol):
    """A place for rows."""

    def write(self, first: int, rows: Tensor) -> None:
        """Keep rows, (R, W) on the CPU, from row `first` on.

        Raises:
            OSError: there is no room.
        """

    def read(self, first: int, out: Tensor) -> bool:
        """Fill `out`, (R, W), with the rows of one document; False: they are not what was written."""

    def close(self) -> None:
        """Give the room back."""


class InMemory:
    """(N, W) of main memory; the system gives a page once it is written.

    Args:
        rows, width, dtype: of all states.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self._states = torch.empty(rows, width, dtype=dtype)

    def write(self, first: int, rows: Tensor) -> None:
        """See Store."""
        self._states[first : first + len(rows)] = rows

    def read(self, first: int, out: Tensor) -> bool:
        """See Store."""
        out.copy_(self._states[first : first + len(out)])
        return True

    def close(self) -> None:
        """See Store."""
        self._states = self._states[:0]


class OnDisk:
    """A file, read and written at its places: mapped pages would count as memory of this process.

    Args:
        folder: beside which a folder of this process's own is made.
        width, dtype: of the states.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self._each = width * dtype.itemsize
        self._scratch = Scratch(folder / "states")
        self._file = (self._scratch.path / FILE).open("x+b", buffering=0)
        self._sums: dict[int, int] = {}  # CRC-32 of a document's bytes, by its first row

    def write(self, first: int, rows: Tensor) -> None:
        """See Store."""
        left = _bytes(rows)
        self._sums.pop(first, None)
        total = zlib.crc32(left)
        self._file.seek(first * self._each)
        while len(left):
            left = left[self._file.write(left) or 0 :]
        self._sums[first] = total

    def read(self, first: int, out: Tensor) -> bool:
        """See Store."""
        wanted = _bytes(out)
        self._file.seek(first * self._each)
        at = 0
        while at < len(wanted):
            count = self._file.readinto(wanted[at:])
            if not count:
                return False
            at += count
        return self._sums.get(first) == zlib.crc32(wanted)

    def close(self) -> None:
        """See Store."""
        self._file.close()
        self._scratch.close()


def _bytes(rows: Tensor) -> memoryview:
    """The memory of contiguous rows."""
    return rows.view(torch.uint8).numpy().data.cast("B")
