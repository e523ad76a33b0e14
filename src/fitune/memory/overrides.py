"""What the shapes of tensors do not tell: numbers that decide, kernels that meta does not have, memory inside kernels.

Each entry says where it comes from. `tests/test_trace.py` runs the operations of INSIDE for real, under torch's
profiler, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

# Numbers read from tensors that hold none: what a healthy run reads. A norm, a loss: 1. A check: passed.
SUPPOSED: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: lambda tensor: _one(tensor.dtype),
    aten.equal.default: lambda one, other: True,
    aten.is_nonzero.default: lambda tensor: True,
}


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _layer_norm(target: str, x: Tensor, shape: Sequence[int], weight: Tensor | None, *rest: Any) -> Any:
    """On a CPU mean and deviation have the dtype of the weight, on meta (as on CUDA) they are float32
    (aten/src/ATen/native/layer_norm.cpp, param_scalar_type; measured by the test)."""
    out, mean, deviation = aten.native_layer_norm.default(x, shape, weight, *rest)
    if target == "cpu" and weight is not None:
        mean, deviation = mean.to(weight.dtype), deviation.to(weight.dtype)
    return out, mean, deviation


# Operations that meta does in another way: (target, args, kwargs) -> outputs.
STANDS_IN: dict[Any, Callable[..., Any]] = {aten.native_layer_norm.default: _layer_norm}

# Bytes that a kernel takes beside its outputs while it runs: (target, args, kwargs, outputs) -> sizes.
INSIDE: dict[str, Callable[[str, Sequence[Any], Mapping[str, Any], Any], Sequence[int]]] = {}
