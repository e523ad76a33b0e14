"""DoRA (Liu et al. 2024, arXiv:2402.09353) that keeps one tensor of its output's size for the backward pass.

In: PEFT's layer of magnitudes. Out: the same object with another forward. With v what the base gives, u what LoRA adds
and m the magnitudes over the norms, DoRA adds (m - 1) v + m u. Autograd keeps v and u for the gradient of m, which
needs their sum alone. Values are PEFT's, bit for bit; parameters, names and files stay PEFT's.

Shapes: x (..., in), v, u (..., out), m (1, out).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fitune.models.interfaces import Layer


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, base: Tensor, added: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(factor, (base + scaling * added).to(base.dtype))
        ctx.scaling, ctx.dtypes = scaling, (base.dtype, added.dtype)
        return (factor - 1) * base + factor * added * scaling

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        (grad,), (factor, whole) = grads, ctx.saved_tensors
        of_base, of_added = ctx.dtypes
        back = ((factor - 1) * grad).to(of_base) if ctx.needs_input_grad[1] else None
        added = (factor * grad * ctx.scaling).to(of_added) if ctx.needs_input_grad[2] else None
        return (grad * whole).flatten(0, -2).sum(0, keepdim=True).to(factor.dtype), back, added, None


class LeanDora(DoraLinearLayer):  # type: ignore[misc]  # PEFT has no types
    """See the module's text."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,  # noqa: N803  # PEFT's names
        lora_B: nn.Linear,  # noqa: N803
        scaling: float,
        base_layer: Layer,
        base_result: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """What DoRA adds to the base's output; behind dropout, PEFT's own forward. What else it is given is for that
        (PEFT 0.18 gives nothing, later ones the adapter's name)."""
        if base_result is None:
            plain: Tensor = super().forward(
                x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, base_layer=base_layer, **others
            )
            return plain
        with torch.no_grad():  # the norm counts as a constant (section 4.3 of the paper)
            # through the layers, as PEFT does: FSDP may hold their weights
            change = lora_B(lora_A(torch.eye(x.shape[-1], device=x.device, dtype=lora_A.weight.dtype))).T.to(x.dtype)
            weight = dequantize_module_weight(base_layer).to(x.dtype)
            norm = self.get_weight_norm(weight=weight, lora_weight=change, scaling=scaling)
            del change, weight
        bias = base_layer.bias
        base = base_result if bias is None else base_result - bias
        out: Tensor = _Scaled.apply((self.weight / norm).view(1, -1), base, lora_B(lora_A(x)), scaling)
        return out


def keep_once(module: nn.Module) -> None:
    """Give a layer of PEFT's this forward, where it is one of DoRA's."""
    if type(module) is DoraLinearLayer:
        module.__class__ = LeanDora
