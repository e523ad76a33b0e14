"""Checks of a model with its method before the first step.

In: a model, its family, what the method is to train. Out: Findings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fitune.core.records import Finding
from fitune.models import quant
from fitune.models.families import Family
from fitune.models.parts import trainable


def family_found(family: Family) -> Finding:
    """Which family's names for parts of the model are used; for a family that is not in the table, the names found."""
    if not family.found:
        return Finding("family", "ok", f"{family.model_type}: {family.describe()}")
    return Finding("family", "warn", f"{family.model_type} is not in the table; by its names: {family.describe()}")


def trainable_set(model: Any, expected: Mapping[str, int] | None, dtype: torch.dtype = torch.float32) -> Finding:
    """The trainable parameters are, by name and size, those of the method's closed form, in the dtype asked for."""
    parameters = trainable(model)
    sizes = {name: p.numel() for name, p in parameters.items()}
    count, total = sum(sizes.values()), sum(quant.numel(p) for p in model.parameters())
    if expected is not None and sizes != dict(expected):
        differing = sorted(n for n in sizes.keys() | expected.keys() if sizes.get(n) != expected.get(n))
        text = f"{count:,} parameters are trainable, {sum(expected.values()):,} expected; differing: {differing[:3]}"
        return Finding("trainable-set", "refuse", text)
    if not parameters:
        return Finding("trainable-set", "refuse", "nothing is trainable")
    kind = str(dtype).removeprefix("torch.")
    low = [name for name, p in parameters.items() if p.dtype != dtype]
    if low:
        return Finding("trainable-set", "refuse", f"{len(low)} trainable tensors are not {kind}, the first {low[0]}")
    return Finding(
        "trainable-set", "ok", f"{count:,} of {total:,} parameters trainable ({count / total:.4%}), all {kind}"
    )
