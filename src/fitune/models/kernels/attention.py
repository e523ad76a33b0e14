"""Attention over a flat batch: each document attends to itself alone.

In: q, k, v of all documents side by side, and their bounds (`cu_seq_lens_q`, a forward keyword that transformers hands
through to the attention function). Out: the same as if each document had been run alone. Registered with transformers
under the name FLAT; no module is patched. Without bounds it is transformers' own SDPA path. On a CUDA GPU all documents
go through one call (`kernels/flash.py`), where that kernel can do what the model wants.

Shapes: B = 1, H = query heads, K = key/value heads, T = tokens of all documents, E = head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fitune.models import attached, sizes
from fitune.models.interfaces import CausalLM, decoder
from fitune.models.kernels import apart, flash, short, target, written
from fitune.models.kernels.label_rows import Ahead, Behind, KeysAndValues
from fitune.models.kernels.written import How

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
    documents: flash.Documents | None = None,
    label_rows: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention per document; the signature is transformers' attention interface.

    Args:
        cu_seq_lens_q: (D + 1,) bounds of the documents, on the CPU, so that slicing by them never waits for a GPU.
        sliding_window: a token sees this many tokens, itself included.
        softcap: scores are bent to stay below it (Gemma 2); SDPA cannot do that, so it is written out (`written.py`).
        prefix: of each layer, keys and values (1, K, k, E) that stand before every document (prefix-tuning).
        s_aux: (H,) a score of every head for seeing nothing (gpt-oss); written out too.
        documents: the bounds as one call for all documents needs them; without, there is a call for each.
        label_rows: which of its two passes a last block is in (`kernels/last_block.py`); of others it is not looked at.

    Returns:
        (1, T, H, E), and no attention weights.
    """
    if cu_seq_lens_q is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if isinstance(label_rows, Ahead):
        raise KeysAndValues(key, value)
    before = None if prefix is None else prefix[cast(int, module.layer_idx)]
    how = How(dropout, scaling, sliding_window, softcap, s_aux)
    if isinstance(label_rows, Behind):
        rows, key, value = label_rows.rows, label_rows.key, label_rows.value
        out = _attended(
            rows.queries(query), key, value, rows.parts, None if documents is None else rows.documents, before, how
        )
        return rows.of_queries(out), None
    parts = apart.whole(cu_seq_lens_q.tolist(), None if documents is None else documents.shared)
    return _attended(query, key, value, parts, documents, before, how), None


def _attended(
    query: Tensor,  # (1, H, Q, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,
    parts: Sequence[apart.Part],
    documents: flash.Documents | None,
    prefix: tuple[Tensor, Tensor] | None,
    how: How,
) -> Tensor:
    """(1, Q, H, E): all documents in one call, or in a call for each."""
    if documents is not None and _refusal(query, how.dropout, how.softcap, how.sinks) is None:
        count = sum(part.count for part in parts)
        out = flash.attend(query.narrow(2, 0, count), key, value, documents, how.scaling, how.window, prefix)
        more = query.shape[2] - count  # queries behind those of all documents are nobody's
        return F.pad(out, (0, 0, 0, 0, 0, more)) if more else out
    ahead = [] if prefix is None else [one.to(query.dtype) for one in prefix]
    mask = partial(causal_mask, width=how.window, device=query.device)
    if written.suits(query, how):
        return written.attend(query, key, value, parts, partial(_seen, mask), how, ahead)
    if how.softcap is None and how.sinks is None and apart.is_one_function(query, value, how.dropout):
        return apart.attend(query, key, value, parts, [mask], how.scaling, ahead)
    return apart.one_by_one(query, key, value, parts, lambda number, q, k, v, first: attend(q, k, v, how, first), ahead)


def _refusal(query: Tensor, dropout: float, softcap: float | None, sinks: Tensor | None) -> str | None:
    where, dtype = target.of(query.device), flash.computed_in(query)
    return flash.refusal(where, query.shape[-1], dropout=dropout, dtype=dtype, softcap=softcap, sinks=sinks is not None)


def chosen(model: CausalLM, dtype: torch.dtype) -> str:
    """How a model's flat batches go through attention, as text, and why.

    Args:
        model: transformers'.
        dtype: what it computes in.
    """
    config, device = model.config, next(model.parameters()).device
    if attached.of(model).flat is not None:
        return "a call for each document: ALiBi"
    if hasattr(decoder(model), "flat_positions"):
        return "a call for each document: a prompt that attends both ways"
    width = sizes.head_width(config)
    why = flash.refusal(
        target.of(device),
        width,
        dtype,
        getattr(config, "attention_dropout", None) or 0.0,
        getattr(config, "attn_logit_softcapping", None),
        any("sinks" in name for name, _ in model.named_parameters()),
    )
    return "one call for all documents (FlashAttention)" if why is None else f"a call for each document: {why}"


def attend(query: Tensor, key: Tensor, value: Tensor, how: How, ahead: int | None = None) -> Tensor:
    """Attention of one document, (1, H, L, E), to its keys and values, (1, K, S, E), of which so many stand before that
    of the first query; None: queries are the last L of S."""
    length, keys = query.shape[2], key.shape[2]
    ahead = keys - length if ahead is None else ahead
    if how.softcap is not None or how.sinks is not None:
        mask = causal_mask(length, keys, ahead, how.window, query.device, always=True)
        return written.of_one(query, key, value, mask, how)
    mask = causal_mask(length, keys, ahead, how.window, query.device)
    if mask is None and not how.dropout and query.shape[-1] == value.shape[-1] and short.suits(query, keys):
        return short.attend(query, key, value, how.scaling)
    shared = query.shape[1] != key.shape[1]
    if shared and mask is not None and target.of(query.device).kind == "cuda":  # no fused kernel there takes both
        times, shared = query.shape[1] // key.shape[1], False
        key, value = (one.repeat_interleave(times, dim=1) for one in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=how.dropout,
        is_causal=mask is None and length > 1,
        scale=how.scaling,
        enable_gqa=shared,
    )


def _seen(mask: Callable[..., Tensor | None], *sizes: int) -> Tensor:
    """A mask that is always there."""
    found = mask(*sizes, always=True)
    assert found is not None
    return found


def causal_mask(
    length: int, keys: int, ahead: int, width: int | None, device: torch.device, *, always: bool = False
) -> Tensor | None:
    """(length, keys): which keys a token sees: those up to its own, before which `ahead` stand for the first token;
    None: plain causal attention, or a single token that sees all."""
    plain = keys == ahead + length and 1 in (ahead + 1, length)
    if not always and plain and (width is None or keys <= width):
        return None
    distance = torch.arange(ahead, ahead + length, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return (distance >= 0) & (distance < (width or keys))


AttentionInterface.register(FLAT, flat_attention)
