"""Quantized frozen weights: each quantizer one file, found by the name that users type. QLoRA is `lora` on `nf4`.

In: a model whose linear layers bitsandbytes holds, fused experts beside them (experts.py). Out: the same with one path
for training and evaluation; what its layers hold; the plain model that they stand for. bitsandbytes is imported only
where a model is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fitune.core.errors import ConfigError, did_you_mean
from fitune.core.options import QuantOptions
from fitune.models import attached, families
from fitune.models.interfaces import CausalLM
from fitune.models.kernel_faults import Fault
from fitune.models.kernels.experts import Stack
from fitune.models.kernels.frozen import Frozen
from fitune.models.quant import direct, experts, trust
from fitune.models.quant.stored import PackedLinear, Reading, Renaming, Stored

if TYPE_CHECKING:
    from fitune.models.quant.base import Quantizer
    from fitune.models.quant.stored import Packing

NAMES = ("int8", "nf4")
# as published by others, by the quant_method of their config.json: the file here
STORED = {
    "gptq": "gptq", "awq": "awq", "fp8": "fp8", "compressed-tensors": "compressed_tensors", "mxfp4": "mxfp4",
    "modelopt": "modelopt",
}  # fmt: skip
PLAIN = QuantOptions()


def find(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        ConfigError: there is none, or bitsandbytes is not installed.
    """
    if name in STORED:
        return packing(name)
    if name not in NAMES:
        raise ConfigError(f"unknown quantizer {name!r}", fix=did_you_mean(name, NAMES))
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"quant {name} needs bitsandbytes, which is not installed", fix="pip install bitsandbytes")
    try:
        found: Quantizer = import_module(f"fitune.models.quant.{name}").QUANTIZER
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"quant {name} needs bitsandbytes, which cannot be imported",
            received=" ".join(str(error).split())[:300],
            fix="pip install --force-reinstall bitsandbytes; without it --quant none works",
        ) from error
    return found


def packing(name: str) -> Packing:
    """How a folder of that quant_method is packed."""
    found: Packing = import_module(f"fitune.models.quant.{STORED[name]}").QUANTIZER
    return found


def head_name(model: CausalLM) -> list[str]:
    """The output head's name, which is never quantized, in a list; empty where there is no head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head and name]


class Packed(QuantOptions):
    """How a folder that holds a quantized model is quantized. Which of its layers are is what transformers' loader
    makes of the folder's own list, which names parts of other models too; but the head, which is made plain."""

    left_out: list[str] | None = None
    """llm_int8_skip_modules of its config; None: the loader's own choice."""


def planned(model: CausalLM, options: QuantOptions) -> list[str]:
    """Linear layers of a plain model that would be quantized, or that are so in its folder.

    Args:
        model: weights are not needed.
        options: the settings.

    Raises:
        ConfigError: a name in `skip` matches no linear layer.
    """
    if options.name == "none":
        return []
    linear = [name for name, _ in _linear(model)]
    if isinstance(options, Stored):
        there = [] if packing(options.name).of_experts else _as_stored(linear, options)
        return [name for name in there if name not in head_name(model)]
    if isinstance(options, Packed):
        left = HfQuantizer.get_modules_to_not_convert(model, options.left_out, model._keep_in_fp32_modules)
        return [name for name in linear if should_convert_module(name, left) and name not in head_name(model)]
    skipped = set(head_name(model))
    if model.config.model_type not in families.TABLE:  # those are tried in few bits, and read no weight that way
        read = direct.read_by_itself(model)
        skipped |= {name for name in linear if name.rpartition(".")[2] in read}
    either = [*linear, *experts.parameters(model)]
    for wanted in options.skip:
        hits = set(_named(either, wanted))
        if not hits:
            leaves = {name.rpartition(".")[2] for name in either}
            raise ConfigError(
                f"quant.skip: {wanted!r} matches no linear layer and no fused experts of this model",
                expected=", ".join(sorted(leaves)),
                fix=did_you_mean(wanted, leaves),
            )
        skipped |= hits
    return [name for name in linear if name not in skipped]


def _named(names: Iterable[str], wanted: str) -> list[str]:
    """Those of which this is the name, or a part of it between dots."""
    return [name for name in names if f".{wanted}." in f".{name}."]


