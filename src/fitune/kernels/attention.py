"""Attention over a flat batch: each document attends to itself alone.

In: q, k, v of all documents side by side, and their bounds (`cu_seq_lens_q`, a forward keyword that transformers hands
through to the attention function). Out: the same as if each document had been run alone. Registered with transformers
under the name FLAT; no module is patched. Without bounds it is transformers' own SDPA path.

Shapes: B = 1, H = query heads, K = key/value heads, T = tokens of all documents, E = head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FLAT = "fitune_flat"


def flat_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention per document; the signature is transformers' attention interface.

    Args:
        cu_seq_lens_q: (D + 1,) bounds of the documents, on the CPU, so that slicing by them never waits for a GPU.
        sliding_window: a token sees this many tokens, itself included.
        softcap: scores are bent to stay below it (Gemma 2); SDPA cannot do that, so it is written out.
        prefix: of each layer, keys and values (1, K, k, E) that stand before every document (prefix-tuning).
        s_aux: (H,) a score of every head for seeing nothing (gpt-oss); written out too.

    Returns:
        (1, T, H, E), and no attention weights.
    """
    if cu_seq_lens_q is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    grouped = query.shape[1] != key.shape[1]
    bounds = cu_seq_lens_q.tolist()
    before = None if prefix is None else [t.to(query.dtype) for t in prefix[cast(int, module.layer_idx)]]
    outputs = []
    for start, end in pairwise(bounds):
        keys, values = key[:, :, start:end], value[:, :, start:end]
        if before is not None:
            keys, values = torch.cat([before[0], keys], dim=2), torch.cat([before[1], values], dim=2)
        mask = _mask(end - start, keys.shape[2], sliding_window, query.device)
        if softcap is not None or s_aux is not None:
            mask = _mask(end - start, keys.shape[2], sliding_window, query.device, always=True)
            written = (scaling or query.shape[-1] ** -0.5, softcap, s_aux, dropout)
            outputs.append(_written_out(query[:, :, start:end], keys, values, mask, *written))
            continue
        shared = grouped
        if grouped and mask is not None and query.device.type == "cuda":  # no fused kernel there takes both
            times, shared = query.shape[1] // keys.shape[1], False
            keys, values = (one.repeat_interleave(times, dim=1) for one in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=shared,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _written_out(
    query: Tensor,  # (1, H, L, E)
    key: Tensor,  # (1, K, S, E)
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attention in its parts: (1, H, L, E)."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(query.dtype), dropout) @ values


def _mask(length: int, keys: int, width: int | None, device: torch.device, *, always: bool = False) -> Tensor | None:
    """(length, keys): which keys a token sees, the last one being its own; None: plain causal attention."""
    if not always and length == keys and (width is None or length <= width):
        return None
    distance = torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (distance >= 0) & (distance < (width or keys))


AttentionInterface.register(FLAT, flat_attention)
