"""LoRA on linear layers whose names PEFT takes for parts of fused experts: shared experts, and blocks without experts.

Where older transformers had a layer for each expert's gate_proj, up_proj and down_proj, and now has one parameter for
all, PEFT (from 0.19 on) reads each target of such a name, in full or not, as that parameter. By `target_modules` it
reaches no shared expert of these models, but it injects layers by the names of their tensors
(`inject_adapter_in_model`), and it reads a linear layer's weight among `target_parameters`. So: a layer gets PEFT's own
layer of LoRA, quantized or not, and adapter_config.json names its weight, with which PEFT loads the file: the tensors
have the same names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn

from fitune.models.interfaces import CausalLM, Peft, causal_lm
from fitune.models.methods.base import is_linear
from fitune.models.weights import safe

WEIGHT = ".weight"
NOTHING = "dummy-target-modules"  # PEFT's own name for no layers at all (peft.utils.constants)


def is_misread(model: CausalLM, name: str) -> bool:
    """Does PEFT take a layer's name for that of a fused expert's part in old files?"""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # PEFT before 0.19
        return False
    asked = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(asked, model, None)
    except ValueError:  # it wants the parts that are fused together
        return True
    return bool(asked.target_parameters)


def split(model: CausalLM, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of layers that PEFT reads as they are, and of those that it does not."""
    wrong = {leaf for leaf in {name.rpartition(".")[2] for name in names} if is_misread(model, leaf)}
    return (
        [name for name in names if name.rpartition(".")[2] not in wrong],
        [name for name in names if name.rpartition(".")[2] in wrong],
    )


def inject(wrapped: Peft, names: Sequence[str], adapter: str = "default") -> None:
    """Put LoRA on layers by their names, and their weights into the adapter's `target_parameters`.

    Args:
        wrapped: with the adapter on its other layers.
        names: of linear layers, as the model inside calls them.
        adapter: whose settings they get.
    """
    config = wrapped.peft_config[adapter]
    asked, others = copy(config), sorted(config.target_parameters or ())
    asked.target_modules, asked.target_parameters = {NOTHING}, None  # the names of tensors decide
    with warnings.catch_warnings():  # that there is an adapter already, and that these are not all of its targets
        warnings.simplefilter("ignore")
        inject_adapter_in_model(
            asked, wrapped.get_base_model(), adapter, state_dict={f"{n}.lora_A.weight": torch.empty(0) for n in names}
        )
    config.target_modules = [] if config.target_modules == NOTHING else config.target_modules
    config.target_parameters = [*others, *(f"{name}{WEIGHT}" for name in names)]
    config.rank_pattern = {**config.rank_pattern, **{f"{one}{WEIGHT}": r for one, r in config.rank_pattern.items()}}
    settings: Any = wrapped.peft_config
    settings[adapter] = config


def load(wrapped: Peft, names: Sequence[str], file: Path, adapter: str = "default") -> None:
    """`inject`, and the values of an adapter's file, which PEFT has loaded into the other layers."""
    inject(wrapped, names, adapter)
    set_peft_model_state_dict(wrapped, safe.load(file), adapter)


def take_out(config: Any, model: nn.Module) -> list[str]:
    """The linear layers whose weights are among the `target_parameters` of a LoRA; they are taken out of its settings,
    for `inject`."""
    if not getattr(config, "target_parameters", None):  # another method, too
        return []
    named = causal_lm(model).named_modules()
    linear = [name.removesuffix(".base_layer") for name, module in named if is_linear(module)]  # another adapter's too
    there = list(config.target_parameters)
    found = {one: _meant(one.removesuffix(WEIGHT), linear) for one in there if one.endswith(WEIGHT)}
    config.target_parameters = [one for one in there if not found.get(one)] or None
    layers = dict.fromkeys(name for names in found.values() for name in names)
    if layers and not config.target_modules:
        config.target_modules = NOTHING
    return list(layers)


def _meant(target: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]
