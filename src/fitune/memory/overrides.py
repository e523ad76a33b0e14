"""What the shapes of tensors do not decide: values, kernels that meta does not have, memory inside kernels.

Each entry says where it comes from. `tests/memory/test_trace.py` runs the operations of INSIDE for real, under torch's
profiler, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fitune.memory.operation import Args, Kwargs, Operation
from fitune.models.kernels.target import Target

aten = torch.ops.aten

# Numbers read from tensors that hold none: what a healthy run reads. A norm, a loss: 1. A check: passed.
SUPPOSED: dict[Operation, Operation] = {
    aten._local_scalar_dense.default: lambda tensor: _one(tensor.dtype),
    aten.equal.default: lambda one, other: True,
    aten.is_nonzero.default: lambda tensor: True,
}


# How many elements of a mask are true, where its history shows it without a value: none is infinite or not a number,
# and a mask that was zeros has as many as were scattered into it. A shape that such a mask decides follows from it. A
# number that was drawn is not below the probability of dropping a layer (Fan et al. 2020, arXiv:1909.11556): all run.
# A part of a mask along one of its dimensions has an even share of them; their sum is known as a number.
TRUE = "fitune_true"
SUM = "fitune_sum"
DRAWN = "fitune_drawn"
KEEP_TRUE = {
    f"aten::{name}"
    for name in ("_to_copy", "alias", "any", "bitwise_or", "clone", "detach", "eq", "expand", "logical_or", "reshape",
                 "permute", "select", "slice", "squeeze", "unsqueeze", "view")
}  # fmt: skip


def true_of(tensor: Any) -> int | None:
    """How many elements are true, if that is known."""
    found = getattr(tensor, TRUE, None)
    return None if found is None else int(found)


# What note_true looks at.
NOTED = KEEP_TRUE | {f"aten::{name}" for name in ("isinf", "isnan", "lt", "ne", "rand", "scatter", "scatter_", "sum")}


def note_true(name: str, args: Args, out: Any) -> None:
    """Remember it for what an operation of NOTED gave on meta."""
    if not args or not isinstance(out, Tensor):
        return
    first = args[0]
    second = args[1] if len(args) > 1 else None
    found = true_of(first) if name in KEEP_TRUE else None
    if name == "aten::select" and found is not None:
        found = -(-found // max(1, first.shape[args[1]]))
    if name == "aten::sum" and true_of(first) is not None:
        setattr(out, SUM, true_of(first))
    infinite = name == "aten::eq" and isinstance(second, float) and abs(second) == float("inf")
    if infinite or name in ("aten::isinf", "aten::isnan") or (name == "aten::ne" and second is first):
        found = 0
    elif name in ("aten::scatter", "aten::scatter_"):
        found = args[2].numel()
    elif name == "aten::eq" and _with_each(first, second):
        found = first.numel()
    elif name == "aten::lt" and hasattr(first, DRAWN):
        found = 0
    elif name == "aten::rand" and out.numel() == 1:
        setattr(out, DRAWN, True)
    if found is not None:
        setattr(out, TRUE, found)


def _with_each(first: Any, second: Any) -> bool:
    """Are whole numbers, (..., 1), compared with each of several, (n,), as `one_hot` does it? Each is one."""
    if not isinstance(second, Tensor) or second.ndim != 1 or second.is_floating_point():
        return False
    return bool(first.ndim > 1 and first.shape[-1] == 1)


# While a model is built on meta: operations that meta does not have, since their outputs depend on values.
BUILDING: dict[Operation, Operation] = {
    aten.bincount.default: lambda x, weights=None, minlength=0: x.new_ones(max(1, minlength)),
    aten._to_copy.default: lambda x, **how: aten._to_copy.default(x, **{**how, **_stays(x)}),
    aten.nonzero.default: lambda x: x.new_empty((0, x.ndim), dtype=torch.long),  # what is looked for is what is wrong
}


def _stays(x: Tensor) -> Kwargs:
    """A tensor on meta has nothing that could be copied elsewhere."""
    return {"device": x.device} if x.device.type == "meta" else {}


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _layer_norm(target: Target, x: Tensor, shape: Sequence[int], weight: Tensor | None, *rest: Any) -> Any:
    """On a CPU mean and deviation have the dtype of the weight, on meta (as on CUDA) they are float32
    (aten/src/ATen/native/layer_norm.cpp, param_scalar_type; measured by the test)."""
    out, mean, deviation = aten.native_layer_norm.default(x, shape, weight, *rest)
    if target.kind == "cpu" and weight is not None:
        mean, deviation = mean.to(weight.dtype), deviation.to(weight.dtype)
    return out, mean, deviation


def _lstm(target: Target, x: Tensor, *rest: Any) -> Any:
    """oneDNN keeps gates and states for the backward pass in a workspace, which meta leaves empty: about 60 bytes for
    each token and unit, in pages (measured by the test)."""
    out, hidden, cell, _ = aten.mkldnn_rnn_layer.default(x, *rest)
    size = (60 * out.numel() + 14336 + 4095) // 4096 * 4096
    return out, hidden, cell, out.new_empty(size, dtype=torch.uint8)


def _svd(target: Target, x: Tensor, *rest: Any, **how: Any) -> Any:
    """On a CPU LAPACK leaves both factors column by column, on meta (as cuSOLVER) the second row by row, so that its
    first rows are a view there (aten/src/ATen/native/BatchLinearAlgebra.cpp, _linalg_svd)."""
    u, s, vh = aten._linalg_svd.default(x, *rest, **how)
    return (u, s, vh.mT.contiguous().mT) if target.kind == "cpu" else (u, s, vh)


def _grouped(
    target: Target, first: Tensor, second: Tensor, offsets: Tensor | None = None, *more: Any, **how: Any
) -> Tensor:
    """Products of the rows of each expert with its matrix. On meta torch takes bf16 alone, its kernels float32 too."""
    if first.ndim == 2 and second.ndim == 2:
        assert offsets is not None  # rows of both are those of the experts, one after the other
        shape = [len(offsets), first.shape[0], second.shape[1]]
    else:
        groups = [first.shape[0]] if first.ndim == second.ndim else []
        shape = [*groups, first.shape[-2], second.shape[-1]]
    return first.new_empty(shape, dtype=how.get("out_dtype") or first.dtype)


# Operations that meta does in another way: (target, args, kwargs) -> outputs.
STANDS_IN: dict[Operation, Operation] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.mkldnn_rnn_layer.default: _lstm,
    aten._linalg_svd.default: _svd,
    aten._grouped_mm.default: _grouped,
}


def _update(plain: int) -> Callable[[Target, Args, Kwargs, object], Sequence[int]]:
    """On a CPU bitsandbytes' optimizers are torch operations on so many float32 copies: the gradient, halves of the
    update, states of 8 bits (bitsandbytes/backends/cpu/ops.py, _optimizer_update_*_cpu); on CUDA one kernel does it."""

    def inside(target: Target, args: Args, kwargs: Kwargs, out: Any) -> Sequence[int]:
        gradient: Tensor = args[1]
        low = 0 if gradient.dtype == torch.float32 else 1  # the weight is copied too
        return [] if target.kind != "cpu" else [4 * gradient.numel()] * (plain + low)

    return inside


def _flash_backward(target: Target, args: Args, kwargs: Kwargs, outputs: Any) -> list[int]:
    """FlashAttention 2's backward pass: its gradients; a float32 sum for those of the queries and for each query's
    row, the former once for every group of multiprocessors that adds to it, since it is deterministic; and those of
    keys and values with as many heads as queries. Documents of a flat batch stand 128 rows apart
    (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd and mha_varlen_bwd).

    Args:
        args: grad_out, query, key, value, out, logsumexp, bounds of queries, ...: (T, H, E), or (B, H, L, E) where
            bounds is None.
    """
    query, key, bounds = args[1], args[2], args[6]
    if bounds is None:
        documents, heads, length, width = query.shape
        rows, groups = documents * _multiple(length, 128), key.shape[1]
    else:
        documents, (tokens, heads, width) = bounds.numel() - 1, query.shape
        rows, groups = tokens + 128 * documents, key.shape[1]
    times = -(-target.multiprocessors // (documents * heads)) or 1
    sums = 4 * rows * heads * _multiple(width, 32 if width <= 128 else 64) * times
    given = [one.numel() * one.element_size() for one in outputs if isinstance(one, Tensor)]
    wide = [] if groups == heads else [key.numel() // groups * heads * key.element_size()] * 2
    return [*given, 4 * rows * heads, sums, *wide]


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


# Bytes that a kernel takes while it runs, its outputs among them where they are there at the same time:
# (target, args, kwargs, outputs) -> sizes.
INSIDE: dict[str, Callable[[Target, Args, Kwargs, object], Sequence[int]]] = {
    "aten::_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "bitsandbytes::optimizer_update_8bit_blockwise": _update(5),
    "bitsandbytes::optimizer_update_32bit": _update(3),
}
