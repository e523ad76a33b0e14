"""One safetensors file, read so that what is wrong with it is said with its name.

In: a file. Out: its tensors. The library's own errors name no file; a folder, a pipe or a device in its place may be
waited for without an end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
