"""Which rows of a flat batch carry a label, as a last block needs them that works on those rows alone.

In: the bounds of the documents, the label rows. Out: for each document with labels, its queries and its keys. What a
last block gives for other rows nobody looks at, but its keys and values are seen from later rows: so queries are those
of the label rows, keys and values those of all rows up to the document's last label.

Attention takes queries that stand side by side at the end of their keys. Where a document has rows without a label
between labels (a conversation of several answers), those rows get another row's query, and what comes of it is left
out.

Shapes: L = label rows, Q = queries, D = documents with labels, k = prefix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitune.models.kernels.apart import Part
from fitune.models.kernels.flash import Documents, leads, seen_keys

WORTH = 0.95  # share of rows with a label: above it, picking rows takes longer than what is left out
KEYWORD = "label_rows"  # of a model's forward: it reaches the last block, and its attention


@dataclass(frozen=True)
class LabelRows:
    """See the module's text.

    Args:
        rows: (L,) of the model's rows, rounded up as `placed.Placed` has them.
        parts: queries and keys of each document with labels.
        documents: the same for one call for all documents; its `order` says which rows its keys are.
        taken: (Q,) which label row each query is of; None: the label rows are the queries, and behind them nobody's.
        back: (L,) which query each label row has; None: as for taken.
    """

    rows: Tensor
    parts: list[Part]
    documents: Documents
    taken: Tensor | None = None
    back: Tensor | None = None

    def queries(self, query: Tensor) -> Tensor:
        """(1, H, Q, E) of those of the label rows, (1, H, L, E)."""
        return query if self.taken is None else query.index_select(2, self.taken)

    def of_queries(self, out: Tensor) -> Tensor:
        """(1, L, H, E) of what attention gives for the queries, (1, Q, H, E)."""
        return out if self.back is None else out.index_select(1, self.back)


class KeysAndValues(Exception):
    """What ends the first pass through a last block, once its attention has keys and values of all rows."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("keys and values of all rows are there")
        self.key, self.value = key, value


class Ahead:
    """In place of label rows: the pass that makes keys and values of all rows."""


@dataclass(frozen=True)
class Behind:
    """In place of label rows: the pass of the label rows themselves. key, value: (1, K, T, E), of all rows."""

    rows: LabelRows
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Spans:
    """Queries and keys of each document with labels. first, last: its label rows; start: its first row; lead, shared:
    where the rows begin that it shares with the document before it, and how many these are."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    start: NDArray[np.int64]
    lead: NDArray[np.int64]
    shared: NDArray[np.int64]

    @property
    def queries(self) -> NDArray[np.int64]:
        """How many each document has."""
        return self.last - self.first + 1

    @property
    def keys(self) -> NDArray[np.int64]:
        """How many each document has."""
        return self.last - self.start + 1 + self.shared

    def parts(self) -> list[Part]:
        """As LabelRows has them."""
        own = self.queries, self.start, self.last + 1, self.lead, self.shared
        return list(map(Part, *(each.tolist() for each in own)))


def spans(bounds: NDArray[np.integer], rows: NDArray[np.integer], shared: NDArray[np.integer] | None = None) -> Spans:
    """Of documents with these bounds.

    Args:
        rows: those with a label, in order; at least one.
        shared: as Documents has it; None: of none.
    """
    document = np.searchsorted(bounds, rows, side="right") - 1
    labelled, at, counts = np.unique(document, return_index=True, return_counts=True)
    count = np.zeros(len(labelled), np.int64) if shared is None else shared[labelled].astype(np.int64)
    lead = np.zeros(len(labelled), np.int64) if shared is None else leads(bounds, shared)[labelled]
    first, last = rows[at], rows[at + counts - 1]
    return Spans(*(one.astype(np.int64) for one in (first, last, bounds[labelled], lead, count)))


def arrays(found: Spans, rows: NDArray[np.integer], filler: int, prefix: int) -> dict[str, NDArray[np.generic]]:
    """What goes to the device, by the names of LabelRows and Documents.

    Args:
        found: of these rows.
        rows: those with a label.
        filler: rows behind them that fill their number up.
        prefix: keys and values that stand before every document.
    """
    queries = _stretches(found.first, found.last + 1)
    keys, order = seen_keys(found.start, found.last + 1, found.lead, found.shared, prefix)
    made: dict[str, NDArray[np.generic]] = {
        "label_queries": _bounds(found.queries), "label_keys": keys, "label_order": order,
    }  # fmt: skip
    between = len(queries) > len(rows)
    if between:
        made["taken"] = np.searchsorted(rows, queries, side="right") - 1
        made["back"] = np.append(np.searchsorted(queries, rows), np.zeros(filler, np.int64))
    return made


def placed(found: Spans, there: dict[str, Tensor], prefix: int) -> LabelRows:
    """The label rows of a batch.

    Args:
        found, prefix: as for `arrays`.
        there: what that gave, on the device, with the batch's label rows; what is taken of it is not left in it.
    """
    queries, keys, order = (there.pop(f"label_{name}") for name in ("queries", "keys", "order"))
    longest = int(found.queries.max()), int(found.keys.max()) + prefix
    documents = Documents(torch.from_numpy(_bounds(found.queries)), queries, keys, longest, order)
    return LabelRows(there["label_rows"], found.parts(), documents, there.pop("taken", None), there.pop("back", None))


def _bounds(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def _stretches(starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """All rows from each start to each end, one stretch behind the other."""
    counts = ends - starts
    found: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(starts - np.cumsum(counts) + counts, counts)
    return found
