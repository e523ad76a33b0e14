"""Methods as PEFT computed them when the published runs were made, where it computes them otherwise now.

In: the version of PEFT that a run names. Out: inside `as_of`, the layers of that version. Orthogonal subspace tuning
made the whole weight anew for each product until 0.20; 0.21 adds a low-rank difference to the base's product instead
(huggingface/peft pull request 3524), which takes less. AdaLoRA's number of ranks is no parameter to train in these runs
(their published counts); 0.21 leaves it one, and keeps every product that is divided by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import peft.tuners.osf.layer as osf
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

OTHERWISE_FROM = Version("0.21")
HIGH, LOW = ("U_high", "S_high", "V_high"), ("U_low", "S_low", "V_low")


class WholeWeight(osf.Linear):  # type: ignore[misc]
    """Keeps all parts of the decomposition, and puts the weight together from them."""

    def update_layer(self, adapter_name: str, effective_rank: int, config: Any, **more: Any) -> None:
        """Decompose the weight; the low part is trained."""
        parts = osf.decompose_weight_matrix(self.get_base_layer().weight.data, top_k=effective_rank)
        for name in HIGH:
            self.register_buffer(name, parts[name], persistent=False)
        self.osf_svd_params[adapter_name] = nn.ParameterDict({name: parts[name] for name in LOW})
        held = self.osf_svd_params[adapter_name]
        held["U_low"].register_hook(lambda grad: grad - self.U_high @ (self.U_high.T @ grad))
        held["V_low"].register_hook(lambda grad: grad - (grad @ self.V_high.T) @ self.V_high)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A product with the weight of both parts."""
        low = self.osf_svd_params[self.active_adapters[0]]
        high = torch.mm(self.U_high * self.S_high.unsqueeze(0), self.V_high)
        weight = high + torch.mm(low["U_low"] * low["S_low"].unsqueeze(0), low["V_low"])
        return F.linear(self._cast_input_dtype(x, weight.dtype), weight).to(x.dtype)


def is_before(made_with: str | None) -> bool:
    """Did that version compute otherwise than the installed one?"""
    return bool(made_with) and Version(str(made_with)) < OTHERWISE_FROM <= Version(version("peft"))


def frozen_as_of(model: nn.Module, made_with: str | None) -> None:
    """Freeze what that version froze."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name and is_before(made_with):
            parameter.requires_grad_(False)


@contextmanager
def as_of(made_with: str | None) -> Iterator[None]:
    """Inside, PEFT's layers are those of that version; None: those of the installed one."""
    before = osf.Linear
    if is_before(made_with):
        osf.Linear = WholeWeight
    try:
        yield
    finally:
        osf.Linear = before
