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

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fitune.models.kernels import fused, target
from fitune.models.kernels.frozen import Frozen

HALF = (torch.bfloat16, torch.float16)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, base: nn.Module) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low_a, low_b = a.to(x.dtype), b.to(x.dtype)
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
    if target.of(one.device).kind == "cuda" and one.dtype in HALF:
        return torch.mm(one, other, out_dtype=torch.float32)
    return one.mm(other).float()


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """(out, in), without a gradient."""
    weight: Tensor = base.plain_weight(dtype) if isinstance(base, Frozen) else base.weight.detach()
    return weight


class Fused(LoraLayer):
    """What the layers here have in common; each is of PEFT's class of its kind too."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See the module's text."""
        name = None if args or kwargs else _alone(self)
        if name is None or not _suits(self, x, name):
            plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of PEFT's class, which stands behind this one
            return plain
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        out: Tensor = _Adapted.apply(x.to(dtype), a, b, self.scaling[name], self.get_base_layer())
        return out


def _alone(layer: LoraLayer) -> str | None:
    """The one adapter that is at work on a layer, if it is plain LoRA."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_bias.get(names[0]):
        return None
    dropout = layer.lora_dropout[names[0]]
    return names[0] if isinstance(dropout, nn.Identity) or not layer.training else None


def _suits(layer: LoraLayer, x: Tensor, name: str) -> bool:
    """Is the base frozen, and does everything compute in one dtype of 16 bits?"""
    base: Any = layer.get_base_layer()
    if type(base) is not nn.Linear and not isinstance(base, Frozen):
        return False
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        return False
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if dtype not in HALF or not fused.wanted(target.of(x.device)):
        return False
    return base.compute == dtype if isinstance(base, Frozen) else base.weight.dtype == dtype


_FUSED: dict[type, type] = {}  # PEFT's class, and the same with the forward of this module before its own


def fuse(model: nn.Module) -> int:
    """Give the LoRA layers of a model this forward, one instance at a time; how many there were."""
    made = 0
    for module in model.modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else None
        if isinstance(base, nn.Linear) and not isinstance(module, Fused):
            kind = type(module)
            if kind not in _FUSED:
                _FUSED[kind] = type(kind.__name__, (Fused, kind), {"__module__": kind.__module__})
            module.__class__ = _FUSED[kind]
            made += 1
    return made
