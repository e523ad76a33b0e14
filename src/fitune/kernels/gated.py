"""A gated MLP (Shazeer 2020, arXiv:2002.05202) that keeps its gate and its other half, and not the activated gate.

act(gate) x up needs both factors in the backward pass, and act needs its input: autograd keeps three tensors of the
MLP's inner width. Here two are kept, and act(gate) is computed again. Values and gradients are the same, bit for bit.

Only a module whose forward is, instruction for instruction, that of Llama or of Phi-3 (gate and up in one layer) is
made lean: which classes those are follows from transformers' own code, and no list of names is kept.

Shapes: gate, up and what comes out (..., M).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

Act = Callable[[Tensor], Tensor]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Act) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            inner = gate.detach().requires_grad_()
            opened = ctx.act(inner)
        (gate_grad,) = torch.autograd.grad(opened, inner, grads[0] * up)
        return gate_grad, grads[0] * opened.detach(), None


class LeanMLP(nn.Module):
    """(..., W) to (..., W): gate and up are layers of their own."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """See the module's text."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(_Gated.apply(gate, up, self.act_fn))
        return out


class LeanJoinedMLP(nn.Module):
    """(..., W) to (..., W): gate and up are halves of what one layer gives."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the module's text."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        out: Tensor = self.down_proj(_Gated.apply(gate, up, self.activation_fn))
        return out


def _instructions(kind: type[nn.Module]) -> tuple[Any, ...]:
    code = getattr(kind.forward, "__code__", None)
    return () if code is None else (code.co_code, code.co_names, code.co_consts[1:])


LEAN = {_instructions(LlamaMLP): LeanMLP, _instructions(Phi3MLP): LeanJoinedMLP}


def lean_mlps(model: nn.Module) -> int:
    """Make the gated MLPs of a model lean, one instance at a time; how many there were."""
    found = [(module, LEAN.get(_instructions(type(module)))) for module in model.modules()]
    for module, lean in found:
        if lean is not None:
            module.__class__ = lean
    return sum(lean is not None for _, lean in found)
