"""Linear layers of a model that computes in bfloat16, on a processor that only imitates it.

In: a model. Out: inside a context, its linear layers round what they multiply to bfloat16, multiply in float32 and
round what they give: what a product in bfloat16 does, up to the order of its sums, at the rate of float32. For work
without gradients, whose copies in float32 go at once.

Shapes: x (..., in), weight (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fitune.models.kernels.frozen import Frozen

HALF = torch.bfloat16


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """See the module's text."""
    layers: list[Any] = [
        module for module in model.modules() if type(module) in (nn.Linear, Conv1D) or isinstance(module, Frozen)
    ]
    for layer in layers:
        layer.forward = partial(_product, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _product(layer: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(x.to(HALF).float(), _weight(layer).float())
        return (out if layer.bias is None else out + layer.bias.to(HALF).float()).to(HALF)


def _weight(layer: Any) -> Tensor:
    """(out, in), rounded to bfloat16."""
    if isinstance(layer, Frozen) and not layer.weight.requires_grad:
        return layer.plain_weight(HALF)
    weight: Tensor = layer.weight.to(HALF)
    return weight.T if isinstance(layer, Conv1D) else weight
