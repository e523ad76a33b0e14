"""New layers at the tail (LLaMA Pro's block expansion, Wu et al. 2024, arXiv:2401.02415, or a small residual MLP).

In: a model. Out: the same with N new transformer blocks, behind the last one or spread over the depth, each a copy of
the block before it whose two output layers are zero: the residual stream passes unchanged, so training begins at the
base exactly, and the result is a normal model with more layers. Or, with kind=mlp, h + up(silu(down(h))) behind the
final norm, with up = 0.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.core.errors import ConfigError
from fitune.core.options import TailOptions
from fitune.models import quant
from fitune.models.families import Family
from fitune.models.interfaces import CausalLM
from fitune.models.methods.base import Method, head_names, train_only

INNER = "tail"  # the MLP's place in the final norm's


class ResidualMLP(nn.Module):
    """(..., W) to (..., W): x + up(silu(down(x))) behind a norm; zero change at the start."""

    def __init__(self, norm: nn.Module, model_width: int, width: int) -> None:
        super().__init__()
        self.norm = norm
        self.down, self.up = nn.Linear(model_width, width), nn.Linear(width, model_width)
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """See the class's text."""
        x = self.norm(x)
        change: Tensor = self.up(nn.functional.silu(self.down(x.to(self.down.weight.dtype))))
        return x + change.to(x.dtype)


class Tail(Method):
    """See the module's text."""

    name = "tail"
    trains = "new zero-initialised blocks behind the last one (or interleaved), or a residual MLP (tail.kind=mlp)"
    options = "tail"
    default_lr = 2e-4
    why_lr = "the new layers start at zero and the base stays (LLaMA Pro uses 2e-4)"

    def reads_weights(self, config: RunConfig) -> bool:
        """New blocks are copies."""
        return config.tail.kind != "mlp"

    def attach(self, model: CausalLM, family: Family, config: RunConfig) -> CausalLM:
        """See Method.attach."""
        expected = self.expected(model, family, config)
        options = config.tail
        if options.kind == "mlp":
            parent, _, leaf = family.final_norm.rpartition(".")
            holder = model.get_submodule(parent)
            width = options.width or _width(model) // 4
            wrapped = ResidualMLP(getattr(holder, leaf), _width(model), width).to(_device(model))
            setattr(holder, leaf, wrapped)
        else:
            grow(
                model,
                family,
                new_places(len(family.block_list(model)), options.blocks, interleaved=options.interleaved),
            )
        train_only(model, expected)
        return model

    def expected(self, model: CausalLM, family: Family, config: RunConfig) -> dict[str, int]:
        """The new blocks' parameters, each as many as the block that it copies; or both layers of the MLP.

        Raises:
            ConfigError: a block that would not pass the residual stream unchanged.
        """
        options = config.tail
        found: dict[str, int] = {}
        if options.kind == "mlp":
            width = options.width or _width(model) // 4
            big = _width(model)
            for name, size in (
                ("down.weight", big * width),
                ("down.bias", width),
                ("up.weight", big * width),
                ("up.bias", big),
            ):
                found[f"{family.final_norm}.{name}"] = size
        else:
            if getattr(model.config, "apply_residual_connection_post_layernorm", False):
                raise ConfigError(
                    "tail: in this model the residual stream passes a norm in each block, so a new block would not be "
                    "the identity",
                    fix="--tail.kind mlp, or --method lora",
                )
            if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
                raise ConfigError(
                    "tail: this model scales its attention by the layer's number, so a longer one is another model",
                    fix="--tail.kind mlp, or --method lora",
                )
            family.whole("tail")
            blocks = family.block_list(model)
            for place, copied in _places(model, family, options):
                for name, parameter in blocks[copied].named_parameters():
                    found[f"{family.blocks}.{place}.{name}"] = quant.numel(parameter)
        if options.head:
            head = model.get_output_embeddings()
            found |= {
                name: head.get_parameter(name.rpartition(".")[2]).numel() for name in head_names(model, "tail.head")
            }
        return found

    def merge_problem(self, model: CausalLM, family: Family, config: RunConfig) -> str | None:
        """An MLP behind the final norm has no place in a plain model."""
        return "a plain model has no place for an MLP behind its final norm" if config.tail.kind == "mlp" else None


def _places(model: CausalLM, family: Family, options: TailOptions) -> list[tuple[int, int]]:
    return new_places(len(family.block_list(model)), options.blocks, interleaved=options.interleaved)


def new_places(there: int, new: int, *, interleaved: bool) -> list[tuple[int, int]]:
    """(place in the grown list, old block that is copied) of each new block, in order."""
    if not interleaved:
        return [(there + n, there - 1) for n in range(new)]
    after = [round((n + 1) * there / new) - 1 for n in range(new)]  # the last one ends the list
    return [(old + 1 + n, old) for n, old in enumerate(after)]


def grow(model: CausalLM, family: Family, places: list[tuple[int, int]]) -> None:
    """Put the new blocks in and number all of them; the config says how many there are."""
    blocks = family.block_list(model)
    old = list(blocks)
    # the copies share the config: what is switched there (the attention of flat batches) must reach them too
    made = [deepcopy(old[copied], {id(model.config): model.config}) for _, copied in places]
    for block in made:
        quant.dequantize(block)  # what is new is trained, so it is plain
        for name in (family.out, family.mlp_out):
            for parameter in block.get_submodule(name).parameters():
                with torch.no_grad():
                    parameter.zero_()
    order = list(old)
    for (place, _), block in zip(places, made, strict=True):
        order.insert(place, block)
    del blocks[:]
    blocks.extend(order)
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]  # where its keys and values lie in a cache
    for name, values in _per_layer(model.config, len(old)).items():
        grown = list(values)
        for place, copied in places:
            grown.insert(place, values[copied])
        setattr(model.config, name, grown)
    model.config.num_hidden_layers = len(order)


def _per_layer(config: Any, layers: int) -> dict[str, list[Any]]:
    """The config's lists that say something of each layer, such as layer_types."""
    return {name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers}


def _width(model: CausalLM) -> int:
    return int(model.config.hidden_size)


def _device(model: CausalLM) -> torch.device:
    return next(model.parameters()).device


METHOD = Tail()
