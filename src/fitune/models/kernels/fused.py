"""Norm, rotary positions, gated activation and cross-entropy in one kernel each way, on a CUDA GPU.

Of these torch's operations launch 4 to 12 kernels each way, and every one of them reads and writes its tensors once: on
an H100 they take as long as the matrix products beside them. Here each is an operation of its own,
`fitune::rms_norm`, `fitune::rope`, `fitune::swiglu`, `fitune::cross_entropy`, with a reference in torch's operations
(on a CPU; tests compare with it), the sizes of what it gives (for a plan) and a Triton kernel (`kernels/rows.py`). A
kernel works on rows one by one, without atomics or trials of speed, so that the bits of a token do not depend on the
tokens beside it. Sums are in float32 and are rounded once, at the end.

`refusal` says where they are not used; there the code that they stand for runs.

Shapes: x, gate, up (..., W); q (B, H, T, E), k (B, K, T, E), cos, sin (B or 1, T, E); logits (N, V), labels (N,).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fitune.models.kernels import target
from fitune.models.kernels.target import Target

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST = (7, 5)  # compute capability that Triton compiles for
WIDEST = 2**15  # of a row that a program of a GPU holds at once
SILU, GELU = "silu", "gelu_tanh"

_eager = False  # not a context variable: blocks are recomputed on autograd's own threads


@contextmanager
def eager() -> Iterator[None]:
    """Inside, no kernel of this module or of `low_rank.py` is used: for comparisons."""
    global _eager
    before, _eager = _eager, True
    try:
        yield
    finally:
        _eager = before


def wanted(where: Target) -> bool:
    """Is it a device that work is to be fused on, by a kernel of this module or without one?"""
    return where.kind == "cuda" and not _eager


def refusal(where: Target) -> str | None:
    """Why they are not used on a device; None: they are."""
    if not wanted(where):
        return "turned off" if where.kind == "cuda" else "not on a CUDA GPU"
    if where.capability < LEAST:
        return f"compute capability {'.'.join(map(str, where.capability))} is below {'.'.join(map(str, LEAST))}"
    return _lacking() if target.is_planned() else _broken()


def described(where: Target) -> str:
    """Which kernels compute norms, rotary positions, gates and losses, as a text."""
    why = refusal(where)
    return "one for each norm, rotary position, gate and loss (Triton)" if why is None else f"torch's: {why}"


def used(x: Tensor, widest: int = WIDEST) -> bool:
    """Are they used for a tensor?"""
    return x.dtype in DTYPES and x.shape[-1] <= widest and refusal(target.of(x.device)) is None


@cache
def _lacking() -> str | None:
    """What Triton needs and this machine has not. A plan for a GPU elsewhere supposes that it is there."""
    if not torch.cuda.is_available() and sys.platform == "linux":
        return None
    if find_spec("triton") is None:
        return "Triton is not installed"
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return None if any(name and shutil.which(name) for name in names) else "Triton finds no C compiler"


@cache
def _broken() -> str | None:
    """Why they do not work on this machine: what is lacking, or a trial whose values are off."""
    if lacking := _lacking():
        return lacking
    with _disable_current_modes(), torch.no_grad():
        x = torch.linspace(-3, 5, 4 * 96, device="cuda").view(4, 96)
        try:
            found = ops.rms_norm(x, x[0], 1e-6)[0]
        except Exception as error:  # Triton raises many kinds: its compiler's, its driver's, the linker's
            return f"Triton does not work here: {' '.join(str(error).split())[:200]}"
        right = _norm(x, x[0], 1e-6)[0]
        return None if torch.allclose(found, right, rtol=1e-5, atol=1e-5) else "a Triton kernel gives wrong values"


# ---- references: what each operation computes, row by row ----


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * scale[..., None] * weight.float()).to(x.dtype), scale


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    each = scale[..., None]
    normal, wide = x.float() * each, grad.float() * weight.float()
    return (each * (wide - normal * (wide * normal).mean(-1, keepdim=True))).to(x.dtype)


def _act(gate: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """act(gate) and its slope."""
    if act == SILU:
        high = torch.sigmoid(gate)
        return gate * high, high * (1 + gate * (1 - high))
    inner = 2 * 0.7978845608028654 * (gate + 0.044715 * gate**3)
    high = torch.sigmoid(inner)
    slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * gate**2)
    return gate * high, high + gate * high * (1 - high) * slope


def _swiglu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return (_act(gate.float(), act)[0] * up.float()).to(gate.dtype)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    value, slope = _act(gate.float(), act)
    wide = grad.float()
    return (wide * up.float() * slope).to(gate.dtype), (wide * value).to(up.dtype)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return _turned(q, cos, sin, back), _turned(k, cos, sin, back)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    (a, b), (c1, c2), (s1, s2) = (one.float().chunk(2, dim=-1) for one in (x, cos[:, None], sin[:, None]))
    halves = (a * c1 + b * s2, b * c2 - a * s1) if back else (a * c1 - b * s1, b * c2 + a * s2)
    made = _by_token(x)
    made.copy_(torch.cat(halves, dim=-1))
    return made


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    total = wide.logsumexp(-1)
    return total - wide.gather(-1, labels[:, None])[:, 0], total


def _cross_entropy_backward(logits: Tensor, labels: Tensor, total: Tensor, each: Tensor) -> None:
    made = (logits.float() - total[:, None]).exp_()
    made[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(made.mul_(each[:, None]))


# ---- sizes of what each gives ----


def _by_token(x: Tensor) -> Tensor:
    """(B, H, T, E) in which the heads of a token stand side by side, as projections give them and attention wants."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _norm_sizes(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _norm_backward_sizes(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _swiglu_sizes(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _swiglu_backward_sizes(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _rope_sizes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return _by_token(q), _by_token(k)


