"""ALiBi attention over a flat batch (Press et al. 2022, arXiv:2108.12409): each document has its own biases.

In: BLOOM's attention module. Out: one that shares its layers and names. In a flat batch every document attends to
itself alone, through SDPA with the bias slope x position of the key; otherwise the original runs. The bounds of the
documents, and the prefix of prefix-tuning, reach it through the model's own `FlatState`: BLOOM's blocks hand no
keywords through; a block whose activations are recomputed finds them again (`switches.recomputed`).

Shapes: H = heads, T = tokens of all documents, L = of one, E = head width, k = prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from fitune.models import attached
from fitune.models.attached import FlatState
from fitune.models.kernels import apart, flash
from fitune.models.kernels.label_rows import Ahead, Behind, KeysAndValues


class AlibiAttention(BloomAttention):
    """See the module's text."""

    state: FlatState

    @classmethod
    def put_into(cls, model: nn.Module, places: Iterable[tuple[nn.Module, str]]) -> None:
        """Replace the attention modules of a model, once."""
        of_model = attached.of(model)
        if of_model.flat is not None:
            return
        of_model.flat = state = FlatState()
        for block, name in places:
            setattr(block, name, cls.from_base(getattr(block, name), state))

    @classmethod
    def from_base(cls, base: BloomAttention, state: FlatState) -> AlibiAttention:
        """The module around the layers of `base`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update({k: v for k, v in base.__dict__.items() if not k.startswith("_")})
        for name, module in base.named_children():
            made.add_module(name, module)
        made.training, made.state = base.training, state
        return made

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(1, T, W) to (1, T, W), the residual added, as BLOOM's blocks expect it."""
        there = self.state.documents
        if not isinstance(there, flash.Documents):
            out: tuple[Tensor, None] = super().forward(hidden_states, residual, *args, **kwargs)
            return out
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        prefix = self.state.prefix[self.layer_idx] if self.state.prefix else None
        ahead = [] if prefix is None else [one.to(key.dtype) for one in prefix]
        given = self.state.label_rows
        if isinstance(given, Ahead):
            raise KeysAndValues(key, value)
        if isinstance(given, Behind):
            rows = given.rows
            heads = rows.of_queries(self._heads(rows.queries(query), given.key, given.value, rows.parts, ahead))
        else:
            heads = self._heads(query, key, value, apart.whole(there.bounds.tolist(), there.shared), ahead)
        out_ = self.dense(heads.flatten(2))
        return residual + F.dropout(out_, p=self.hidden_dropout, training=self.training), None

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[apart.Part], ahead: Sequence[Tensor]
    ) -> Tensor:
        """(1, T, H, E): attention of every document."""
        mask = partial(self._bias, device=key.device, dtype=flash.computed_in(key))
        dropout = self.attention_dropout.p if self.training else 0.0
        if apart.is_one_function(query, value, dropout):
            return apart.attend(query, key, value, parts, [mask], self.inv_norm_factor, ahead)

        def call(number: int, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            bias = mask(q.shape[2], k.shape[2], first)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.inv_norm_factor
            )

        return apart.one_by_one(query, key, value, parts, call, ahead)

    def _bias(self, length: int, keys: int, ahead: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(1, H, length, keys): slope x position of the key, minus infinity where the key comes later."""
        ones = torch.ones(1, keys, device=device, dtype=torch.int64)
        bias = build_alibi_tensor(ones, self.num_heads, dtype)[None]  # (1, H, 1, keys)
        later = torch.ones(length, keys, dtype=torch.bool, device=device).triu(ahead + 1)
        masked: Tensor = bias.expand(1, -1, length, -1).masked_fill(later, torch.finfo(dtype).min)
        return masked
