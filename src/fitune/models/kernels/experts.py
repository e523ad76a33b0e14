"""Experts whose matrices are kept in few bits: each is made plain for its rows alone, and dropped.

In: the module in which transformers keeps all experts of a block, its fused parameters (experts, ., .) packed. Out: the
same module with another `forward`: rows sorted by expert, a product for each expert that has some, and the gate, biases
and weights of the module's own class. Nothing but the packed matrices stays in memory, no rows either: what an expert
gives back to its rows needs its matrix alone, which is made plain once more. All rows of a product lie in one tensor,
so how many an expert got changes no allocation.

Shapes: x (N, in), sorted by expert; a matrix (out, in); S = tokens x experts for each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fitune.models.kernels.frozen import Frozen
from fitune.models.kernels.read_as_tensor import ReadAsTensor


class Stack(ReadAsTensor, nn.Module):
    """(experts, out, in) matrices in few bits. To code that is not behind transformers' interface it is the parameter.

    weight: packed, the experts along its first dimension; scales are buffers. transposed: the plain parameter was
    (experts, in, out). compute: dtype of the products.
    """

    compute = torch.float32

    def __init__(self, count: int, outputs: int, inputs: int, *, transposed: bool) -> None:
        nn.Module.__init__(self)
        self.count, self.outputs, self.inputs, self.transposed = count, outputs, inputs, transposed

    def hold(self, packed: Tensor, **scales: Tensor) -> None:
        """Take the packed matrices and what lies beside them."""
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name, tensor in scales.items():
            self.register_buffer(name, tensor)

    def adopt(self, compute: torch.dtype) -> None:
        """Compute in this dtype from now on."""
        self.compute = compute
        self.weight.stands_for = self.count * self.outputs * self.inputs  # type: ignore[attr-defined]  # see quant.numel

    def fill(self, number: int, matrix: Tensor) -> None:
        """Pack an expert's matrix, (out, in), into its place."""
        raise NotImplementedError

    def matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        """(out, in): an expert's matrix, made plain."""
        raise NotImplementedError

    def checked(self) -> list[Frozen]:
        """Matrices whose kernels are to be tried before they are used: of each kind one."""
        return []

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The parameter that it stands for."""
        shape = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        made = torch.empty(self.count, *shape, dtype=dtype, device=self.weight.device)
        for number in range(self.count):
            matrix = self.matrix(number, dtype)
            made[number] = matrix.T if self.transposed else matrix
        return made

    def product(self, x: Tensor, ends: Sequence[int], *, turned: bool = False) -> Tensor:
        """Each expert's rows by its matrix: (N, in) to (N, out). ends: where the rows of each end; behind the last the
        products are zero. turned: by the matrix the other way round, (N, out) to (N, in)."""
        return cast(Tensor, _Product.apply(x.to(self.compute), self, ends, turned))

    # ---- as a model's own code reads it ----

    @property
    def shape(self) -> torch.Size:
        """See ReadAsTensor."""
        sides = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        return torch.Size((self.count, *sides))

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.compute

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.weight.device

    @property
    def requires_grad(self) -> bool:
        """Packed weights are never trained."""
        return False

    def __getitem__(self, number: Any) -> ReadAsTensor | Tensor:
        if isinstance(number, (Tensor, np.integer)) and number.ndim == 0:
            number = int(number)
        if type(number) is not int:
            return self.as_plain(None)[number]
        return _Expert(self, range(self.count)[number])

    def turned(self) -> ReadAsTensor:
        """See ReadAsTensor."""
        return _Turned(self)

    def as_plain(self, dtype: torch.dtype | None) -> Tensor:
        """See ReadAsTensor."""
        return self.plain(dtype or self.compute)

    def times(self, x: Tensor) -> Tensor | None:
        """See ReadAsTensor."""
        return _all_times(self, x, turned=not self.transposed)


def _shares(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(number, first row, row behind the last) of each expert that has rows."""
    first = 0
    for number, last in enumerate(ends):
        if last > first:
            yield number, first, last
        first = last


class _Product(torch.autograd.Function):
    """Rows by the matrices of their experts; the gradient of a row needs its expert's matrix alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Stack, ends: Sequence[int], turned: bool) -> Tensor:
        ctx.stack, ctx.ends, ctx.turned = stack, ends, turned
        return _rows_by(x, stack, ends, turned=turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _rows_by(grads[0].contiguous(), ctx.stack, ctx.ends, turned=not ctx.turned), None, None, None


def _rows_by(x: Tensor, stack: Stack, ends: Sequence[int], *, turned: bool) -> Tensor:
    made = x.new_empty(len(x), stack.inputs if turned else stack.outputs)
    for number, first, last in _shares(ends):
        matrix = stack.matrix(number, x.dtype)
        torch.mm(x[first:last], matrix if turned else matrix.T, out=made[first:last])
    return _rest_is_zero(made, ends)


def _rest_is_zero(made: Tensor, ends: Sequence[int]) -> Tensor:
    if ends[-1] < len(made):
        made[ends[-1] :].zero_()
    return made


class _Expert(ReadAsTensor):
    """One expert's part of a parameter. turned: with its dimensions exchanged."""

    def __init__(self, stack: Stack, number: int, *, turned: bool = False) -> None:
        self.stack, self.number, self.flipped = stack, number, turned

    @property
    def shape(self) -> torch.Size:
        """See ReadAsTensor."""
        one, other = self.stack.shape[1:]
        return torch.Size((other, one) if self.flipped else (one, other))

    @property
    def T(self) -> ReadAsTensor:  # noqa: N802  # torch's name
        """See Tensor."""
        return self.turned()

    def t(self) -> ReadAsTensor:
        """See Tensor."""
        return self.turned()

    def turned(self) -> ReadAsTensor:
        """See ReadAsTensor."""
        return _Expert(self.stack, self.number, turned=not self.flipped)

    def as_plain(self, dtype: torch.dtype | None) -> Tensor:
        """See ReadAsTensor."""
        matrix = self.stack.matrix(self.number, dtype or self.stack.compute)
        return matrix.T if self.stack.transposed != self.flipped else matrix

    def times(self, x: Tensor) -> Tensor | None:
        """See ReadAsTensor."""
        if x.shape[-1] != self.shape[0]:
            return None
        rows = x.reshape(-1, x.shape[-1])
        ends = [0] * self.number + [len(rows)] * (self.stack.count - self.number)
        made = self.stack.product(rows, ends, turned=self.stack.transposed == self.flipped)
        return made.view(*x.shape[:-1], self.shape[1])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.as_plain(None), name)


