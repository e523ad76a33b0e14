"""Linear layers whose weight is frozen and kept in another form than it is computed in: int8, 4 bits, 16 bits.

In: a linear layer. Out: the same object with another `forward`: the weight is made plain for the product and dropped
again, and once more in the backward pass, so that nothing but the packed weight stays in memory, no input either. There
is one path for training, evaluation and generation; what `train()` and `eval()` say changes nothing.

Shapes: x (..., in), weight (out, in).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fitune.models.interfaces import Layer


class _Product(torch.autograd.Function):
    """x W^T; the gradient of x is g W, with W made plain again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Frozen) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return torch.matmul(grad, ctx.layer.plain_weight(grad.dtype)), None


class Frozen(nn.Module):
    """What the layers here share. `compute` is the dtype of the product."""

    compute: torch.dtype
    source_cls: type[nn.Module]  # of a quantized layer: the class that it was made from
    weight: Any
    bias: Any

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """(out, in)."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias. Nothing here is differentiated."""
        return F.linear(x, self.plain_weight(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out) in the compute dtype. The bias may be trained: it is never cast in place."""
        out: Tensor = _Product.apply(x.to(self.compute), self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class StoredLinear(Frozen, nn.Linear):
    """A plain linear layer whose weight is kept in another dtype than it is computed in, as long as it is frozen."""

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen."""
        weight: Tensor = self.weight.detach().to(dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """See Frozen; trained by a method that trains base weights, it is a plain layer again."""
        return nn.Linear.forward(self, x) if self.weight.requires_grad else Frozen.forward(self, x)


class StoredConv1D(Frozen, Conv1D):
    """The same for GPT-2's layer, whose weight is (in, out)."""

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen."""
        weight: Tensor = self.weight.detach().to(dtype)
        return weight.T

    def forward(self, x: Tensor) -> Tensor:
        """See StoredLinear."""
        plain: Tensor = Conv1D.forward(self, x) if self.weight.requires_grad else Frozen.forward(self, x)
        return plain


def keep_stored(model: nn.Module, compute: torch.dtype) -> None:
    """Let a model compute in a dtype that its frozen weights are not kept in: linear layers cast as they go, embeddings
    cast what they give, and what is neither (norms, fused experts) is cast once."""
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D) and module.weight.dtype != compute:
            module.__class__ = StoredLinear if type(module) is nn.Linear else StoredConv1D
            cast(Frozen, module).compute = compute
        elif isinstance(module, nn.Embedding):
            if module.weight.dtype != compute and not getattr(module, "casts", False):
                cast(Layer, module).casts = True
                module.register_forward_hook(lambda m, inputs, output: output.to(compute))
        elif not isinstance(module, Frozen):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():  # else it is packed (experts.py)
                    parameter.data = parameter.data.to(compute)