def _cross_entropy_sizes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(labels), dtype=torch.float32), logits.new_empty(len(labels), dtype=torch.float32)


def _nothing(logits: Tensor, labels: Tensor, total: Tensor, each: Tensor) -> None:
    return None


# ---- the operations ----


def _on_gpu(name: str) -> Any:
    """The Triton kernel of that name; Triton is imported when it is first called."""

    def call(*args: Any) -> Any:
        from fitune.models.kernels import rows

        if args[0].device.index == torch.cuda.current_device():
            return getattr(rows, name)(*args)
        with torch.cuda.device(args[0].device):  # Triton launches on the current one
            return getattr(rows, name)(*args)

    return call


_LIBRARY = torch.library.Library("fitune", "FRAGMENT")
_TABLE = (
    ("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _norm, _norm_sizes),
    ("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor", _norm_backward,
     _norm_backward_sizes),
    ("swiglu(Tensor gate, Tensor up, str act) -> Tensor", _swiglu, _swiglu_sizes),
    ("swiglu_backward(Tensor grad, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)", _swiglu_backward,
     _swiglu_backward_sizes),
    ("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)", _rope, _rope_sizes),
    ("cross_entropy(Tensor logits, Tensor labels) -> (Tensor, Tensor)", _cross_entropy, _cross_entropy_sizes),
    ("cross_entropy_backward(Tensor(a!) logits, Tensor labels, Tensor total, Tensor each) -> ()",
     _cross_entropy_backward, _nothing),
)  # fmt: skip
for _schema, _reference, _sizes in _TABLE:
    _name = _schema.partition("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _reference, "CPU")
    _LIBRARY.impl(_name, _on_gpu(_name), "CUDA")
    torch.library.register_fake(f"fitune::{_name}", _sizes, lib=_LIBRARY)
ops = torch.ops.fitune


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor
        out, scale = ops.rms_norm.default(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, weight_grad = grads[0].contiguous(), None
        if ctx.needs_input_grad[1]:  # a sum over all rows: torch's, whose order is fixed
            weight_grad = (grad.float() * x.float() * scale[..., None]).flatten(0, -2).sum(0).to(weight.dtype)
        return ops.rms_norm_backward.default(grad, x, weight, scale), weight_grad, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        out: Tensor = ops.swiglu.default(gate, up, act)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate_grad, up_grad = ops.swiglu_backward.default(grads[0].contiguous(), gate, up, ctx.act)
        return gate_grad, up_grad, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return ops.rope.default(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        q, k = (_last_dense(grad) for grad in grads)
        return *ops.rope.default(q, k, cos, sin, True), None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, ours: bool) -> Tensor:
        logits = logits.detach()
        losses, total = ops.cross_entropy.default(logits, labels)
        ctx.logits, ctx.given, ctx.ours = logits, (labels, weights, total), ours
        found: Tensor = (losses if weights is None else losses * weights).sum()
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,), (labels, weights, total) = grads, ctx.given
        each = scale.expand(len(labels)) if weights is None else scale * weights
        made: Tensor = ctx.logits if ctx.ours else ctx.logits.clone()
        ctx.logits = None  # they are the gradient now, which is not to outlive it
        ops.cross_entropy_backward.default(made, labels, total, each)
        return made, None, None, None


def _last_dense(x: Tensor) -> Tensor:
    """The same, its last dimension without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) x weight, of every row (Zhang & Sennrich 2019, arXiv:1910.07467), in x's dtype."""
    out: Tensor = _Norm.apply(x.contiguous(), weight, eps)
    return out


def swiglu(gate: Tensor, up: Tensor, act: str = SILU) -> Tensor:
    """act(gate) x up (Shazeer 2020, arXiv:2002.05202); both are kept for the backward pass. Their rows may stand
    further apart than they are wide, as halves of one tensor do."""
    out: Tensor = _SwiGLU.apply(_last_dense(gate), _last_dense(up), act)
    return out


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) in Llama's form: a head's first half is turned against its
    second."""
    turned: tuple[Tensor, Tensor] = _Rope.apply(_last_dense(q), _last_dense(k), cos.contiguous(), sin.contiguous())
    return turned


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, *, ours: bool) -> Tensor:
    """Sum of weight x cross-entropy, a float32 scalar.

    Args:
        weights: (N,) float32; None: 1 for all.
        ours: nobody else looks at the logits: the backward pass writes their gradient over them.
    """
    out: Tensor = _CrossEntropy.apply(logits.contiguous(), labels, weights, ours)
    return out
