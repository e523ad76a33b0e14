"""Several models of one base model: what is the same in them stands in memory once.

In: models that were loaded on their own. Out: the same, whose equal frozen tensors are one tensor. Each keeps its own
method, so nothing is ever switched, and each answers as it would alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from fitune.models.interfaces import causal_lm

WRAPPED = ".base_layer."  # what PEFT puts into the name of a layer that it wraps


def share(first: nn.Module, other: nn.Module) -> int:
    """Let a model use the frozen tensors of another that are bit for bit its own; the bytes that this saves.

    Args:
        first: keeps all that it has.
        other: of the same base model, with the same or another method.
    """
    known = _frozen(first)
    saved = 0
    for name, tensor in _frozen(other).items():
        same = known.get(name)
        if same is None or same.data_ptr() == tensor.data_ptr() or not _equal(same, tensor):
            continue
        tensor.data = same.data
        saved += tensor.numel() * tensor.element_size()
    return saved


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The base model's tensors by their names without a method's additions."""
    named = causal_lm(model).named_parameters()
    return {name.replace(WRAPPED, "."): one for name, one in named if ".lora_" not in name}


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device, one.stride()) == (other.shape, other.dtype, other.device, other.stride())
    return alike and bool((one.data == other.data).all())
