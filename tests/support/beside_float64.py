"""Fused operations beside the same in float64, on whatever implements them: values, gradients, and what is kept.

Imports torch and the kernels alone: a process of its own tries Triton's interpreter with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitune.models.kernels import fused

ACTS = [fused.SILU, fused.GELU]


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gated64(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if act == fused.SILU:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def rope64(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def close(found: Any, right: Any, dtype: torch.dtype, of: Tensor | None = None) -> None:
    """Args: of: what is summed up to it, where that may be larger than the sum."""
    eps, size = torch.finfo(dtype).eps, float((right if of is None else of).detach().abs().max())
    times = 16 if dtype == torch.float32 else 4  # what is computed in float32 is rounded once more to 16 bits
    torch.testing.assert_close(found.double().cpu(), right, rtol=2 * eps, atol=times * eps * (size + 1))


def pair(values: Tensor, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """What is computed with, and the same numbers in float64."""
    low = values.to(dtype)
    return low.to(device, copy=True).requires_grad_(), low.double().requires_grad_()


def check_norm(
    rows: int, width: int, dtype: torch.dtype, device: str = "cpu", trained: torch.dtype | None = None
) -> None:
    (x, x64), (w, w64) = (
        pair(torch.randn(2, rows, width), dtype, device),
        pair(torch.randn(width), trained or dtype, device),
    )
    grad, grad64 = pair(torch.randn(2, rows, width), dtype, device)
    out, right = fused.rms_norm(x, w, 1e-5), norm64(x64, w64, 1e-5)
    out.backward(grad)
    right.backward(grad64)
    assert out.dtype == dtype
    close(out, right, dtype)
    close(x.grad, x64.grad, dtype, grad64 * w64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-5))
    close(w.grad, w64.grad, dtype)


def check_gated(rows: int, width: int, act: str, joined: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    (both, both64), (grad, grad64) = (pair(3 * torch.randn(1, rows, n * width), dtype, device) for n in (2, 1))
    gate, up = both.chunk(2, -1) if joined else (half.clone() for half in both.chunk(2, -1))
    out, right = fused.swiglu(gate, up, act), gated64(both64[..., :width], both64[..., width:], act)
    out.backward(grad)
    right.backward(grad64)
    close(out, right, dtype)
    close(both.grad, both64.grad, dtype)


def check_rope(size: tuple[int, int, int, int, int], shared: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    batch, heads, groups, tokens, width = size
    (q, q64), (k, k64) = (pair(torch.randn(batch, tokens, h, width), dtype, device) for h in (heads, groups))
    angles = [pair(torch.randn(1 if shared else batch, tokens, width), dtype, device) for _ in "cs"]
    (cos, cos64), (sin, sin64) = [(a.detach(), b.detach()) for a, b in angles]
    outs = fused.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    right = [rope64(one.transpose(1, 2), cos64, sin64) for one in (q64, k64)]
    for one, other in zip(outs, right, strict=True):
        grad, grad64 = pair(torch.randn(one.shape), dtype, device)
        one.backward(grad, retain_graph=True)
        other.backward(grad64)
        close(one, other, dtype)
        assert one.transpose(1, 2).is_contiguous()
    close(q.grad, q64.grad, dtype)
    close(k.grad, k64.grad, dtype)


def check_loss(rows: int, width: int, weighted: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    logits, right = pair(4 * torch.randn(rows, width), dtype, device)
    labels, weights = torch.randint(width, (rows,)), torch.rand(rows) if weighted else torch.ones(rows)
    given = weights.to(device) if weighted else None
    kept = logits.detach().clone()
    exact = (torch.nn.functional.cross_entropy(right, labels, reduction="none") * weights).sum()
    (3 * exact).backward()
    for ours in (False, True):
        logits.grad = None
        loss = fused.cross_entropy(logits, labels.to(device), given, ours=ours)
        torch.testing.assert_close(loss.double().cpu(), exact.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(logits, kept)
        (3 * loss).backward()
        assert torch.equal(logits, kept) != ours
        close(logits.grad, right.grad, dtype)
