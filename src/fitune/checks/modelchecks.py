"""Checks of a model with its method before the first step.

In: a model, its family, what the method is to train. Out: Findings.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from fitune.core.records import Finding
from fitune.models import attached, quant
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.parts import trainable


def family_found(family: Family) -> Finding:
    """Which family's names for parts of the model are used; for a family that is not in the table, the names found."""
    if not family.found:
        return Finding("family", "ok", f"{family.model_type}: {family.describe()}")
    return Finding("family", "warn", f"{family.model_type} is not in the table; by its names: {family.describe()}")


def layers_with_state(model: CausalLM) -> list[Finding]:
    """Layers that carry a state from token to token run on one document of a flat batch after the other, and by which
    code.

    Returns:
        The finding in a list; empty for a model that has none.
    """
    known = attached.of(model).alone
    if known is None:
        return []
    fast = [name for name in KERNELS if find_spec(name) is not None]
    on_gpu = next(model.parameters()).device.type == "cuda"
    code = f"kernels of {', '.join(fast)}" if fast and on_gpu else "transformers' plain torch code"
    packages = ", ".join(KERNELS.values())
    missing = f"; on a GPU {packages} would be faster, by how much was never measured" if not fast else ""
    text = f"{', '.join(known.kinds)}: one document of a flat batch after the other, by {code}{missing}"
    return [Finding("state-layers", "ok", text)]


# packages whose kernels transformers takes for such layers on a GPU, and what they are installed as
KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d", "mamba_ssm": "mamba-ssm"}


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
