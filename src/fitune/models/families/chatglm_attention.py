"""ChatGLM-6B's attention; what is special about it says chatglm_model.py.

In: hidden states, the angles of their positions, and what each token sees. Out: hidden states.

Shapes: B rows, T tokens, S = T + past, H heads, E head width, W = H x E.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fitune.models.kernels import apart
from fitune.models.kernels.attention import causal_mask
from fitune.models.kernels.label_rows import Ahead, Behind, KeysAndValues, LabelRows

Prefix = Sequence[tuple[Tensor, Tensor]]
Angles = tuple[Tensor, ...]  # cosines and sines of one half of a head, then of the other


def _rotate(x: Tensor, angles: Angles) -> Tensor:
    """(B, H, T, E), each half rotated by its own."""
    turned = []
    for half, cos, sin in zip(x.chunk(2, dim=-1), angles[::2], angles[1::2], strict=True):
        first, second = half.chunk(2, dim=-1)
        turned.append(half * cos + torch.cat([-second, first], dim=-1) * sin)
    return torch.cat(turned, dim=-1)


def see_their_prompts(rows: LabelRows, block: Tensor) -> bool:
    """Do the keys of label rows reach to the end of their prompt, all of which they see? Not where a prompt has labels,
    and what follows has none.

    Args:
        block: (T,), the block positions.
    """
    prompt = np.append(block.cpu().numpy() == 0, False)
    return not any(prompt[part.end - 1] and prompt[part.end] for part in rows.parts)


class Rotary(nn.Module):
    """Angles of both rows of positions, each for half of a head (Su et al. 2021, arXiv:2104.09864)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width  # of the half

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """(B, 2, T) to cos and sin (B, 1, T, width) of each row, one behind the other."""
        steps = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / 10000 ** (steps / self.width)
        angles = positions[..., None].float() * frequencies  # (B, 2, T, width / 2)
        both = torch.cat([angles, angles], dim=-1)
        return tuple(turn(both[:, row, None]).to(dtype) for row in (0, 1) for turn in (torch.cos, torch.sin))


class SelfAttention(nn.Module):
    """(B, T, W) to (B, T, W)."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        allowed: Sequence[Tensor | None],
        parts: Sequence[apart.Part] | None,
        prefix: Prefix | None,
        past: Any,
        position_embeddings: Angles,
        label_rows: object = None,
    ) -> Tensor:
        """See the module's text.

        Args:
            x: (B, T, W).
            allowed: a mask, or of a flat batch one for each document, True where a token sees another.
            parts: of a flat batch, its documents.
            prefix: of each layer keys and values before every document.
            past: a cache.
            position_embeddings: as `Rotary` gives them.
            label_rows: as for `attention.flat_attention`.
        """
        batch, length, _ = x.shape
        mixed = self.query_key_value(x).view(batch, length, self.heads, -1).transpose(1, 2)
        query, key, value = mixed.chunk(3, dim=-1)  # (B, H, T, E)
        query, key = (_rotate(t, position_embeddings) for t in (query, key))
        if isinstance(label_rows, Ahead):
            raise KeysAndValues(key, value)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        ahead = [] if prefix is None else [t.to(key.dtype) for t in prefix[self.layer_idx]]
        if parts is None:
            if ahead:
                key, value = (torch.cat(pair, dim=2) for pair in zip(ahead, (key, value), strict=True))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[0]).transpose(1, 2)
        elif isinstance(label_rows, Behind):
            rows = label_rows.rows
            of = {part.first: mask for part, mask in zip(parts, allowed, strict=True)}
            masks = [of[part.first] for part in rows.parts]
            query, key, value = rows.queries(query), label_rows.key, label_rows.value
            mixed = rows.of_queries(_per_document(query, key, value, rows.parts, masks, ahead))
        else:
            mixed = _per_document(query, key, value, parts, allowed, ahead)
        out: Tensor = self.dense(mixed.flatten(2))
        return out


def _per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Sequence[apart.Part],
    allowed: Sequence[Tensor | None],
    ahead: Sequence[Tensor],
) -> Tensor:
    """(1, T, H, E): attention of every document of a flat batch, (1, H, T, E)."""
    before = ahead[0].shape[2] if ahead else 0
    masks = [
        partial(_given, mask, before + part.shared, query.device) for part, mask in zip(parts, allowed, strict=True)
    ]
    if apart.is_one_function(query, value, 0.0):
        return apart.attend(query, key, value, parts, masks, None, ahead)

    def call(number: int, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        mask = masks[number](q.shape[2], k.shape[2], first)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)

    return apart.one_by_one(query, key, value, parts, call, ahead)


def _given(mask: Tensor | None, before: int, device: torch.device, length: int, keys: int, ahead: int) -> Tensor | None:
    """Of a document's mask (rows, before + rows) what queries see before the first of which so many keys stand; rows
    and keys behind the document's own are nobody's. Without a prompt they see all keys up to their own.

    Args:
        before: keys that stand before the document's own: a prefix, and rows that it shares.
    """
    if mask is None:
        return causal_mask(length, keys, ahead, None, device)
    first = max(0, ahead - before)
    seen = mask[first : first + length, :keys]
    rows, columns = length - seen.shape[0], keys - seen.shape[1]
    if columns:
        seen = F.pad(seen, (0, columns), value=False)
    return F.pad(seen, (0, 0, 0, rows), value=True) if rows else seen
