"""Bottleneck adapters: y + up(f(down(y))) with up = 0, so nothing changes until the first step.

Houlsby et al. 2019 (arXiv:1902.00751): after the attention's and after the MLP's output layer. Pfeiffer et al. 2021
(arXiv:2005.00247): after the MLP's alone. Parallel (He et al. 2022, arXiv:2110.04366): beside the MLP, on its input.

In: a model. Out: the same with wrapped layers. Several adapters can lie side by side in a wrapper, by name; one of
them, or none, is active.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.core.options import BottleneckOptions
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, train_only

F = nn.functional
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
DEFAULT = "default"


class Bottleneck(nn.Module):
    """(..., W) to (..., W): up(f(down(x))), zero at the start."""

    def __init__(self, model_width: int, options: BottleneckOptions) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(model_width, options.width), nn.Linear(options.width, model_width)
        self.activation = options.activation
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """See the class's text."""
        out: Tensor = self.up(ACTIVATIONS[self.activation](self.down(x.to(self.down.weight.dtype))))
        return out.to(x.dtype)


class Adapted(nn.Module):
    """A layer with adapters behind it, or beside it (parallel). Whatever the layer is, quantized too."""

    def __init__(self, base: nn.Module, *, parallel: bool) -> None:
        super().__init__()
        self.base, self.parallel = base, parallel
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with the active adapter's change."""
        out: Tensor = self.base(x, *args, **kwargs)
        if self.active is None:
            return out
        change: Tensor = self.adapters[self.active](x if self.parallel else out)
        return out + change


class Adapter(Method):
    """See the module's text."""

    name = "adapter"
    trains = "bottleneck layers after attention and MLP (houlsby), after the MLP (pfeiffer) or beside it (parallel)"
    options = "bottleneck"
    default_lr = 1e-3
    why_lr = "small layers that start at zero (Houlsby et al. 2019 search up to 3e-3; He et al. 2022 use 1e-3)"
    cannot_merge = "its activation function stands between the two layers, so they are no part of a weight matrix"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        expected = self.expected(model, family, config)
        add(model, family, config.bottleneck, DEFAULT)
        train_only(model, expected)
        return model

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """2 x width x model width + both biases, for each place."""
        inner, outer = config.bottleneck.width, int(model.config.hidden_size)
        parts = {"down.weight": inner * outer, "down.bias": inner, "up.weight": inner * outer, "up.bias": outer}
        return {
            f"{place}.adapters.{DEFAULT}.{name}": size
            for place in _places(model, family, config.bottleneck)
            for name, size in parts.items()
        }


def _places(model: CausalLM, family: Family, options: BottleneckOptions) -> list[str]:
    """The layers that get adapters."""
    family.whole("adapter")
    if options.kind == "parallel" and family.mlp is None:
        raise ConfigError(
            "bottleneck.kind=parallel: this model's MLP is no module of its own",
            received=family.model_type,
            fix="--bottleneck.kind houlsby",
        )
    names = {"houlsby": (family.out, family.mlp_out), "pfeiffer": (family.mlp_out,), "parallel": (family.mlp or "",)}
    return [f"{family.blocks}.{n}.{name}" for n in range(len(family.block_list(model))) for name in names[options.kind]]


def add(model: CausalLM, family: Family, options: BottleneckOptions, name: str) -> None:
    """One more adapter, the active one from now on; its parameters are float32."""
    for place in _places(model, family, options):
        parent, _, leaf = place.rpartition(".")
        layer = model.get_submodule(place)
        if not isinstance(layer, Adapted):
            layer = Adapted(layer, parallel=options.kind == "parallel")
            setattr(model.get_submodule(parent), leaf, layer)
        device = next(layer.base.parameters()).device
        layer.adapters[name] = Bottleneck(int(model.config.hidden_size), options).to(device, torch.float32)
    switch(model, name)


def wrappers(model: CausalLM) -> Iterator[Adapted]:
    """Every wrapped layer."""
    yield from (module for module in model.modules() if isinstance(module, Adapted))


def switch(model: CausalLM, name: str | None) -> None:
    """Make this adapter the active one; None: the base alone."""
    for layer in wrappers(model):
        layer.active = name if name is not None and name in layer.adapters else None


METHOD = Adapter()
