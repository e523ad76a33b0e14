"""One safetensors file, read so that what is wrong with it is said with its name; or written a tensor at a time.

In: a file. Out: its tensors. The library's own errors name no file; a folder, a pipe or a device in its place may be
waited for without an end; and it writes only tensors that are all there at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fitune.core.errors import FituneError, ModelError
from fitune.core.untrusted import check_file, reason


@contextmanager
def _named(file: Path, error: type[FituneError]) -> Iterator[None]:
    try:
        check_file(file, error)
        yield
    except FileNotFoundError:
        raise error(f"{file}: no such file", expected="a file of tensors", fix="copy it again") from None
    except (SafetensorError, OSError, ValueError) as problem:
        received = f"{file.stat().st_size:,} bytes: {reason(problem)}" if file.is_file() else reason(problem)
        raise error(
            f"{file}: no whole safetensors file", received=received, expected="a whole file", fix="copy it again"
        ) from None


@contextmanager
def opened(file: Path, error: type[FituneError] = ModelError) -> Iterator[Any]:
    """The file, whose tensors can be read one at a time.

    Raises:
        FituneError: of the kind that was asked for: it is missing, cut off, or no safetensors file.
    """
    with _named(file, error):
        handle = safe_open(file, "pt")
    with handle as tensors:
        yield tensors


def load(file: Path, error: type[FituneError] = ModelError) -> dict[str, Tensor]:
    """All tensors of the file.

    Raises:
        FituneError: as for `opened`.
    """
    with _named(file, error):
        return load_file(file)


# the format's names, in the order in which the library lays tensors into a file
NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNED = 8  # bytes


@dataclass(frozen=True)
class Late:
    """A tensor that is there once it is asked for. make: gives it, on the CPU; None: another process writes it."""

    dtype: torch.dtype
    shape: torch.Size
    make: Callable[[], Tensor | None]

    @property
    def nbytes(self) -> int:
        """What it takes in a file."""
        return self.shape.numel() * self.dtype.itemsize


def in_order(tensors: Mapping[str, Late]) -> list[tuple[str, Late]]:
    """As they stand in a file, and are made."""
    kinds = list(NAMES)
    return sorted(tensors.items(), key=lambda one: (kinds.index(one[1].dtype), one[0]))


def write(file: Path, tensors: Mapping[str, Late], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors that are made one after the other, in their order: no two of them are there at once."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end, ordered = 0, in_order(tensors)
    for name, late in ordered:
        place = [end, end := end + late.nbytes]
        header[name] = {"dtype": NAMES[late.dtype], "shape": list(late.shape), "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNED)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, late in ordered:
            one = late.make()
            assert one is not None, name
            assert (one.dtype, one.shape) == (late.dtype, late.shape), name
            out.write(one.contiguous().reshape(-1).view(torch.uint8).numpy().data)