def planned_experts(model: CausalLM, options: QuantOptions) -> list[str]:
    """Fused parameters of experts of a plain model that would be quantized. In a folder that bitsandbytes packed they
    are plain.

    Args:
        model: weights are not needed.
        options: the settings.
    """
    if options.name == "none" or isinstance(options, Packed):
        return []
    names = list(experts.parameters(model))
    if isinstance(options, Stored):
        return _as_stored(names, options) if packing(options.name).of_experts else []
    skipped = {name.rpartition(".")[0] for wanted in options.skip for name in _named(names, wanted)}
    return [name for name in names if name.rpartition(".")[0] not in skipped]  # a module's experts stay together


def without_experts(model: CausalLM, options: QuantOptions) -> QuantOptions:
    """The same settings, for a folder that transformers is to read: it knows no packed experts."""
    return options.model_copy(update={"skip": [*options.skip, *planned_experts(model, options)]})


def left_plain(model: CausalLM, options: QuantOptions) -> str:
    """What a folder that is written in few bits has in full beside its head, for a message; empty where it is nothing.

    Args:
        model: plain; weights are not needed.
        options: the settings.
    """
    names = planned_experts(model, options)
    if not names:
        return ""
    weights = sum(model.get_parameter(name).numel() for name in names)
    return (
        f"{len(names)} parameters of fused experts, {weights:,} weights ({names[0]}, ...), are written in full: "
        "transformers reads none in few bits; --quant on train, chat and eval packs them while a plain model is read"
    )


def _as_stored(linear: Sequence[str], options: Stored) -> list[str]:
    """Of these layers, or fused experts, those that a folder holds packed, its output head with them."""
    if options.layers is not None:
        there = set(options.layers)
        return [name for name in linear if name in there]
    left = packing(options.name).left_out(options.values)
    patterns = [re.compile(one.removeprefix("re:")) for one in left if one.startswith("re:")]
    return [
        name
        for name in linear
        if not any(f".{one}." in f".{name}." for one in left) and not any(one.match(name) for one in patterns)
    ]


def reading(options: Stored) -> QuantizationConfigMixin:
    """What transformers' loader is given for a folder that others packed."""
    how = packing(options.name)

    def lay_out(model: Any) -> None:
        if not how.of_experts:
            _lay_out(model, _as_stored([name for name, _ in _linear(model)], options), options)
        _lay_out_experts(model, planned_experts(model, options), options)

    return Reading(lay_out, how.renamed)


def _linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]


def is_quantized(module: object) -> TypeGuard[Frozen]:
    """Is this a linear layer in few bits?"""
    return hasattr(module, "source_cls") and isinstance(module, Frozen)


def layers(model: nn.Module) -> Iterator[tuple[str, Frozen]]:
    """Every quantized layer by name."""
    yield from ((name, module) for name, module in model.named_modules() if is_quantized(module))


def packed(model: nn.Module) -> Iterator[tuple[str, Frozen | Stack]]:
    """Everything in few bits by name: linear layers, and stacks of experts."""
    yield from layers(model)
    yield from experts.stacks(model)


def adopt(model: CausalLM, name: str, compute: torch.dtype) -> None:
    """Give every layer of bitsandbytes in a model the one path, by kernels that were found right for its layers."""
    quantizer = find(name)
    for path, module in list(model.named_modules()):
        if isinstance(module, quantizer.base) and type(module.weight) is nn.Parameter and name not in STORED:
            _replace(model, path, _unpacked(module))  # a head tied to an embedding, which is never packed
        elif isinstance(module, quantizer.base):
            quantizer.adopt(module, compute)
            # the loader has put the weight behind the bias; "the last tensors" are to be those of the plain model
            module._parameters["bias"] = module._parameters.pop("bias")
    tried = [layer for _, layer in layers(model)]
    for _, stack in experts.stacks(model):
        stack.adopt(compute)
        tried += stack.checked()
    known = attached.of(model)
    known.quantizer, known.faults = name, trust.check(tried, compute)
    for head in head_name(model):  # somebody's folder may hold a quantized one: here it is always plain
        if is_quantized(layer := model.get_submodule(head)):
            _replace(model, head, plain_layer(layer, compute))


