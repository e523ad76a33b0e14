"""LoRA: a trainable low-rank update beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

In: a model and the names of linear layers. Out: the model as PEFT wraps it, y = W x + (alpha / rank) B A x, with B = 0
at the start, so nothing changes until the first step. Parameters, names and files are PEFT's.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fitune.config import RunConfig
from fitune.errors import ConfigError, did_you_mean
from fitune.families import Family


class Lora:
    """See the module's text."""

    name = "lora"
    default_lr = 2e-4
    why_lr = (
        "only the small update moves: ten times full tuning's rate (Hu et al. 2021, table 11; Biderman et al. 2024)"
    )

    def attach(self, model: Any, family: Family, config: RunConfig) -> Any:
        """See Method.attach."""
        names = sorted(_targets(model, family, config))
        options = config.lora
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=options.rank,
                lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides by it; a float is as good
                lora_dropout=options.dropout,
                target_modules=_short(names, model),
                fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
            ),
        )

    def expected(self, model: Any, family: Family, config: RunConfig) -> int:
        """rank x (inputs + outputs), summed over the targets."""
        targets = (model.get_submodule(name) for name in _targets(model, family, config))
        return sum(config.lora.rank * sum(module.weight.shape) for module in targets)


def _targets(model: Any, family: Family, config: RunConfig) -> set[str]:
    """Full names of the linear layers that the setting means.

    Raises:
        ConfigError: a name matches no linear layer.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    setting = config.lora.targets
    if setting == "all-linear":
        head = model.get_output_embeddings()
        return {name for name in linear if model.get_submodule(name) is not head}
    wanted = list(family.lora_targets) if setting == "auto" else [setting] if isinstance(setting, str) else setting
    found: set[str] = set()
    for want in wanted:
        hits = {name for name in linear if name == want or name.endswith(f".{want}")}
        if not hits:
            leaves = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(
                f"lora.targets: {want!r} matches no linear layer of this model",
                expected=f"auto, all-linear or names such as {', '.join(sorted(leaves))}",
                fix=did_you_mean(want, leaves),
            )
        found |= hits
    return found


def _short(names: list[str], model: Any) -> list[str]:
    """The layers' last names where those mean exactly these layers, as PEFT's own users write them."""
    leaves = {name.rpartition(".")[2] for name in names}
    meant = sum(name.rpartition(".")[2] in leaves for name, _ in model.named_modules())
    return sorted(leaves) if meant == len(names) else names


METHOD = Lora()
