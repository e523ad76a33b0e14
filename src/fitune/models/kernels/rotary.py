"""Rotary positions in one kernel, for attention modules whose class calls Llama's function for them.

In: a transformers model. Out: its attention modules, each of a class that differs from its own in one thing: where its
forward says `apply_rotary_pos_emb`, it finds the function here. That one takes the kernel of `kernels/fused.py` on a
GPU, and elsewhere calls the module's own. Which classes those are follows from the code: the function and its
`rotate_half` must be, instruction for instruction, those of Llama. No module of transformers is changed.

Shapes: q (B, H, T, E), k (B, K, T, E), cos, sin (B or 1, T, E).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fitune.models.kernels import fused

APPLY, HALF = "apply_rotary_pos_emb", "rotate_half"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def _rotary(plain: Rotary) -> Rotary:
    """The function that stands for `plain`, with its arguments."""

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        whole = q.ndim == 4 and unsqueeze_dim == 1 and cos.ndim == 3 and cos.shape[-1] == q.shape[-1]
        if whole and q.shape[-1] % 2 == 0 and q.dtype == k.dtype and fused.used(q):
            return fused.rope(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return rotary


def _same(one: object, other: object) -> bool:
    """Are two functions the same, instruction for instruction?"""
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    a, b = one.__code__, other.__code__
    return (a.co_code, a.co_names, a.co_consts[1:]) == (b.co_code, b.co_names, b.co_consts[1:])  # texts differ


def _turning(kind: type) -> type | None:
    """The class that stands for an attention class; None: it has other rotary positions, or none."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, FunctionType) or APPLY not in forward.__code__.co_names:
        return None
    around = forward.__globals__
    if not all(_same(around.get(name), getattr(modeling_llama, name)) for name in (APPLY, HALF)):
        return None
    own = {**around, APPLY: _rotary(around[APPLY])}
    made = FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__, made.__doc__ = forward.__kwdefaults__, forward.__doc__
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": made})


_TURNING: dict[type, type | None] = {}


def turn_in_one(model: nn.Module) -> int:
    """Give the attention modules of a model such a class, one instance at a time; how many there were."""
    made = 0
    for module in model.modules():
        kind = type(module)
        if kind not in _TURNING:
            turning = _turning(kind)
            _TURNING[kind] = turning
            if turning is not None:
                _TURNING[turning] = None
        turning = _TURNING[kind]
        if turning is not None:
            module.__class__ = turning
            made += 1
    return made