def _unpacked(layer: nn.Linear) -> nn.Module:
    """The plain layer that a quantized one really is, with the same tensors."""
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight, made.bias = layer.weight, layer.bias
    return made


def faults(model: CausalLM) -> list[Fault]:
    """The kernels that were found wrong for the packed layers of a causal LM when it was loaded."""
    return attached.of(model).faults


def empty(model: CausalLM, options: QuantOptions) -> None:
    """Make the linear layers of a model on meta what they would be once loaded quantized, without values."""
    fused = planned_experts(model, options)
    _lay_out(model, planned(model, options), options)
    _lay_out_experts(model, fused, options)
    if not isinstance(options, Stored):
        setattr(model, "is_loaded_in_8bit" if options.name == "int8" else "is_loaded_in_4bit", True)


def empty_inside(model: CausalLM, options: QuantOptions, start: str) -> None:
    """Make layers of a model on meta, whose names start so, what they would be once loaded quantized."""
    _lay_out(model, [name for name in planned(model, options) if name.startswith(start)], options)


def _lay_out(model: CausalLM, names: Sequence[str], options: QuantOptions) -> None:
    quantizer = find(options.name)
    for name in names:
        layer = model.get_submodule(name)
        made = quantizer.empty(layer, options)
        made.bias, made.source_cls = layer.bias, type(layer)
        _replace(model, name, made)


def _lay_out_experts(model: CausalLM, names: Sequence[str], options: QuantOptions) -> None:
    for name in names:
        experts.put(model, name, experts.empty(model, name, find(options.name), options))


def name_of(model: CausalLM) -> str:
    """How a causal LM is quantized: none, int8, nf4."""
    return attached.of(model).quantizer


def constants(layer: Frozen | Stack) -> list[Tensor]:
    """The scales of a quantized layer, or of experts."""
    if isinstance(layer, (PackedLinear, Stack)):
        return list(layer.buffers(recurse=False))
    name = next(name for name in NAMES if find_spec("bitsandbytes") and isinstance(layer, find(name).base))
    return find(name).constants(layer)


def keep_apart(layer: Frozen) -> None:
    """Keep at a quantized layer how its weight is packed: the weight may be taken away, and come back as bytes."""
    weight, held = layer.weight, cast(Any, layer)
    if hasattr(weight, "quant_state"):
        held.quant_state = weight.quant_state
    elif getattr(held.state, "SCB", None) is None:
        held.state.SCB = weight.SCB


def take_over(layer: Frozen, other: Frozen) -> None:
    """Give a quantized layer the packed weight of another, and how it is packed."""
    layer.weight = other.weight
    for name in ("quant_state", "state"):
        if name in vars(other):
            setattr(layer, name, vars(other)[name])
    if hasattr(layer.weight, "module"):
        layer.weight.module = layer


def numel(parameter: Tensor) -> int:
    """How many weights a parameter holds, packed or not."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "stands_for", parameter.numel()))


def plain_layer(layer: Frozen, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The plain linear layer that a quantized one stands for, of the class it was made from."""
    weight, bias = layer.plain_weight(dtype), layer.bias
    with torch.device("meta"):
        made: nn.Module = (
            Conv1D(weight.shape[0], weight.shape[1])
            if layer.source_cls is Conv1D
            else nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        )
    made.weight = nn.Parameter(weight.T.contiguous() if layer.source_cls is Conv1D else weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return made.train(layer.training)


def dequantize(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Make every quantized layer of a model, or of a part of one, a plain one."""
    for name, layer in list(layers(model)):
        _replace(model, name, plain_layer(layer, dtype))
    experts.dequantize(model, dtype)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def forget(model: CausalLM) -> None:
    """A model whose layers are plain again is an ordinary one, to transformers and PEFT too."""
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # and its files have no packed weights to unpack; transformers cannot turn that around when it saves
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        one
        for one in conversions
        if not isinstance(one, Renaming)
        and not any(type(op).__name__.startswith("Bnb") for op in getattr(one, "operations", []))
    ] or None
    attached.of(model).quantizer = "none"
