"""What is the first to be NaN or infinite, for a message that names it.

In: a model and the micro-batches of a step. Out: a weight, an output or a gradient, by name, and the rows that show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fitune.core.records import Batch, Layout
from fitune.engine.step import loss_sum
from fitune.models.interfaces import causal_lm
from fitune.models.parts import trainable
from fitune.models.tensors import finite


def first_non_finite(model: nn.Module, micro_batches: Sequence[Batch], layout: Layout) -> tuple[str, tuple[int, ...]]:
    """What is the first to be NaN or infinite (a weight, an output, a gradient), and the rows that show it."""
    rows = tuple(row for batch in micro_batches for row in batch.rows)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not finite(parameter):
            return f"the weight {name}", rows
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, found))
        for name, module in causal_lm(model).named_modules()
        if name and not list(module.children())
    ]
    try:
        for batch in micro_batches:
            _one_backward(model, batch, layout)
            if found:
                return f"the output of {found[0]}", batch.rows
            wrong = [n for n, p in trainable(model).items() if p.grad is not None and not finite(p.grad)]
            if wrong:
                return f"the gradient of {wrong[-1]}", batch.rows
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return "nothing when they are run again", rows


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, object, object], None]:
    def look(module: nn.Module, inputs: object, output: object) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
        if not found and any(t.is_floating_point() and not finite(t) for t in tensors):
            found.append(name)

    return look


def _one_backward(model: nn.Module, batch: Batch, layout: Layout) -> None:
    loss = loss_sum(model, batch, layout)
    if math.isfinite(loss.item()):
        loss.backward()
