"""Floating-point operations of what a trace goes over.

In: an operation and its arguments. Out: how many it takes: torch's own formulas (torch.utils.flop_counter), and for
attention on a CPU, of which it has none: a causal kernel leaves out what lies above the diagonal, half of the square, a
masked one computes all of it. Before torch 2.13 its formulas of attention refuse keys and values of fewer heads than
the queries have, which the kernels themselves take: they are asked with as many heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Formula = Callable[..., int]  # (arguments..., out_val=what came out)


def _products(query: Tensor, key: Tensor, count: int, *, causal: bool) -> int:
    """So many products of queries and keys, (B, H, L, E) and (B, K, S, E)."""
    batch, heads, length, width = query.shape
    return count * 2 * batch * heads * length * key.shape[2] * width // (2 if causal else 1)


def _forward(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **more: Any) -> int:
    return _products(query, key, 2, causal=causal)  # scores, and what comes out


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool,
    **more: Any,
) -> int:  # fmt: skip
    return _products(query, key, 5, causal=causal)  # scores again, and the gradients of weights, queries, keys, values


ON_CPU: dict[Any, Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
# Kernels of CUDA: at which argument queries, keys and values begin, and which dimension of theirs is that of the heads
FUSED = {
    aten._scaled_dot_product_flash_attention: (0, 1),
    aten._scaled_dot_product_flash_attention_backward: (1, 1),
    aten._scaled_dot_product_efficient_attention: (0, 1),
    aten._scaled_dot_product_efficient_attention_backward: (1, 1),
    aten._scaled_dot_product_cudnn_attention: (0, 1),
    aten._scaled_dot_product_cudnn_attention_backward: (1, 1),
    aten._flash_attention_forward: (0, -2),
    aten._flash_attention_backward: (1, -2),
    aten._efficient_attention_forward: (0, -2),
    aten._efficient_attention_backward: (1, -2),
}


def _of_all_heads(torchs: Formula, first: int, heads: int) -> Formula:
    """torch's formula of attention, asked with keys and values of as many heads as the queries have."""

    def asked(*args: Any, **more: Any) -> int:
        query, many = args[first], list(args)
        for at in (first + 1, first + 2):
            shape = list(args[at].shape)
            shape[heads] = query.shape[heads]
            many[at] = torch.empty(shape, device="meta")
        return torchs(*many, **more)

    return asked


def formula(func: OpOverload) -> Formula | None:
    """Of an operation; None: it counts for nothing beside products."""
    packet = func._overloadpacket
    found: Formula | None = ON_CPU.get(packet) or flop_registry.get(packet)
    return _of_all_heads(found, *FUSED[packet]) if found is not None and packet in FUSED else found
