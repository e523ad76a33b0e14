"""Optimizer and learning rate.

In: trainable parameters, a config. Out: AdamW, and a learning rate that is a pure function of the step, so that there
is no schedule to save. Optimizer states become a flat table of tensors plus JSON, never a pickle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fitune.config import RunConfig


def make(
    parameters: Mapping[str, torch.nn.Parameter], config: RunConfig, rates: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); vectors (norms, biases) are never decayed.

    Args:
        parameters: what is trained, by name.
        config: the settings.
        rates: the learning rate of a parameter, in times of the run's.
    """
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.ndim >= 2, rates(name)), []).append(parameter)
    made = [
        {"params": some, "weight_decay": config.weight_decay if decays else 0.0, "times": times}
        for (decays, times), some in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
    return torch.optim.AdamW(made, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the steps, then a cosine to zero.

    Args:
        step: from 0.
        total: steps of the whole run.
        peak: highest rate.
        warmup: share of the steps, 0 to 1.
    """
    rising = max(1, round(total * warmup)) if warmup > 0 else 0
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, total - rising)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this learning rate, times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]


def _names(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> list[str]:
    """Parameter names in the optimizer's own numbering."""
    by_id = {id(p): name for name, p in parameters.items()}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors named `parameter|key`, and what is no tensor."""
    names = _names(optimizer, parameters)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            name = f"{names[number]}|{key}"
            if isinstance(value, Tensor):
                tensors[name] = value.detach().cpu().contiguous()
            else:
                scalars[name] = value
    return tensors, scalars


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put back what `state_tensors` gave."""
    number_of = {name: number for number, name in enumerate(_names(optimizer, parameters))}
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **scalars}.items():
        parameter, _, key = name.rpartition("|")
        state.setdefault(number_of[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
