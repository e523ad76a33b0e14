"""Sparse matrices on paper: what torch takes for one, made of dense tensors, which are all that a shadow can stand for.

In: `torch.sparse_coo_tensor` of shadows. Out: an object with the operations that methods ask of it: added to a matrix,
made dense, multiplied; each takes what torch's kernel takes (aten/src/ATen/native/sparse/SparseTensorMath.cpp and
cuda/SparseCUDATensorMath.cu: indices as int64, one flat index for each value; the gradient of the values is picked out
of the dense one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from fitune.memory.operation import Args, Kwargs, Operation
from fitune.memory.shadow import Shadow

ADDS = {"__add__", "__radd__", "__iadd__", "add", "add_"}


class _Product(torch.autograd.Function):
    """A sparse matrix times a dense one: the kernel needs neither matrix dense; the gradient of the values does."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: Tensor, dense: Tensor, rows: int) -> Tensor:
        """(M, K)"""
        ctx.save_for_backward(values, flat, dense)
        return dense.new_empty(rows, dense.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Of the values, and of the dense matrix."""
        values, flat, dense = ctx.saved_tensors
        return (grads[0] @ dense.mT).reshape(-1)[flat].to(values.dtype), None, torch.empty_like(dense), None


class Sparse:
    """See the module's text.

    Args:
        indices: (2, N).
        values: (N,).
        size: of the matrix.
    """

    def __init__(self, indices: Tensor, values: Tensor, size: Sequence[int]) -> None:
        self.indices, self.values, self.shape = indices.long(), values, torch.Size(size)

    @classmethod
    def __torch_function__(cls, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ADDS and isinstance(args[0], Tensor):
            return args[1].added_to(args[0], in_place=name in ("__iadd__", "add_"))
        if name in ("mm", "matmul", "__matmul__") and isinstance(args[0], Sparse):
            return args[0].times(args[1])
        raise NotImplementedError(f"{name} of a sparse matrix")

    def flat(self) -> Tensor:
        """One index for each value."""
        return self.indices[0] * self.shape[1] + self.indices[1]

    def added_to(self, dense: Tensor, *, in_place: bool) -> Tensor:
        """A dense matrix with this one added."""
        values = self.values.to(dense.dtype)
        if in_place:
            dense.view(-1).index_add_(0, self.flat(), values)
            return dense
        return dense.view(-1).index_add(0, self.flat(), values).view(dense.shape)

    def coalesce(self) -> Sparse:
        """Sorted, each index once."""
        order = self.flat().argsort()
        return Sparse(self.indices[:, order], self.values[order], self.shape)

    def to_dense(self) -> Tensor:
        """All of it."""
        return self.added_to(self.values.new_zeros(self.shape), in_place=False)

    def times(self, dense: Tensor) -> Tensor:
        """The product with a dense matrix: (M, N) x (N, K)."""
        found: Tensor = _Product.apply(self.values, self.flat(), dense, self.shape[0])
        return found

    def _nnz(self) -> int:
        return self.values.numel()


def sparse(indices: Tensor, values: Tensor, size: Sequence[int], **how: Any) -> Any:
    """Torch's, or of shadows a `Sparse`."""
    if any(isinstance(one, Shadow) for one in (indices, values)):
        return Sparse(indices, values, size)
    return torch.sparse_coo_tensor(indices, values, torch.Size(size), **how)


class OnPaper(TorchFunctionMode):
    """Inside, sparse matrices of shadows are such objects, in a backward pass as well."""

    def __torch_function__(self, func: Operation, types: object, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.sparse_coo_tensor:
            return sparse(*args, **kwargs)
        if func is torch.sparse.mm and isinstance(args[0], Sparse):
            return args[0].times(args[1])
        if func is Tensor.backward:  # blocks that are recomputed call functions inside of it, which are to come here
            with self:
                return _engine_run_backward(
                    (args[0],),
                    (torch.ones_like(args[0]),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        return func(*args, **kwargs)
