"""The Triton kernels of `kernels/fused.py`: a program of the GPU works on whole rows, or on a piece of one.

In: tensors on a CUDA device. Out: what the references there give. How rows are cut depends on their width alone, never
on their number (which is not specialized on, either), so the bits of a row do not depend on the rows beside it. Every
kernel computes in float32.

Imported only where Triton is there and a kernel is called.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1024  # elements of a row that a program takes, where rows may be cut


@triton.jit(do_not_specialize=["count", "eps"])
def norm_kernel(x, weight, out, scale, count, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < count)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    each = 1.0 / tl.sqrt_rn(tl.sum(value * value, axis=1) / width + eps)
    tl.store(scale + row, each, mask=row < count)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + place, (value * each[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def norm_backward_kernel(grad, x, weight, scale, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < count)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    each = tl.load(scale + row, mask=row < count, other=0.0)[:, None]
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    normal = tl.load(x + place, mask=there, other=0.0).to(tl.float32) * each
    wide = tl.load(grad + place, mask=there, other=0.0).to(tl.float32) * factor[None, :]
    mean = tl.sum(wide * normal, axis=1)[:, None] / width
    tl.store(out + place, (each * (wide - normal * mean)).to(out.dtype.element_ty), mask=there)


@triton.jit
def _act(gate, GELU: tl.constexpr):
    """act(gate) and its slope."""
    if GELU:
        high = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = high + gate * high * (1.0 - high) * inner
    else:
        high = tl.sigmoid(gate)
        slope = high * (1.0 + gate * (1.0 - high))
    return gate * high, slope


@triton.jit
def swiglu_kernel(gate, up, out, width, gate_row, up_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    value, _ = _act(tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32), GELU)
    other = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (value * other).to(out.dtype.element_ty), mask=there)


@triton.jit
def swiglu_backward_kernel(
    grad, gate, up, gate_grad, up_grad, width, gate_row, up_row, GELU: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < width
    value, slope = _act(tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32), GELU)
    other = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * width + column, mask=there, other=0.0).to(tl.float32)
    tl.store(gate_grad + row * width + column, (wide * other * slope).to(gate_grad.dtype.element_ty), mask=there)
    tl.store(up_grad + row * width + column, (wide * value).to(up_grad.dtype.element_ty), mask=there)


@triton.jit
def _turn(x, out, cos, sin, batch, token, tokens, heads, half, x_batch, x_head, x_token, BACK: tl.constexpr,
          HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """All heads of one token."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    there, known = (head < heads) & (column < half), column < half
    c1 = tl.load(cos + column, mask=known, other=0.0).to(tl.float32)
    c2 = tl.load(cos + half + column, mask=known, other=0.0).to(tl.float32)
    s1 = tl.load(sin + column, mask=known, other=0.0).to(tl.float32)
    s2 = tl.load(sin + half + column, mask=known, other=0.0).to(tl.float32)
    place = batch * x_batch + token * x_token + head * x_head + column
    a = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + place + half, mask=there, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    made = ((batch * tokens + token) * heads + head) * (2 * half) + column
    tl.store(out + made, first.to(out.dtype.element_ty), mask=there)
    tl.store(out + made + half, second.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "angles", "q_batch", "k_batch"])
