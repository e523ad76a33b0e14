"""BitFit: the bias terms alone (Ben Zaken et al. 2022, arXiv:2106.10199).

In: a model. Out: the same, its biases trainable. A model that has none is refused, or gets some, zero at the start.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM, Layer
from fitune.models.methods.base import Method, is_linear, sizes, train_only


class Bitfit(Method):
    """See the module's text."""

    name = "bitfit"
    trains = "bias terms (bitfit.add gives the projections some where there are none)"
    options = "bitfit"
    families = "with biases: BLOOM, GPT-2, Qwen2, GLM; Llama with bitfit.add"
    default_lr = 1e-3
    why_lr = "few parameters that only shift activations (Ben Zaken et al. 2022 search 1e-4 to 1e-3; large steps win)"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        expected = self.expected(model, family, config)
        if config.bitfit.add:
            for name in _without_bias(model, family):
                layer = cast(Layer, model.get_submodule(name))
                zero = torch.zeros(sizes(layer)[1], device=layer.weight.device, dtype=torch.float32)
                layer.bias = nn.Parameter(zero)
        train_only(model, expected)
        return model

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """Every parameter called bias; with `add`, one for each output of each projection.

        Raises:
            ConfigError: the model has no bias terms.
        """
        found = {name: p.numel() for name, p in model.named_parameters() if name.endswith("bias")}
        if config.bitfit.add:
            found |= {f"{name}.bias": sizes(model.get_submodule(name))[1] for name in _without_bias(model, family)}
        if not found:
            raise ConfigError(
                f"bitfit: this model ({model.config.model_type}) has no bias terms, so nothing would be trained",
                expected="a model with biases, such as BLOOM, GPT-2, Qwen2 or GLM",
                fix="--bitfit.add (zero biases on the projections), or --method lora or ia3",
            )
        return found

    def merge_problem(self, model: CausalLM, family: Family, config: RunConfig) -> str | None:
        """Added biases need a place in the config."""
        if config.bitfit.add and not family.bias_flags:
            return f"{family.model_type} models have no place for the added biases"
        return None


def _without_bias(model: CausalLM, family: Family) -> list[str]:
    """Projections that have no bias."""
    family.whole("bitfit.add")
    names = (
        f"{family.blocks}.{n}.{name}" for n in range(len(family.block_list(model))) for name in family.projections()
    )
    return [n for n in names if is_linear(model.get_submodule(n)) and model.get_submodule(n).bias is None]


METHOD = Bitfit()
