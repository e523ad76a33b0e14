"""Experts in few bits where a model's own code reads their parameter: `F.linear(x, self.weight[i])`, `torch.bmm`.

In: a Stack (experts.py) in the place of a parameter. Out: what that code may do with it. A product by one expert's
matrix, or by all of them side by side, is the stack's own: the matrix is made plain for its rows, and again in the
backward pass. For any other operation of torch the parameter is made plain: right, but not small.

torch calls `__torch_function__` of whatever stands where it expects a tensor (torch.overrides); nothing is patched.
Shapes: the parameter is (experts, a, b), one expert's part of it (a, b).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR = {F.linear}
PRODUCT = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
# what a parameter may be asked for, beside being indexed and being given to a function of torch
ATTRIBUTES = {"shape", "size", "ndim", "dim", "dtype", "device", "transpose", "mT", "requires_grad"}


class ReadAsTensor:
    """What a stack, and a view of it, is to code that reads a parameter."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the tensor that it stands for."""

    @abstractmethod
    def turned(self) -> ReadAsTensor:
        """With its last two dimensions exchanged."""

    @abstractmethod
    def as_plain(self, dtype: torch.dtype | None) -> Tensor:
        """The tensor that it stands for; None: in the dtype that it computes in."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor | None:
        """x @ self; None: the shapes do not go together in a way that needs no plain tensor."""

    def __getitem__(self, which: Any) -> ReadAsTensor | Tensor:
        return self.as_plain(None)[which]

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """See Tensor."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """See Tensor."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def mT(self) -> ReadAsTensor:  # noqa: N802  # torch's name
        """See Tensor."""
        return self.turned()

    def transpose(self, one: int, other: int) -> ReadAsTensor | Tensor:
        """See Tensor."""
        last = {self.ndim - 1, self.ndim - 2}
        if {one % self.ndim, other % self.ndim} == last:
            return self.turned()
        return self.as_plain(None).transpose(one, other)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See torch.overrides."""
        how = dict(kwargs or {})
        if func in LINEAR | PRODUCT and len(args) >= 2 and isinstance(args[0], Tensor) and not set(how) - {"bias"}:
            right = args[1]
            made = (right.turned() if func in LINEAR else right).times(args[0])
            bias = how.get("bias", args[2] if len(args) > 2 else None)
            if made is not None:
                return made if bias is None else made + bias
        dtype = next((one.dtype for one in args if isinstance(one, Tensor) and one.is_floating_point()), None)
        return func(*_plain(list(args), dtype), **{name: _plain(value, dtype) for name, value in how.items()})


def _plain(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, ReadAsTensor):
        return value.as_plain(dtype)
    return [_plain(one, dtype) for one in value] if isinstance(value, (list, tuple)) else value
