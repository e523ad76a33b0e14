"""Attention over all documents of a flat batch in one call, on a CUDA GPU.

FlashAttention 2 (Dao 2023, arXiv:2307.08691) takes the bounds of the documents and never looks past them, so a batch
of 64 documents costs as many launches as one of a single document. In: q, k, v of all documents side by side. Out: the
same as a call for each document (`kernels/attention.py`), which is taken wherever this kernel cannot do what a model
wants; `refusal` says why.

Shapes: H = query heads, K = key/value heads, T = tokens of all documents, E = head width, D = documents,
k = prefix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fitune.models.kernels.target import Target

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # of a head (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp)


@dataclass(frozen=True)
class Documents:
    """The documents of a flat batch; made once for a micro-batch (kernels/placed.py): no layer copies or waits.

    Args:
        bounds: (D + 1,) on the CPU.
        queries, keys: (D + 1,) int32 on the model's device; keys have the prefix of every document among them.
        longest: tokens of the longest document, without and with its prefix.
        order: of all keys which row of [prefix; keys] they are; None: they are the rows.
        shared: (D,), as Batch has it: so many first rows of a document before it are keys of each, too; None: of none.
    """

    bounds: Tensor
    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    order: Tensor | None = None
    shared: tuple[int, ...] | None = None


def leads(bounds: NDArray[np.integer], shared: NDArray[np.integer]) -> NDArray[np.int64]:
    """(D,): of each document where the rows begin that it shares: those of the nearest one before it that shares none.

    Args:
        bounds: (D + 1,). shared: as Batch has it.
    """
    own = np.where(shared > 0, 0, np.arange(len(shared)))
    return np.asarray(bounds, np.int64)[np.maximum.accumulate(own)]


def laid_before(
    bounds: NDArray[np.integer], count: int, shared: NDArray[np.integer] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """So many rows laid before every document of a batch with these bounds that shares none with the one before it.

    Args:
        shared: as Batch has it.

    Returns:
        The bounds then; of every row then, which row of [those laid before; the batch] it is, and its position in its
        document.
    """
    begins = np.zeros(len(bounds) - 1, np.int64) if shared is None else shared.astype(np.int64)
    laid = np.where(begins > 0, 0, count)
    lengths = np.diff(bounds) + laid
    there = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.arange(there[-1]) - np.repeat(there[:-1], lengths)
    order = np.where(inside < np.repeat(laid, lengths), inside, np.repeat(bounds[:-1] + count - laid, lengths) + inside)
    positions = inside + np.repeat(np.where(begins > 0, begins + count, 0), lengths)
    return there.astype(np.int32), order.astype(np.int64), positions


def seen_keys(
    starts: NDArray[np.integer],
    ends: NDArray[np.integer],
    leads: NDArray[np.integer],
    shared: NDArray[np.integer],
    prefix: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The keys of documents: a prefix, rows that each shares with the one before it, its own.

    Args:
        starts, ends: of each document, its first row and the one behind its last.
        leads: where the rows begin that it shares.
        shared: how many these are.
        prefix: keys that stand before every document.

    Returns:
        Bounds of their keys, and of every key which row of [prefix; rows] it is.
    """  # fmt: skip
    counts = (ends - starts).astype(np.int64) + shared + prefix
    bounds = np.concatenate([[0], np.cumsum(counts)])
    inside = np.arange(bounds[-1]) - np.repeat(bounds[:-1], counts) - prefix  # below 0: of the prefix
    own = np.repeat(shared, counts)
    behind = np.where(inside < own, np.repeat(leads, counts) + inside, np.repeat(starts, counts) + inside - own)
    return bounds.astype(np.int32), np.where(inside < 0, inside + prefix, behind + prefix).astype(np.int64)


def refusal(
    where: Target,
    width: int,
    dtype: torch.dtype,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: bool = False,
) -> str | None:
    """Why this kernel cannot do it; None: it can.

    Args:
        where: the device.
        width: of a head.
        dtype: what is computed in.
        dropout, softcap: as for `attention.flat_attention`.
        sinks: have heads a score for seeing nothing?
    """
    if where.kind != "cuda":
        return "not on a CUDA GPU"
    if where.capability < (8, 0):
        return f"compute capability {'.'.join(map(str, where.capability))} is below 8.0"
    if dtype not in HALF:
        return f"{str(dtype).removeprefix('torch.')} is not a 16-bit dtype"
    if softcap is not None:
        return "a soft cap on the scores"
    if sinks:
        return "attention sinks"
    if dropout:
        return "dropout on attention weights"
    return f"heads of width {width}" if width > WIDEST else None


def computed_in(query: Tensor) -> torch.dtype:
    """The dtype that attention computes in: autocast's, where that is on."""
    kind = query.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else query.dtype


def attend(
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E)
    documents: Documents,
    scaling: float | None = None,
    window: int | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,  # (1, K, k, E) each
) -> Tensor:
    """Causal attention of every document, its prefix in front: (1, T, H, E).

    Args:
        window: a token sees this many tokens, itself included.
    """
    dtype, width = computed_in(query), query.shape[-1]
    # not one[0], whose backward pass writes zeros and copies
    flat = [one.squeeze(0).transpose(0, 1).to(dtype) for one in (query, key, value)]  # (T, heads, E)
    if prefix is not None:
        ahead = [one.squeeze(0).transpose(0, 1).to(dtype) for one in prefix]
        flat[1:] = [torch.cat([first, rest]) for first, rest in zip(ahead, flat[1:], strict=True)]
    if documents.order is not None:
        flat[1:] = [one.index_select(0, documents.order) for one in flat[1:]]
    if rest := -width % 8:  # the kernel's widths; zeros change no score
        flat = [F.pad(one, (0, rest)) for one in flat]
    left = -1 if window is None else window - 1
    out: Tensor = aten._flash_attention_forward(
        *flat,
        documents.queries,
        documents.keys,
        *documents.longest,
        0.0,
        True,
        False,
        scale=scaling or width**-0.5,
        window_size_left=left,
        window_size_right=0,
    )[0]
    return out[None, ..., :width]
