"""Long documents of plain text as several samples: nothing of them is dropped, and every token is trained once.

In: the sample of a whole document. Out: samples of at most max_length tokens. A piece begins with the BOS where the
tokenizer writes one, else with the last token of the piece before it, so that its own first token is predicted from
something; only the last one ends with the EOS.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fitune.core.records import Sample

AUTO = 2048  # tokens of a piece under `max_length: auto`, where nothing else asks for more


def split(whole: Sample, limit: int | None, bos_id: int | None) -> list[Sample]:
    """The pieces of a document.

    Args:
        whole: all of it, trained from its second token on.
        limit: the longest piece in tokens, at least 2; None: it stays whole.
        bos_id: the id that the tokenizer begins a text with; None: it has none.
    """
    if limit is None or len(whole) <= limit:
        return [whole]
    with_bos = bos_id is not None and whole.ids[0] == bos_id
    pieces = [_piece(whole, np.arange(limit), ends=False)]
    for start in range(limit, len(whole), limit - 1):
        end = min(start + limit - 1, len(whole))
        before = 0 if with_bos else start - 1
        pieces.append(_piece(whole, np.array([before, *range(start, end)]), ends=end == len(whole)))
    return pieces


def _piece(whole: Sample, at: NDArray[np.int64], *, ends: bool) -> Sample:
    """The ids at these places; the first of them is not trained again."""
    mask = whole.mask[at]
    mask[0] = False
    return replace(
        whole,
        ids=whole.ids[at],
        mask=mask,
        ends_whole=whole.ends_whole and ends,
        needed=len(at),
        intact=len(at),
        weights=None if whole.weights is None else whole.weights[at],
    )


def for_auto(lengths: ArrayLike, intact: ArrayLike, texts: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Lengths as `max_length: auto` sees them: a document that can be split asks for no more than AUTO tokens.

    Args:
        lengths: of the uncut samples.
        intact: of each, the shortest length that cuts nothing but old exchanges.
        texts: which of them are documents.
    """
    lengths, intact = np.asarray(lengths), np.asarray(intact)
    return np.where(texts, np.minimum(lengths, AUTO), lengths), np.where(texts, np.minimum(intact, AUTO), intact)
