"""Attention of several conversations that go on at once: each sees its own keys and values alone.

In: q, k, v of the new rows of some conversations, side by side, and their caches (`turns`, a forward keyword that
transformers hands through to the attention function). Out: the same as if each conversation had been run alone: what is
computed for one has the same shapes and the same values whoever stands beside it. Registered with transformers under
the name CACHED.

Shapes: H = query heads, K = key/value heads, R = rows of all conversations and of the filler behind them, E = head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface

from fitune.models.kernels.attention import attend
from fitune.models.kernels.written import How

CACHED = "fitune_cached"
ROOM = 64  # rows by which a cache grows: its copies cost a sixty-fourth of what attention reads


def rooms(rows: int) -> int:
    """The rows that a cache takes memory for when it holds so many."""
    return -(-rows // ROOM) * ROOM


@dataclass
class Cache:
    """Keys and values of one conversation: of each layer two tensors (1, K, room, E), of which `length` rows count."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new rows (1, K, n, E) of a layer behind those that are there; all of them. `length` stays: the
        other layers write the same rows.
        """
        whole = self.length + key.shape[2]
        before = self.layers.get(layer)
        if before is None or before[0].shape[2] < whole:
            before = self.layers[layer] = self._more(before, key, value, whole)
        for kept, new in zip(before, (key, value), strict=True):
            kept[:, :, self.length : whole] = new
        return before[0][:, :, :whole], before[1][:, :, :whole]

    def _more(
        self, before: tuple[Tensor, Tensor] | None, key: Tensor, value: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        room = rooms(rows)
        made = []
        for n, new in enumerate((key, value)):
            larger = new.new_empty(1, new.shape[1], room, new.shape[3])
            if before is not None:
                larger[:, :, : self.length] = before[n][:, :, : self.length]
            made.append(larger)
        return made[0], made[1]

    def copy(self) -> Cache:
        """Another with the same values."""
        return Cache(self.length, {n: (key.clone(), value.clone()) for n, (key, value) in self.layers.items()})

    def bytes(self) -> int:
        """What it takes."""
        return sum(one.numel() * one.element_size() for pair in self.layers.values() for one in pair)


@dataclass(frozen=True)
class Turn:
    """The new rows of one conversation in a forward pass."""

    cache: Cache
    rows: int


def cached_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, R, E)
    key: Tensor,  # (1, K, R, E)
    value: Tensor,  # (1, K, R, E)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    turns: Sequence[Turn] = (),
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each conversation; the signature is transformers' attention interface.

    Args:
        turns: the conversations; the rows behind theirs are the filler, whose result is 0.
        sliding_window, softcap, s_aux: see `attention.flat_attention`.

    Returns:
        (1, R, H, E), and no attention weights.
    """
    layer = cast(int, module.layer_idx)
    how = How(0.0, scaling, sliding_window, softcap, s_aux)
    out = query.new_zeros(query.shape)
    start = 0
    for turn in turns:
        here = slice(start, start + turn.rows)
        keys, values = turn.cache.put(layer, key[:, :, here], value[:, :, here])
        if sliding_window is not None and turn.rows == 1:
            keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
        out[:, :, here] = attend(query[:, :, here], keys, values, how)
        start = here.stop
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CACHED, cached_attention)
