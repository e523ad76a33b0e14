"""A method put on a model, and what it trains by name."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.models import attached, families, methods
from fitune.models.interfaces import CausalLM, causal_lm, peft_of
from fitune.models.kernels import low_rank, plain
from fitune.models.methods import new_tokens
from fitune.models.precision import DTYPES


def attach(model: CausalLM, config: RunConfig) -> CausalLM:
    """The model with the config's method on it; its settings are kept, so that it can be saved and turned off.

    Args:
        model: the base model; rows of new tokens, where it has some, are trained too.
        config: names the method, and has its settings.

    Raises:
        ConfigError: the settings do not fit the model.
    """
    method = methods.find(config.method)
    torch.manual_seed(config.seed)  # the method's random start is part of the seed
    model = method.attach(model, families.of(model), config)
    if peft_of(model) is None:
        attached.of(model).method = {"method": method.name, **_options(method, config)}
    new_tokens.train_rows(causal_lm(model))
    _cast_trained(model, DTYPES[config.trainable_dtype])
    _no_copies(model)
    plain.keep_less(model)
    attached.of(model).copies = low_rank.fuse(model).whole
    return model


class _CastsInput(Protocol):
    """A layer of PEFT."""

    cast_input_dtype_enabled: bool


def _no_copies(model: nn.Module) -> None:
    """PEFT's layers cast their input to the dtype of their weights, float32, and autocast casts it back: a copy of the
    input for each adapted layer, with the values that the input has anyway. They take it as it is."""
    if attached.compute_dtype(model) != torch.float32:
        for module in model.modules():
            # DoRA's magnitudes would be of a norm computed in 16 bits
            layer = cast(_CastsInput, module)
            if hasattr(layer, "cast_input_dtype_enabled") and not getattr(layer, "lora_magnitude_vector", None):
                layer.cast_input_dtype_enabled = False


def _cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Methods leave what they train in float32; where less was asked for, the rest of a norm follows."""
    if dtype == torch.float32:
        return
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for parameter in own:
            if parameter.requires_grad or (parameter.dtype == torch.float32 and any(p.requires_grad for p in own)):
                parameter.data = parameter.data.to(dtype)


def _options(method: methods.Method, config: RunConfig) -> dict[str, object]:
    return {method.options: getattr(config, method.options).model_dump(mode="json")} if method.options else {}


def row_sizes(model: nn.Module) -> dict[str, int]:
    """Names and sizes of the rows of new tokens, as the whole model calls them."""
    mine = {id(p): p.numel() for p in new_tokens.rows(causal_lm(model)).values()}
    return {name: mine[id(p)] for name, p in model.named_parameters() if id(p) in mine}


def trained_names(model: nn.Module) -> list[str]:
    """Of the method's trainable parameters."""
    return list(parameters_of(model))


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The method's trainable parameters by name; rows of new tokens are kept apart."""
    apart = row_sizes(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad and name not in apart}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The values of the method's trainable parameters by name, on the CPU."""
    return {name: p.detach().cpu().contiguous() for name, p in parameters_of(model).items()}
