"""Attention of a short document in 16 bits on a CPU, computed in float32.

In: q, k, v of one document in 16 bits. Out: attention, in the same dtype. torch's kernel (FlashAttention, Dao et al.
2022, arXiv:2205.14135) converts and reorders the blocks that it multiplies in 16 bits: forward and backward of 64 to
256 tokens take 1.4 to 3 times as long as in float32. Here the document is converted once and the same kernel runs in
float32; what is kept for the backward pass stays in 16 bits, beside a float32 number for each row. Nor is a kernel
compiled for each length, so that a document needs no rows behind its own (`apart.py`).

Shapes: H = query heads, K = key/value heads, L = rows, S = keys, E = head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fitune.models.kernels import flash, target

aten = torch.ops.aten
LONGEST = 256  # keys; of more of them 16 bits are as fast
_off = ContextVar("_off", default=False)


@contextmanager
def in_16_bits() -> Iterator[None]:
    """Inside, short documents go through torch's kernel of 16 bits too, as they do in transformers: to be compared."""
    before = _off.set(True)
    try:
        yield
    finally:
        _off.reset(before)


def suits(query: Tensor, keys: int) -> bool:
    """Is it attention of few keys in 16 bits, on a CPU?"""
    return (
        not _off.get()
        and keys <= LONGEST
        and flash.computed_in(query) in flash.HALF
        and target.of(query.device).kind == "cpu"
    )


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention, (1, H, L, E); L = S, or one row that sees all keys."""
    out: Tensor = _Short.apply(query, key, value, scale)
    return out


class _Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        dtype, causal = flash.computed_in(query), query.shape[2] > 1
        wide = [one.float() for one in (query, key, value)]
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(*wide, 0.0, causal, scale=scale)
        kept: Tensor = out.to(dtype)
        ctx.save_for_backward(query, key, value, kept, sums)
        ctx.how = causal, scale
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *given, sums = ctx.saved_tensors
        causal, scale = ctx.how
        wide = [one.float() for one in (grads[0], *given)]
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*wide, sums, 0.0, causal, scale=scale)
        query, key, value = (grad.to(one.dtype) for grad, one in zip(found, given, strict=False))
        return query, key, value, None
