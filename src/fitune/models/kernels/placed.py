"""A batch on the model's device: everything of it goes there in one copy.

In: a batch, as numpy arrays, and what stands before each of its documents. Out: tensors. To a GPU they go as the parts
of one buffer, from pinned memory, so that nothing waits: a copy for each would cost a launch and a wait. On a CPU
nothing is copied at all.

The model meets few sizes: a filler brings its rows to one of them. It is a document of its own behind the others and
repeats the first one, so that its values are as finite, and its positions as allowed, as those; no label looks at it.
Label rows are brought to few sizes too, by rows of weight 0.

Shapes: T = tokens, L = label rows, D = documents, k = rows laid before each document, F = rows of the filler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitune.core.records import Batch
from fitune.data.batches import rounded
from fitune.models.kernels import label_rows
from fitune.models.kernels.flash import Documents, laid_before, leads, seen_keys
from fitune.models.kernels.label_rows import LabelRows

ALIGNED = 8  # bytes at which each part of the buffer begins


@dataclass(frozen=True)
class Placed:
    """A batch as a model takes it.

    ids: (T,), and with nothing laid before F more. positions: (T + D x k + F,). documents: their bounds, the filler's
    too. label_rows: (L,), rounded up, of the model's rows; labels, weights: (L,), as records.Batch has them. filler: F.
    order: where embeddings are laid before, of each row which of [those; the batch's] it is; keep: the rows of the
    batch among them. labelled: the label rows as a last block takes them that works on those alone.
    """

    ids: Tensor
    positions: Tensor
    documents: Documents
    label_rows: Tensor
    labels: Tensor
    filler: int = 0
    weights: Tensor | None = None
    order: Tensor | None = None
    keep: Tensor | None = None
    labelled: LabelRows | None = None

    def repeated(self, rows: Tensor) -> Tensor:
        """Rows (..., T + D x k), and behind them those that the filler repeats."""
        if not self.filler:
            return rows
        which = np.arange(self.filler) % int(self.documents.bounds[1])
        return torch.cat([rows, rows[..., torch.from_numpy(which).to(rows.device)]], dim=-1)


def place(batch: Batch, device: torch.device, *, laid: int = 0, prefix: int = 0, fill: bool = True) -> Placed:
    """The batch on a device.

    Args:
        batch: flat.
        device: the model's.
        laid: embeddings that are laid before every document.
        prefix: keys and values that stand before every document; its positions begin behind them.
        fill: bring its rows to one of few sizes; label rows are, in any case.
    """
    bounds, positions = batch.bounds, batch.positions + prefix if prefix else batch.positions
    shared = batch.shared
    parts: dict[str, NDArray[np.generic]] = {"ids": batch.ids, "label_rows": batch.label_rows}
    if laid:
        bounds, parts["order"], positions = laid_before(batch.bounds, laid, shared)
        shared = None if shared is None else shared + np.where(shared > 0, laid, 0)
        parts["keep"] = np.flatnonzero(positions >= laid)
        parts["label_rows"] = parts["keep"][batch.label_rows]
    parts["positions"] = positions
    filler = rounded(len(positions)) - len(positions) if fill else 0
    if filler:
        for name in ("positions", "order" if laid else "ids"):
            parts[name] = np.concatenate([parts[name], np.resize(parts[name][: bounds[1]], filler)])
        bounds = np.append(bounds, np.int32(len(parts["positions"])))
        shared = None if shared is None else np.append(shared, 0)
    own = parts["label_rows"].astype(np.int64)
    parts |= _labels(batch, own)
    worth = fill and 0 < len(own) <= label_rows.WORTH * len(batch.ids)
    spans = label_rows.spans(bounds, own, shared) if worth else None
    if spans is not None:
        parts |= label_rows.arrays(spans, own, len(parts["label_rows"]) - len(own), prefix)
    parts["queries"] = bounds.astype(np.int32)
    counts = np.zeros(len(bounds) - 1, np.int64) if shared is None else shared.astype(np.int64)
    longest = int(np.diff(bounds).max()), int((np.diff(bounds) + counts).max()) + prefix
    if prefix or shared is not None:
        begins = leads(bounds, counts)
        parts["keys"], parts["rows"] = seen_keys(bounds[:-1], bounds[1:], begins, counts, prefix)
    there = send(parts, device)
    labelled = None if spans is None else label_rows.placed(spans, there, prefix)
    queries = there.pop("queries")
    keys, rows = there.pop("keys", queries), there.pop("rows", None)
    begun = None if shared is None else tuple(shared.tolist())
    documents = Documents(torch.from_numpy(bounds), queries, keys, longest, rows, begun)
    return Placed(documents=documents, filler=filler, labelled=labelled, **there)


def _labels(batch: Batch, rows: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
    """Label rows, labels and weights; behind them the first one again, with weight 0, up to one of few sizes."""
    count = len(rows)
    more = rounded(count) - count
    found = {"label_rows": rows, "labels": batch.labels}
    if more:
        found = {name: np.append(values, np.resize(values[:1], more)) for name, values in found.items()}
    if batch.weights is not None or more:
        weights = np.ones(count, np.float32) if batch.weights is None else batch.weights
        found["weights"] = np.append(weights, np.zeros(more, weights.dtype))
    return found


def send(parts: Mapping[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
    """Arrays on a device, by name: on a CPU as they are, on a GPU as views of one buffer."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in parts.items()}
    return views(pack(parts, pin=device.type == "cuda").to(device, non_blocking=True), parts)


def pack(parts: Mapping[str, NDArray[np.generic]], *, pin: bool) -> Tensor:
    """The bytes of all arrays, one behind the other.

    Args:
        pin: in memory that a GPU reads by itself, while the CPU goes on.
    """
    buffer = torch.empty(sum(map(_room, parts.values())), dtype=torch.uint8, pin_memory=pin)
    start = 0
    for array in parts.values():
        buffer[start : start + array.nbytes] = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
        start += _room(array)
    return buffer


def views(buffer: Tensor, parts: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """The arrays as tensors in the buffer that `pack` made of them."""
    found, start = {}, 0
    for name, array in parts.items():
        found[name] = buffer[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        start += _room(array)
    return found


def _room(array: NDArray[np.generic]) -> int:
    return -(-array.nbytes // ALIGNED) * ALIGNED
