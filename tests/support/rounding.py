"""What rounding alone does to a model's logits."""

from __future__ import annotations

from pathlib import Path

import torch

import fitune
from fitune.commands.merge import _probe, _relative


@torch.no_grad()
def rounded_once_more(run: Path, times: int = 8) -> float:
    """How far the logits move, relative to the largest, where each weight moves by half of its last bit at random."""
    tuned, worst = fitune.load(run), 0.0
    ids = _probe(tuned.encoder)
    before = tuned.model(input_ids=ids).logits
    kept = {name: weight.clone() for name, weight in tuned.model.named_parameters()}
    for seed in range(times):
        random = torch.Generator().manual_seed(seed)
        for name, weight in tuned.model.named_parameters():
            weight.copy_(kept[name] * (1 + (torch.rand(weight.shape, generator=random) - 0.5) * 2**-23))
        worst = max(worst, _relative(tuned.model(input_ids=ids).logits, before))
    return worst
