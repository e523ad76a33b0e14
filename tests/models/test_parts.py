"""What is trainable, by name and in order, is what `named_parameters` says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fitune.models import adapters
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from support import tiny
from support.contract import config_for

pytestmark = pytest.mark.unit


def as_torch_names(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(p)) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("variant", ["lora-all", "full", "bitfit-add", "prompt"])
def test_names_and_order_are_torchs(variant: str) -> None:
    model = adapters.attach(ready(tiny.make_model("llama")), config_for(variant))
    assert [(name, id(p)) for name, p in trainable(model).items()] == as_torch_names(model)


def test_what_stands_twice_counts_once_by_its_first_name() -> None:
    """A module in two places, a tied weight, a parameter that is none, and a frozen one."""
    inner, tied = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    model = nn.Sequential(nn.Sequential(nn.ReLU(), inner), tied, inner, nn.Linear(2, 2))
    tied.weight = inner.weight
    model.register_parameter("none", None)
    model.register_parameter("own", nn.Parameter(torch.ones(1)))
    model[3].weight.requires_grad_(False)
    assert [(name, id(p)) for name, p in trainable(model).items()] == as_torch_names(model)
    assert list(trainable(model)) == ["own", "0.1.weight", "0.1.bias", "3.bias"]