def rope_kernel(q, k, cos, sin, q_out, k_out, tokens, angles, q_heads, k_heads, half, q_batch, q_head, q_token, k_batch,
                k_head, k_token, BACK: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Args: angles: elements from the cosines of a batch's row to those of the next; 0: they share them."""
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    angle = batch * angles + token * (2 * half)
    c, s = cos + angle, sin + angle
    _turn(q, q_out, c, s, batch, token, tokens, q_heads, half, q_batch, q_head, q_token, BACK, Q, HALF)
    _turn(k, k_out, c, s, batch, token, tokens, k_heads, half, k_batch, k_head, k_token, BACK, K, HALF)


@triton.jit
def loss_kernel(logits, labels, losses, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A row in pieces: its largest value so far, and the sum of exponentials below it."""
    row = tl.program_id(0).to(tl.int64)
    place = logits + row * WIDTH
    most, size = -3.0e38, 0.0
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(place + column, mask=column < WIDTH, other=-float("inf")).to(tl.float32)
        before = most
        most = tl.maximum(before, tl.max(value, axis=0))
        size = size * tl.exp(before - most) + tl.sum(tl.exp(value - most), axis=0)
    whole = most + tl.log(size)
    right = tl.load(place + tl.load(labels + row)).to(tl.float32)
    tl.store(total + row, whole)
    tl.store(losses + row, whole - right)


@triton.jit
def loss_backward_kernel(logits, labels, total, each, width, each_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, there = logits + row * width + column, column < width
    value = tl.load(place, mask=there, other=0.0).to(tl.float32)
    share = tl.exp(value - tl.load(total + row))
    made = tl.where(column == tl.load(labels + row), share - 1.0, share) * tl.load(each + row * each_row)
    tl.store(place, made.to(logits.dtype.element_ty), mask=there)


# ---- calls ----


def _cut(width: int) -> dict[str, int]:
    """How a kernel that sums over rows is cut: rows of a program, the next power of two, warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, PIECE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // 512))}


def _rows(x: Tensor) -> tuple[int, int]:
    """How many rows a dense tensor has, and their width."""
    width = x.shape[-1]
    return x.numel() // max(1, width), width


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See fused."""
    count, width = _rows(x)
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if count:
        cut = _cut(width)
        norm_kernel[(triton.cdiv(count, cut["ROWS"]),)](x, weight, out, scale, count, width, eps, **cut)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """See fused."""
    count, width = _rows(x)
    out = torch.empty_like(x)
    if count:
        cut = _cut(width)
        norm_backward_kernel[(triton.cdiv(count, cut["ROWS"]),)](grad, x, weight, scale, out, count, width, **cut)
    return out


def _flat(x: Tensor) -> Tensor:
    """(rows, width), a view where rows stand evenly apart, as halves of one tensor do."""
    return x.reshape(-1, x.shape[-1])


def swiglu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """See fused."""
    out = gate.new_empty(gate.shape)
    one, other = _flat(gate), _flat(up)
    rows, width = one.shape
    if out.numel():
        grid = (rows, triton.cdiv(width, PIECE))
        swiglu_kernel[grid](one, other, out, width, one.stride(0), other.stride(0), act != "silu", PIECE)
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """See fused."""
    outs = gate.new_empty(gate.shape), up.new_empty(up.shape)
    one, other = _flat(gate), _flat(up)
    rows, width = one.shape
    if grad.numel():
        grid = (rows, triton.cdiv(width, PIECE))
        strides = one.stride(0), other.stride(0)
        swiglu_backward_kernel[grid](grad, one, other, *outs, width, *strides, act != "silu", PIECE)
    return outs


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """See fused."""
    batch, heads, tokens, width = q.shape
    q_out, k_out = (x.new_empty(batch, tokens, x.shape[1], width) for x in (q, k))
    if tokens * batch:
        half, groups = width // 2, k.shape[1]
        cut: dict[str, Any] = {
            "BACK": back,
            "Q": triton.next_power_of_2(heads),
            "K": triton.next_power_of_2(groups),
            "HALF": triton.next_power_of_2(half),
        }
        angles = cos.stride(0) if cos.shape[0] > 1 else 0
        sizes = tokens, angles, heads, groups, half
        rope_kernel[(batch * tokens,)](q, k, cos, sin, q_out, k_out, *sizes, *q.stride()[:3], *k.stride()[:3], **cut)
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """See fused."""
    rows, width = logits.shape
    losses, total = (logits.new_empty(rows, dtype=torch.float32) for _ in "lt")
    if rows:
        loss_kernel[(rows,)](logits, labels, losses, total, width, 4 * PIECE, num_warps=8)
    return losses, total


def cross_entropy_backward(logits: Tensor, labels: Tensor, total: Tensor, each: Tensor) -> None:
    """See fused."""
    rows, width = logits.shape
    if rows:
        grid = (rows, triton.cdiv(width, 2 * PIECE))
        loss_backward_kernel[grid](logits, labels, total, each, width, each.stride(0), BLOCK=2 * PIECE)
