"""The tensors of a model, counted: as shadows, or as they are.

In: a model, on meta or real, and a tracer. Out: the tracer has each storage once, by category.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

from torch import Tensor, nn

from fitune.memory.shadow import META, REAL, Shadow
from fitune.memory.storage import CONSTANTS, TRAINABLE, WEIGHTS
from fitune.memory.trace import Tracer


def shadows(model: nn.Module, tracer: Tracer) -> None:
    """Turn a model on meta into shadows, each counted: frozen, trainable, constants of quantized weights.

    Args:
        model: parameters and buffers on meta; tensors that share storage stay one.
        tracer: counts them.
    """
    maker = Shadows(tracer)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    store[key] = maker.of(tensor, TRAINABLE if tensor.requires_grad else WEIGHTS)


@cache
def _kind(name: str) -> type[Shadow]:
    """Shadows of weights that bitsandbytes packed are called as those are: PEFT knows them by this name."""
    return type(name, (Shadow,), {}) if name in ("Params4bit", "Int8Params") else Shadow


def count(model: nn.Module, tracer: Tracer) -> int:
    """Count the tensors of a real model, as `shadows` does; their bytes."""
    before = len(tracer.events)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for tensor in store.values():
                if tensor is not None:
                    tracer.own(tensor, TRAINABLE if tensor.requires_grad else WEIGHTS)
                    for beside in vars(tensor).values():
                        _count_constants(beside, tracer)
    return sum(size for _, size in tracer.events[before:])


def _count_constants(value: object, tracer: Tracer) -> None:
    if isinstance(value, Tensor) and value.numel():
        tracer.own(value, tracer.category(value) or CONSTANTS)
    elif type(value).__name__ == "QuantState":
        for one in vars(value).values():
            _count_constants(one, tracer)


class Shadows:
    """Shadows of tensors, each made once."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.made: dict[int, tuple[Any, Tensor]] = {}  # with the tensor itself, so that no other gets its id

    def of(self, tensor: Tensor, category: str) -> Any:
        """One tensor's; a parameter stays one, and what is remembered beside it becomes a shadow too."""
        if id(tensor) in self.made:
            return self.made[id(tensor)][0]
        small = tensor.device != META and not tensor.is_floating_point() and tensor.numel() <= REAL
        if isinstance(tensor, Shadow) or small:  # made by what was traced; code looks into small ones
            self.tracer.own(tensor, category)
            return tensor
        made: Any = _kind(type(tensor).__name__)(tensor.detach().to(META), requires_grad=tensor.requires_grad)
        self.tracer.own(made, category)
        if isinstance(tensor, nn.Parameter):
            made._is_param = True
        made.__dict__.update({name: self.constants(value) for name, value in tensor.__dict__.items()})
        self.made[id(tensor)] = made, tensor
        return made

    def constants(self, value: object) -> Any:
        """Scales and codes beside a quantized weight: tensors, or an object of bitsandbytes that holds some."""
        if isinstance(value, Tensor):
            return self.of(value, CONSTANTS)
        if type(value).__name__ != "QuantState":
            return value
        there = copy(value)
        for name, one in vars(value).items():
            setattr(there, name, self.constants(one))
        return there
