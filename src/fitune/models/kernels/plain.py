"""Parts of a transformer that keep more for the backward pass than they need, as one operation each.

GELU by tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415), where transformers writes it as eight operations (GPT-2,
Phi): its input is kept alone, and torch's own operation gives the gradient; values are transformers', bit for bit.
Dropout on a CPU: torch's keeps a number of the input's dtype for each element; here a byte is kept. The draws are
torch's, so its values and gradients are, too, bit for bit.

Shapes: x (...).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from fitune.models.kernels import target


class _TanhGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        return plain(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grads[0], x, approximate="tanh"), None


class LeanGELU(NewGELUActivation):  # type: ignore[misc]  # transformers has no types
    """(...) to (...)."""

    def forward(self, input: Tensor) -> Tensor:
        """See the module's text."""
        out: Tensor = _TanhGELU.apply(input, super().forward)
        return out


class LeanFastGELU(FastGELUActivation):  # type: ignore[misc]  # transformers has no types
    """(...) to (...)."""

    def forward(self, input: Tensor) -> Tensor:
        """See the module's text."""
        out: Tensor = _TanhGELU.apply(input, super().forward)
        return out


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        drawn = torch.empty_like(x).bernoulli_(1 - share)
        ctx.save_for_backward(drawn.bool())
        ctx.share = share
        return x * drawn.div_(1 - share)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grads[0] * kept.to(grads[0].dtype).div_(1 - ctx.share), None


class ByteDropout(nn.Dropout):
    """(...) to (...)."""

    def forward(self, input: Tensor) -> Tensor:
        """See the module's text; on a GPU torch's own keeps a byte, too."""
        if not self.training or not 0 < self.p < 1 or target.of(input.device).kind != "cpu":
            return super().forward(input)
        out: Tensor = _Dropped.apply(input, self.p)
        return out


STANDS_FOR: dict[type[nn.Module], type[nn.Module]] = {
    NewGELUActivation: LeanGELU, FastGELUActivation: LeanFastGELU, nn.Dropout: ByteDropout,
}  # fmt: skip


def keep_less(model: nn.Module) -> int:
    """Make these parts of a model so, one instance at a time; how many there were."""
    found = [module for module in model.modules() if type(module) in STANDS_FOR]
    for module in found:
        module.__class__ = STANDS_FOR[type(module)]
    return len(found)
