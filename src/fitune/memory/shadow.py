"""Shadows: tensors that hold nothing, and what an operation does with them.

In: tensors, or the arguments of an operation. Out: a shadow says that it lies on a CPU and has a shape there; what is
inside it lies on the meta device, where operations run.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from fitune.memory.operation import Args, Kwargs
from fitune.memory.overrides import SUM

REAL = 2**16  # elements up to which integer tensors are computed
META = torch.device("meta")
HERE = torch.device("cpu")


class Shadow(torch.Tensor):
    """A tensor that holds nothing; `meta`, on the meta device, has its shape and storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Shadow:
        made: Shadow = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=HERE,
            requires_grad=requires_grad,
        )
        made.meta = inner
        return made

    def tolist(self) -> Any:
        """A list of its shape, for code that must have one: zeros, but that the first number is the sum of all where
        that is known."""
        made = np.zeros(tuple(self.shape), float if self.dtype.is_floating_point else int)
        if made.size:
            made.flat[0] = getattr(self.meta, SUM, 0)
        return made.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch says so for tensors that take no functions

    def __deepcopy__(self, memo: dict[int, object]) -> Any:
        """Another shadow, of memory of its own."""
        if id(self) not in memo:
            made = self.detach().clone()
            kept = nn.Parameter(made, requires_grad=self.requires_grad) if isinstance(self, nn.Parameter) else made
            memo[id(self)] = kept
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:  # type: ignore[override]  # as torch calls it
        """Work on shadows is the tracer's; outside of it there is none."""
        raise RuntimeError(f"{func}: a shadow outside of its tracer")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch gives it no types
        return f"Shadow({tuple(self.shape)}, {self.dtype})"


class Arguments:
    """The tensors among the arguments of one operation: shadows, and real ones."""

    def __init__(self) -> None:
        self.shadows: dict[int, Shadow] = {}  # by the id of what is inside
        self.reals: dict[int, Tensor] = {}  # by the id of their stand-in

    def unwrap(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            if isinstance(value, Shadow):
                self.shadows[id(value.meta)] = value
                return value.meta
            if value.device == META:  # beside the parameters, as PEFT keeps the numbers of its virtual tokens
                self.shadows[id(value)] = Shadow(value)
                return value
            self.reals[id(value)] = value
            return value
        if kind is list or kind is tuple:
            return kind([self.unwrap(one) for one in value])
        return value

    def to_meta(self, value: Any) -> Any:
        """Of real tensors beside shadows the shapes alone."""
        kind = type(value)
        if kind is list or kind is tuple:
            return kind([self.to_meta(one) for one in value])
        if kind is dict:
            return {name: self.to_meta(one) for name, one in value.items()}
        if isinstance(value, Tensor) and value.device != META:
            made = value.to(META)
            self.reals[id(made)] = value  # so that what is written into a real tensor is that tensor
            return made
        return value

    def wrap(self, out: Any) -> Any:
        kind = type(out)
        if isinstance(out, Tensor):
            known: Tensor | None = self.shadows.get(id(out))
            known = self.reals.get(id(out)) if known is None else known
            return Shadow(out) if known is None else known
        if kind is list or kind is tuple:
            return kind([self.wrap(one) for one in out])
        return out


# What code looks into: masks, positions, bounds, the codes of bitsandbytes. Of these small ones are computed.
LOOKED_INTO = {f"aten::{name}" for name in ("arange", "full", "linspace", "ones", "randperm", "scalar_tensor", "zeros")}


def becomes_shadow(func: OpOverload, args: Args, kwargs: Kwargs) -> bool:
    """Does an operation without tensors make one that is to be a shadow?"""
    schema = func._schema
    if kwargs.get("device") == META or not any(one.name == "device" for one in schema.arguments):
        return False
    dtype = kwargs.get("dtype")
    if schema.name not in LOOKED_INTO and (dtype is None or dtype.is_floating_point):
        return True
    if schema.name in ("aten::arange", "aten::linspace", "aten::randperm"):
        return max((abs(one) for one in args if isinstance(one, (int, float))), default=0) > REAL
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return math.prod(shape) > REAL
