"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) that keeps its input once, in the dtype it came in.

transformers' modules compute in float32 step by step, and autograd keeps what lies between the steps: two float32
tensors of the input's size for each in 16 bits, and in float32 a second one where the weight is trained. Here the input
and one number per row are kept, and the rest is computed again in the backward pass. The values are the same, bit for
bit: a module is replaced only where a trial of its class shows it.

Architectures differ in two things: when the product with the weight is made (before or after rounding to 16 bits), and
whether the weight is kept as it is or less one (Gemma).

Shapes: x (..., W), weight (W,).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fitune.models.kernels import fused


@dataclass(frozen=True)
class Form:
    """late: the result is rounded once, behind the product with the weight. offset: what is added to the weight."""

    late: bool = False
    offset: float = 0.0

    def scaled(self, normal: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """normal x weight in this dtype; normal: float32."""
        factor = self.offset + weight.float() if self.offset else weight
        # a trained weight is float32 beside 16-bit activations: what comes out stays in theirs
        return (factor * (normal if self.late else normal.to(dtype))).to(dtype)


PLAIN = Form()
FORMS = (PLAIN, Form(late=True), Form(late=True, offset=1.0))  # Llama, OLMo 2, Gemma


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, form: Form) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.form = form
        return form.scaled(wide * scale, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        x_grad = weight_grad = None
        if ctx.needs_input_grad[1]:
            seen = normal if ctx.form.late else normal.to(x.dtype)
            weight_grad = (grads[0].float() * seen.float()).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            factor = ctx.form.offset + weight.float() if ctx.form.offset else weight
            grad = (grads[0] * factor).float()
            x_grad = (scale * (grad - normal * (grad * normal).mean(-1, keepdim=True))).to(x.dtype)
        return x_grad, weight_grad, None, None


class LeanRMSNorm(nn.Module):
    """(..., W) to (..., W); shares the weight of the module that it stands for."""

    def __init__(self, weight: nn.Parameter, eps: float, form: Form = PLAIN) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.form = weight, eps, form

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the module's text; on a GPU one kernel does it, which rounds once, where this rounds twice."""
        if self.form is PLAIN and fused.used(hidden_states):
            return fused.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        out: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, self.form)
        return out


def replace_norms(model: nn.Module, compute: torch.dtype) -> tuple[int, list[str]]:
    """Replace the RMSNorms of a model.

    Args:
        compute: the dtype that it computes in.

    Returns:
        How many were replaced, and the names of those that compute something else and stay.
    """
    replaced, left = 0, []
    for name, module in [*_norms(model)]:
        weight, eps = getattr(module, "weight", None), _eps(module)
        form = _form_of(module, compute) if isinstance(weight, nn.Parameter) else None
        if form is None or eps is None or not isinstance(weight, nn.Parameter) or len([*module.parameters()]) != 1:
            left.append(name)
            continue
        parent, _, leaf = name.rpartition(".")
        lean = LeanRMSNorm(weight, eps, form).train(module.training)
        setattr(model.get_submodule(parent), leaf, lean)
        replaced += 1
    return replaced, left


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, LeanRMSNorm):
            yield name, module


def _eps(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


WIDTH, EPS = 64, 1e-3  # of the trial
EPSILON = ("eps", "epsilon")  # ends of its names


def _form_of(module: nn.Module, compute: torch.dtype) -> Form | None:
    """How a norm computes; None: as nothing here does, or with settings that its class was not tried with."""
    found = _form(type(module), compute)  # type: ignore[arg-type]  # a class: mypy takes it for its instances
    return found[0] if found is not None and found[1] == _settings(module) else None


def _settings(module: nn.Module) -> dict[str, object]:
    """What an instance was made with, but for its epsilon; its own width is called so."""
    width = module.get_parameter("weight").numel()
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    kept = {name: value for name, value in plain.items() if isinstance(value, (bool, int, float, str, type(None)))}
    return {name: "width" if value == width else value for name, value in kept.items() if not name.endswith(EPSILON)}


@cache
def _form(kind: Any, compute: torch.dtype) -> tuple[Form, dict[str, object]] | None:
    """How a class of norms computes, by trying one of its instances, and the settings of that; None: as nothing here
    does."""
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        try:
            module: Any = kind(WIDTH, eps=EPS)
            module.weight.copy_(torch.linspace(0.5, 1.7, WIDTH))
            trial = torch.linspace(-3, 5, 4 * WIDTH).view(4, -1).to(compute)
            module.to(compute)
            expected = module(trial)
        except (TypeError, ValueError, AttributeError, RuntimeError):  # another class, with other arguments
            return None
        if _eps(module) != EPS:
            return None
        lean = (LeanRMSNorm(module.weight, EPS, form) for form in FORMS)
        form = next((one.form for one in lean if torch.equal(one(trial), expected)), None)
        return None if form is None else (form, _settings(module))
