"""How a mixture's routers share tokens among its experts.

In: a model at the end of a run, and rows that it was trained on. Out: a finding; nothing for a model without experts
behind transformers' interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fitune.core.records import Finding, Layout, Sample
from fitune.data.batches import flat
from fitune.engine.step import hidden_states
from fitune.models.kernels.experts import behind_interface
from fitune.models.switches import evaluating

ROWS = 32  # that are looked at: some thousand tokens


@torch.no_grad()
def router_load(model: nn.Module, samples: Sequence[Sample], layout: Layout) -> list[Finding]:
    """Of a mixture of experts: what share of the choices its busiest and its least busy expert get, and how many
    experts get none, over rows of the run.

    Of a model in shards all processes must ask.

    Args:
        model: with its method on it.
        samples: some of these are looked at.
        layout: of the run.

    Returns:
        The finding in a list; empty for a model without routed experts.
    """
    rows = [samples[number] for number in range(min(ROWS, len(samples)))]
    counts: dict[str, Tensor] = {}

    def count(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        chosen = inputs[1].reshape(-1).cpu()
        here = torch.bincount(chosen[chosen < module.num_experts], minlength=module.num_experts)
        counts[name] = counts[name] + here if name in counts else here

    routed = [(name, module) for name, module in model.named_modules() if behind_interface(module)]
    if not routed:
        return []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: count(name, module, inputs))
        for name, module in routed
    ]
    try:
        with evaluating(model):
            for row in rows:
                hidden_states(model, flat([row], [0]), layout)
    finally:
        for hook in hooks:
            hook.remove()
    return [Finding("router-load", "ok", _text(list(counts.values()), sum(map(len, rows))))] if counts else []


def _text(counts: Sequence[Tensor], tokens: int) -> str:
    shares = [each.double() / max(1, int(each.sum())) for each in counts]
    most, least = max(float(one.max()) for one in shares), min(float(one.min()) for one in shares)
    number, even = sum(len(one) for one in counts), sum(1 / len(one) for one in counts) / len(counts)
    never = sum(int((one == 0).sum()) for one in counts)
    return (
        f"{len(counts)} routers over {tokens:,} tokens of training rows: of a router's choices an expert gets at most "
        f"{most:.1%} and at least {least:.1%}, evenly it would be {even:.1%}; {never:,} of {number:,} experts get none"
    )
