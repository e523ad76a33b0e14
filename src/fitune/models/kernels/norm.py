"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) that keeps its input once, in the dtype it came in.

transformers' modules compute in float32 step by step, and autograd keeps two float32 tensors of the input's size for
each: eight bytes per element beside a bf16 stream of two. Here the input and one number per row are kept, and the rest
is computed again in the backward pass. The values are the same, bit for bit: a module is replaced only where a trial on
the instance shows it.

Shapes: x (..., W), weight (W,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fitune.models.kernels import fused


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        # a trained weight is float32 beside 16-bit activations: what comes out stays in theirs
        return (weight * (wide * scale).to(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        grad = (grads[0] * weight).float()
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grads[0].float() * normal.to(x.dtype).float()).flatten(0, -2).sum(0).to(weight.dtype)
        return (scale * (grad - normal * (grad * normal).mean(-1, keepdim=True))).to(x.dtype), weight_grad, None


class LeanRMSNorm(nn.Module):
    """(..., W) to (..., W); shares the weight of the module that it stands for."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the module's text; on a GPU one kernel does it, which rounds once, where this rounds twice."""
        if fused.used(hidden_states):
            return fused.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        out: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return out


@torch.no_grad()
def replace_norms(model: nn.Module, compute: torch.dtype) -> tuple[int, list[str]]:
    """Replace the RMSNorms of a model that computes in 16 bits.

    Returns:
        How many were replaced, and the names of those that compute something else and stay.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, LeanRMSNorm)
    ]
    replaced, left = 0, []
    for name, module in found:
        eps = getattr(module, "variance_epsilon", None)
        weight = getattr(module, "weight", None)
        if isinstance(eps, float) and isinstance(weight, nn.Parameter) and len(list(module.parameters())) == 1:
            lean = LeanRMSNorm(weight, eps)
            trial = torch.linspace(-3, 5, 4 * weight.numel(), device=weight.device).view(4, -1).to(compute)
            if weight.device.type == "meta" or torch.equal(module(trial), lean(trial)):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, lean.train(module.training))
                replaced += 1
                continue
        left.append(name)
    return replaced, left
