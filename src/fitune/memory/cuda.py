"""What torch does otherwise on a CUDA GPU than on a CPU, for a trace whose shadows say that they lie on a CPU.

In: calls of torch's functions while a `Cuda` is entered. Out: the operations that a GPU would run: fused attention as
torch chooses it there, and autocast's list of functions that compute in float32. Nothing here computes values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fitune.memory.operation import Args, Kwargs, Operation
from fitune.memory.sparse import OnPaper
from fitune.models.kernels.flash import HALF, WIDEST
from fitune.models.kernels.target import AMPERE, Target, of, planned

aten = torch.ops.aten

# https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32"
FLOAT32 = frozenset(
    getattr(place, name)
    for place in (torch, F, Tensor)
    for name in (
        "__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cosh",
        "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "log",
        "log10", "log_softmax", "log1p", "log2", "nll_loss", "norm", "normalize", "pow", "prod", "reciprocal", "rsqrt",
        "sinh", "softmax", "softmin", "softplus", "sum", "renorm", "tan",
    )
    if hasattr(place, name)
)  # fmt: skip


class Cuda(OnPaper):
    """See the module's text.

    Args:
        target: the GPU.
    """

    def __init__(self, target: Target = AMPERE) -> None:
        super().__init__()
        self.target = target
        self._entered: list[AbstractContextManager[None]] = []  # it enters itself once more in a backward pass

    def __enter__(self) -> Any:
        self._entered.append(planned(self.target))
        self._entered[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._entered.pop().__exit__(*raised)

    def __torch_function__(self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(Attention(*args, **kwargs))
        if func in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_wide(one) for one in args]
            kwargs = {name: _wide(one) for name, one in kwargs.items()}
        return super().__torch_function__(func, types, args, kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


@dataclass(frozen=True)
class Attention:
    """The arguments of torch's scaled_dot_product_attention, in its order and by its names.

    query (B, H, L, E), key (B, K, S, E), value (B, K, S, E).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attention(given: Attention) -> Tensor:
    """(B, H, L, E): attention as torch runs it on a GPU: flash in 16 bits without a mask (capability 8.0), else
    memory-efficient, which takes no grouped heads, and a mask of numbers whose rows are whole multiples of 16
    (sdp_utils.cpp, attention.cpp)."""
    tensors = [given.query, given.key, given.value]
    if torch.is_autocast_enabled("cpu"):
        tensors = [one.to(torch.get_autocast_dtype("cpu")) for one in tensors]
    query = tensors[0]
    narrow = query.dtype in HALF and query.shape[-1] <= WIDEST
    if given.attn_mask is None and narrow and of(query.device).capability >= (8, 0):
        return _flash(tensors, given)
    return _efficient(tensors, given)


def _flash(tensors: Sequence[Tensor], given: Attention) -> Tensor:
    width = tensors[0].shape[-1]
    rest = -width % 8
    query, key, value = (F.pad(one, (0, rest)) for one in tensors) if rest else tensors
    out: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, given.dropout_p, given.is_causal, False, scale=given.scale or width**-0.5
    )[0]
    return out[..., :width] if rest else out


def _efficient(tensors: Sequence[Tensor], given: Attention) -> Tensor:
    query, key, value = tensors
    if given.enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    bias = None if given.attn_mask is None else _bias(given.attn_mask, query, key)
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    found: Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, learns, given.dropout_p, given.is_causal, scale=given.scale
    )[0]
    return found


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the memory-efficient kernel wants it."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.full_like(zero, -torch.inf))
    keys = mask.shape[-1]
    if rest := -keys % 16:
        mask = F.pad(mask, (0, rest))[..., :keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
