"""Floating-point operations of what a trace goes over.

In: an operation and its arguments. Out: how many it takes: torch's own formulas (torch.utils.flop_counter), and for
attention on a CPU, of which it has none: a causal kernel leaves out what lies above the diagonal, half of the square, a
masked one computes all of it.
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


def formula(func: OpOverload) -> Formula | None:
    """Of an operation; None: it counts for nothing beside products."""
    packet = func._overloadpacket
    found: Formula | None = ON_CPU.get(packet) or flop_registry.get(packet)
    return found
