"""The documents of a flat batch one by one, for attention that is called for each of them.

In: q, k, v of all documents side by side, and their lengths. Out: q, k, v of each. On a CPU, products in 16 bits have a
compiled kernel for each length (oneDNN's: 300 lengths held 60 MiB more within the bounds of processor.py, 180 within
torch's own, and took a third longer than one), so there a document gets rows behind its own, up to a multiple of STEP,
unless it is computed in float32 (`short.py`). They come later than all of its tokens, which therefore do not see them;
what attention gives for them is left out.

Shapes: H = heads, T = tokens of all documents, L = of one, E = head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn import functional as F

from fitune.models.kernels import flash, target

STEP = 32


def rows(length: int, query: Tensor) -> int:
    """How many rows a document of that length gets, where queries are like these."""
    compiled = target.of(query.device).kind == "cpu" and flash.computed_in(query) in flash.HALF
    return -(-length // STEP) * STEP if compiled else length


def apart(lengths: Sequence[int], *sides: Tensor, exact: Sequence[bool] | None = None) -> Iterator[list[Tensor]]:
    """Of each document (1, H, its rows, E) for every side (1, H, T, E); the first side are queries.

    Args:
        exact: whether a document gets no rows behind its own.
    """
    # split, not slices: the backward pass of a slice writes zeros for all other documents
    split = zip(*(side.split(list(lengths), dim=2) for side in sides), strict=True)
    for length, as_it_is, parts in zip(lengths, exact or [False] * len(lengths), split, strict=True):
        more = 0 if as_it_is else rows(length, sides[0]) - length
        yield [F.pad(part, (0, 0, 0, more)) for part in parts] if more else list(parts)
