"""A gated MLP (Shazeer 2020, arXiv:2002.05202) that keeps its gate and its other half, and not the activated gate.

act(gate) x up needs both factors in the backward pass, and act needs its input: autograd keeps three tensors of the
MLP's inner width. Here two are kept, and act(gate) is computed again. Values and gradients are the same, bit for bit;
on a GPU one kernel does it (`kernels/fused.py`).

Only a module whose forward is, instruction for instruction, that of Llama or of Phi-3 (gate and up in one layer) is
made lean: which classes those are follows from transformers' own code. Its activation must be SiLU or tanh-GELU, whose
derivative torch has as an operation; autograd inside a backward pass would stop torch's own counters.

Shapes: gate, up and what comes out (..., M).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from fitune.models.kernels import fused

Act = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]  # (gradient of what comes out, what went in)
SILU: Slope = torch.ops.aten.silu_backward
GELU: Slope = partial(torch.ops.aten.gelu_backward, approximate="tanh")
SLOPES = {"SiLU": SILU, "SiLUActivation": SILU, "GELUTanh": GELU, "PytorchGELUTanh": GELU}  # by transformers' classes


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act, slope: Slope) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.slope = act, slope
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate, up = ctx.saved_tensors
        return ctx.slope(grads[0] * up, gate), grads[0] * ctx.act(gate), None, None


def _product(gate: Tensor, up: Tensor, act: nn.Module) -> Tensor:
    slope = SLOPES[type(act).__name__]
    if gate.dtype == up.dtype and fused.used(gate):
        return fused.swiglu(gate, up, fused.SILU if slope is SILU else fused.GELU)
    out: Tensor = _Gated.apply(gate, up, act, slope)
    return out


class LeanMLP(nn.Module):
    """(..., W) to (..., W): gate and up are layers of their own."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """See the module's text."""
        out: Tensor = self.down_proj(_product(self.gate_proj(x), self.up_proj(x), self.act_fn))
        return out


class LeanJoinedMLP(nn.Module):
    """(..., W) to (..., W): gate and up are halves of what one layer gives."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the module's text."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        out: Tensor = self.down_proj(_product(gate, up, self.activation_fn))
        return out


def _instructions(kind: type[nn.Module]) -> tuple[object, ...]:
    code = getattr(kind.forward, "__code__", None)
    return () if code is None else (code.co_code, code.co_names, code.co_consts[1:])


LEAN = {_instructions(LlamaMLP): LeanMLP, _instructions(Phi3MLP): LeanJoinedMLP}


def lean_mlps(model: nn.Module) -> int:
    """Make the gated MLPs of a model lean, one instance at a time; how many there were."""
    made = 0
    for module in model.modules():
        lean = LEAN.get(_instructions(type(module)))
        act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        if lean is not None and type(act).__name__ in SLOPES:
            module.__class__ = lean
            made += 1
    return made
