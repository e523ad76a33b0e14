"""Linear layers with LoRA on them, in as few operations as it takes.

In: a model with PEFT's LoRA (Hu et al. 2021, arXiv:2106.09685) on it. Out: the same layers, whose forward is one
autograd function: y = x W^T, then (s x A^T) B^T is added in place, where PEFT's makes three more tensors of the
output's size; in the backward pass the gradient of x likewise. The input is kept once, in the dtype that is computed
in. Parameters, names and files stay PEFT's. A quantized W is made plain once forward and once backward.

Not for DoRA, dropout, several adapters at once, merged ones, a W that is trained, or on a CPU: there PEFT's forward
runs, and on a CPU its bits are what they were.

Shapes: x (..., in), W (out, in), A (rank, in), B (out, rank), y (..., out), T = tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fitune.models.kernels import dora, fused, loha, target
from fitune.models.kernels.frozen import Frozen

ALIGNED = 64  # elements: where the copy of a weight begins
HALF = (torch.bfloat16, torch.float16)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, layer: Any) -> Tensor:
        rows, base = x.reshape(-1, x.shape[-1]), layer.get_base_layer()
        low_a, low_b = layer.fitune_copies.of(a, x.dtype), layer.fitune_copies.of(b, x.dtype)
        low = _scaled(rows, low_a.t(), scale)
        out: Tensor = base(rows)
        out.addmm_(low, low_b.t())
        ctx.save_for_backward(rows, low, low_a, low_b)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, low, low_a, low_b = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        back = _scaled(grad, low_b, ctx.scale)
        a_grad = _wide(back.t(), rows) if ctx.needs_input_grad[1] else None
        b_grad = _wide(grad.t(), low) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, a_grad, b_grad, None, None
        x_grad = grad.mm(_weight(ctx.base, grad.dtype)).addmm_(back, low_a)
        return x_grad.view(ctx.shape), a_grad, b_grad, None, None


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """scale x the product, rounded once."""
    return one.new_empty(one.shape[0], other.shape[1]).addmm_(one, other, beta=0, alpha=scale)


def _wide(one: Tensor, other: Tensor) -> Tensor:
    """The product in float32, which gradients are kept in: where a kernel gives it so, nothing is rounded before."""
    if target.of(one.device).kind == "cuda" and one.dtype in HALF and (target.is_planned() or _gives_wide(one.dtype)):
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.mm(other).float()


@cache
def _gives_wide(dtype: torch.dtype) -> bool:
    """Does this machine's library give float32 products of 16 bits?"""
    with _disable_current_modes():
        ones = torch.ones(16, 16, dtype=dtype, device="cuda")
        try:
            return bool((torch.mm(ones.t(), ones, out_dtype=torch.float32) == 16).all())
        except (RuntimeError, TypeError):
            return False


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """(out, in), without a gradient."""
    weight: Tensor = base.plain_weight(dtype) if isinstance(base, Frozen) else base.weight.detach()
    return weight


def _alone(layer: LoraLayer) -> str | None:
    """The one adapter that is at work on a layer, if it is plain LoRA."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_bias.get(names[0]):
        return None
    dropout = layer.lora_dropout[names[0]]
    return names[0] if isinstance(dropout, nn.Identity) or not layer.training else None


def _suits(base: Any, x: Tensor, dtype: torch.dtype) -> bool:
    """Is a base frozen, and does it compute in this dtype of 16 bits, on a device that work is to be fused on?"""
    if dtype not in HALF or not fused.wanted(target.of(x.device)):
        return False
    if type(base) is not nn.Linear and not isinstance(base, Frozen):
        return False
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return False
    computed: torch.dtype = base.compute if isinstance(base, Frozen) else base.weight.dtype
    return computed == dtype


def _class(kind: type) -> type:
    """PEFT's class of a layer, with the forward of this module before its own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the module's text."""
        name = None if args or kwargs else _alone(self)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if name is None or not _suits(self.get_base_layer(), x, dtype):
            plain: Tensor = kind.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]  # a layer of PEFT
            return plain
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        out: Tensor = _Adapted.apply(x.to(dtype), a, b, self.scaling[name], self)
        return out

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})


class Copies:
    """A and B of all layers of a model in the dtype that is computed in: made in one go, when a layer first asks for
    its own inside of `whole`, where no weight changes; outside, each is made when it is asked for.

    layers: those that ask here.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self._made: dict[int, Tensor] = {}  # by the id of a parameter
        self._open = 0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See the class."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._made = {}  # what the backward pass needs it holds itself

    def of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight's copy; of one that is in this dtype, itself."""
        if not self._open or weight.dtype == dtype:
            return weight.detach().to(dtype)
        if id(weight) not in self._made:
            self._make(weight, dtype)
        return self._made[id(weight)]

    def _make(self, asked: Tensor, dtype: torch.dtype) -> None:
        weights = {id(asked): asked}
        for layer in self.layers:
            if (name := _alone(layer)) is not None:
                weights |= {id(one): one for one in (layer.lora_A[name].weight, layer.lora_B[name].weight)}
        kind = asked.device, asked.dtype
        weights = {number: one.detach() for number, one in weights.items() if (one.device, one.dtype) == kind}
        alike = list(weights.values())
        starts = [0, *accumulate(-(-one.numel() // ALIGNED) * ALIGNED for one in alike)]
        store = torch.empty(starts[-1], dtype=dtype, device=asked.device)
        copies = [store[start : start + one.numel()].view(one.shape) for start, one in zip(starts, alike, strict=False)]
        torch._foreach_copy_(copies, alike)
        self._made = dict(zip(weights, copies, strict=True))


_CLASSES: dict[type, type] = {}


def fuse(model: nn.Module) -> Copies:
    """Give the LoRA layers of a model this forward, one instance at a time, and those of its relatives theirs; what
    LoRA's layers share."""
    copies = Copies()
    for module in model.modules():
        dora.keep_once(module)
        loha.in_cheap_order(module)
        kind = type(module)
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            if kind not in _CLASSES.values():
                if kind not in _CLASSES:
                    _CLASSES[kind] = _class(kind)
                module.__class__ = _CLASSES[kind]
            module.fitune_copies = copies
            copies.layers.append(module)
    return copies
