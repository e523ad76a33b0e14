"""The order of rows that llama.cpp expects in a tensor, where it is not that of transformers.

In: a tensor by transformers' name, the model's config. Out: the same numbers as llama.cpp reads them: rotary pairs side
by side, q, k and v one after the other, weights as (out, in), norms whose 1 is added already. Each function works on
meta tensors too, so that shapes are known before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Order = Callable[[str, Tensor, Any], Tensor]


def kept(name: str, tensor: Tensor, config: Any) -> Tensor:
    """As it is."""
    return tensor


def rotary(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Rows of q and k, whose rotary halves lie apart in transformers, as pairs: weights, biases, and LoRA's B."""
    if ".q_proj." in name:
        return pairs(tensor, config.num_attention_heads)
    if ".k_proj." in name:
        return pairs(tensor, getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return tensor


def pairs(tensor: Tensor, heads: int) -> Tensor:
    """(heads * d, ...), of each head the first half and the second, as the two halves' rows in turns."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def fused(name: str, tensor: Tensor, config: Any) -> Tensor:
    """(heads * 3 * d, ...), q, k and v of each head together, as all of q, all of k, all of v."""
    if "query_key_value" not in name:
        return tensor
    heads = config.num_attention_heads
    each = tensor.reshape(heads, 3, tensor.shape[0] // heads // 3, *tensor.shape[1:])
    return each.transpose(0, 1).reshape(tensor.shape)


def transposed(name: str, tensor: Tensor, config: Any) -> Tensor:
    """GPT-2's weights are (in, out)."""
    conv = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.transpose(0, 1) if conv else tensor


def shifted(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Gemma multiplies by one more than a norm's weight."""
    return tensor.to(torch.float32) + 1 if name.endswith("norm.weight") else tensor