class _Turned(ReadAsTensor):
    """All experts, each with its dimensions exchanged."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    @property
    def shape(self) -> torch.Size:
        """See ReadAsTensor."""
        count, one, other = self.stack.shape
        return torch.Size((count, other, one))

    def turned(self) -> ReadAsTensor:
        """See ReadAsTensor."""
        return self.stack

    def as_plain(self, dtype: torch.dtype | None) -> Tensor:
        """See ReadAsTensor."""
        return self.stack.as_plain(dtype).transpose(1, 2)

    def times(self, x: Tensor) -> Tensor | None:
        """See ReadAsTensor."""
        return _all_times(self.stack, x, turned=self.stack.transposed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.as_plain(None), name)


def _all_times(stack: Stack, x: Tensor, *, turned: bool) -> Tensor | None:
    """(experts, T, .) to (experts, T, .): as many rows for each expert, by its matrix."""
    inputs, outputs = (stack.outputs, stack.inputs) if turned else (stack.inputs, stack.outputs)
    if x.ndim != 3 or x.shape[0] != stack.count or x.shape[2] != inputs:
        return None
    ends = [x.shape[1] * (number + 1) for number in range(stack.count)]
    return stack.product(x.reshape(-1, inputs), ends, turned=turned).view(stack.count, x.shape[1], outputs)


def ends_of(sorted_experts: Tensor, count: int) -> list[int]:
    """Where the rows of each expert end, from the sorted numbers of the rows' experts, (S,). A plan knows no numbers,
    and memory and products are the same whosever the rows are: there the first expert has them all."""
    if hasattr(sorted_experts, "meta"):
        return [len(sorted_experts)] * count
    found: list[int] = torch.searchsorted(
        sorted_experts, torch.arange(1, count + 1, device=sorted_experts.device, dtype=sorted_experts.dtype)
    ).tolist()
    return found


class Packed(nn.Module):
    """What the experts of every class get: see the module's text. Their own attributes are those that transformers'
    interface for experts (integrations/moe.py) gives them."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, hidden) to (T, hidden): the weighted sum of what each token's experts make of it.

        Args:
            hidden_states: (T, hidden).
            top_k_index: (T, k) numbers of experts; from `num_experts` on there is none, and nothing is added.
            top_k_weights: (T, k).
        """
        own: Any = self
        top = top_k_index.shape[-1]
        up: Stack = own.gate_up_proj if own.has_gate else own.up_proj
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        ends = ends_of(experts, up.count)
        inner = up.product(hidden_states[order // top], ends)
        if own.has_bias:
            inner = inner + _of_rows(own.gate_up_proj_bias if own.has_gate else own.up_proj_bias, experts)
        inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
        out = own.down_proj.product(inner, ends)
        if own.has_bias:
            out = out + _of_rows(own.down_proj_bias, experts)
        if getattr(own, "has_post_expert_norm", False):  # older versions of transformers have none
            out = own.post_expert_norm(out)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        weighted = out[back].view(len(hidden_states), top, -1) * top_k_weights[..., None]
        summed: Tensor = weighted.sum(dim=1).to(hidden_states.dtype)
        return summed


def _of_rows(bias: Tensor, experts: Tensor) -> Tensor:
    return bias[experts.clamp(max=len(bias) - 1)]


def behind_interface(module: nn.Module) -> bool:
    """Does a module hold experts as transformers' interface for them has it?"""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


HOLDS = re.compile(r"experts?|moe", re.IGNORECASE)  # names of classes that hold experts


def fused(module: nn.Module) -> tuple[str, ...]:
    """Names of the fused parameters of a module that holds experts, plain or packed; of others none. Behind
    transformers' interface they are known; else they are what a class of experts has in three dimensions."""
    if behind_interface(module):
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not HOLDS.search(type(module).__name__):
        return ()
    own = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3]
    return (*own, *(name for name, child in module.named_children() if isinstance(child, Stack)))


_MADE: dict[type, type] = {}


def pack(module: nn.Module) -> None:
    """Give experts behind transformers' interface, whose parameters are stacks, the forward pass that knows them."""
    kind = type(module)
    if behind_interface(module) and not issubclass(kind, Packed):
        if kind not in _MADE:
            _MADE[kind] = type(f"Packed{kind.__name__}", (Packed, kind), {"__module__": kind.__module__})
        module.__class__ = _MADE[kind]


def unpack(module: nn.Module, dtype: torch.dtype) -> None:
    """Make packed experts plain ones, of their own class."""
    for name in fused(module):
        if isinstance(stack := getattr(module, name), Stack):
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(stack.plain(dtype), requires_grad=False))
    if isinstance(module, Packed):
        module.__class__ = type(module).__mro__[2]
