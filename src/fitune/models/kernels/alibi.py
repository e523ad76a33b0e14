"""ALiBi attention over a flat batch (Press et al. 2022, arXiv:2108.12409): each document has its own biases.

In: BLOOM's attention module. Out: one that shares its layers and names. In a flat batch every document attends to
itself alone, through SDPA with the bias slope x position of the key; otherwise the original runs. The bounds of the
documents, and the prefix of prefix-tuning, reach it through the model's own `FlatState`: BLOOM's blocks hand no
keywords through; a block whose activations are recomputed finds them again (`switches.recomputed`).

Shapes: H = heads, T = tokens of all documents, L = of one, E = head width, k = prefix tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

from fitune.models import attached
from fitune.models.attached import FlatState
from fitune.models.kernels.apart import apart


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
        if self.state.bounds is None:
            out: tuple[Tensor, None] = super().forward(hidden_states, residual, *args, **kwargs)
            return out
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        prefix = self.state.prefix[self.layer_idx] if self.state.prefix else None
        lengths = [end - start for start, end in pairwise(self.state.bounds.tolist())]
        outputs = []
        for length, (queries, keys, values) in zip(lengths, apart(lengths, query, key, value), strict=True):
            if prefix is not None:
                keys = torch.cat([prefix[0].to(keys.dtype), keys], dim=2)
                values = torch.cat([prefix[1].to(values.dtype), values], dim=2)
            outputs.append(
                F.scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=self._bias(queries.shape[2], keys),
                    dropout_p=self.attention_dropout.p if self.training else 0.0,
                    scale=self.inv_norm_factor,
                )[:, :, :length]
            )
        heads = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)  # (1, T, W)
        out_ = self.dense(heads)
        return residual + F.dropout(out_, p=self.hidden_dropout, training=self.training), None

    def _bias(self, length: int, keys: Tensor) -> Tensor:
        """(1, H, L, k + L): slope x position of the key, minus infinity where the key comes later."""
        width = keys.shape[2]
        ones = torch.ones(1, width, device=keys.device, dtype=torch.int64)
        bias = build_alibi_tensor(ones, self.num_heads, keys.dtype)[None]  # (1, H, 1, k + L)
        later = torch.ones(length, width, dtype=torch.bool, device=keys.device).triu(width - length + 1)
        masked: Tensor = bias.expand(1, -1, length, -1).masked_fill(later, torch.finfo(keys.dtype).min)
        return masked
