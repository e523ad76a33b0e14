"""Experts whose matrices are kept in few bits: each is made plain for its rows alone, and dropped.

In: the module in which transformers keeps all experts of a block, its fused parameters (experts, ., .) packed. Out: the
same module with another `forward`: rows sorted by expert, a product for each expert that has some, and the gate, biases
and weights of the module's own class. Nothing but the packed matrices stays in memory, no rows either: what an expert
gives back to its rows needs its matrix alone, which is made plain once more. All rows of a product lie in one tensor,
so how many an expert got changes no allocation.

Shapes: x (N, in), sorted by expert; a matrix (out, in); S = tokens x experts for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitune.models.kernels.frozen import Frozen


class Stack(nn.Module):
    """(experts, out, in) matrices in few bits.

    weight: packed, the experts along its first dimension; scales are buffers. transposed: the plain parameter was
    (experts, in, out). compute: dtype of the products.
    """

    compute = torch.float32

    def __init__(self, count: int, outputs: int, inputs: int, *, transposed: bool) -> None:
        super().__init__()
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

    def product(self, x: Tensor, ends: Sequence[int]) -> Tensor:
        """Each expert's rows by its matrix: (N, in) to (N, out). ends: where the rows of each end; behind the last the
        products are zero."""
        return cast(Tensor, _Product.apply(x.to(self.compute), self, ends))


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
    def forward(ctx: Any, x: Tensor, stack: Stack, ends: Sequence[int]) -> Tensor:
        ctx.stack, ctx.ends = stack, ends
        made = x.new_empty(len(x), stack.outputs)
        for number, first, last in _shares(ends):
            torch.mm(x[first:last], stack.matrix(number, x.dtype).T, out=made[first:last])
        return _rest_is_zero(made, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].contiguous()
        made = grad.new_empty(len(grad), ctx.stack.inputs)
        for number, first, last in _shares(ctx.ends):
            torch.mm(grad[first:last], ctx.stack.matrix(number, grad.dtype), out=made[first:last])
        return _rest_is_zero(made, ctx.ends), None, None


def _rest_is_zero(made: Tensor, ends: Sequence[int]) -> Tensor:
    if ends[-1] < len(made):
        made[ends[-1] :].zero_()
    return made


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


def fused(module: nn.Module) -> tuple[str, ...]:
    """Names of the fused parameters of a module that holds experts behind transformers' interface; of others none."""
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return ()
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


_MADE: dict[type, type] = {}


def pack(module: nn.Module) -> None:
    """Give experts whose parameters are stacks the forward pass that knows them."""
    kind = type(module)
    if not issubclass(kind, Packed):
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
