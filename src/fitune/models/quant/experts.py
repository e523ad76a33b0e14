"""Fused experts in few bits: packed one expert at a time while the files are read.

In: a model whose blocks keep their experts in parameters of three dimensions (experts, ., .), as transformers 5 does.
Out: the same with a stack of packed matrices (kernels/experts.py) in each parameter's place. The experts of one
parameter are put together by transformers' loader in main memory, and go from there to their device packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from fitune.core.options import QuantOptions
from fitune.models.kernels.experts import Stack, behind_interface, fused, pack, unpack
from fitune.models.quant import direct
from fitune.models.quant.base import Quantizer


def parameters(model: nn.Module) -> Iterator[str]:
    """Names of the fused parameters of experts that can be packed."""
    for path, module in model.named_modules():
        for name in fused(module):
            if isinstance(getattr(module, name, None), nn.Parameter) and (
                behind_interface(module) or direct.takes_stack(type(module), name)
            ):
                yield f"{path}.{name}" if path else name


def stacks(model: nn.Module) -> Iterator[tuple[str, Stack]]:
    """Every stack of packed experts by name."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Stack))


def empty(model: nn.Module, name: str, quantizer: Quantizer, options: QuantOptions) -> Stack:
    """The stack without values, on meta, that a fused parameter would become."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    count, outputs, inputs = getattr(module, leaf).shape
    transposed = module.is_transposed if behind_interface(module) else direct.is_turned(type(module), leaf)
    if transposed:
        outputs, inputs = inputs, outputs
    return quantizer.stack((count, outputs, inputs), options, transposed=transposed)


def put(model: nn.Module, name: str, stack: Stack) -> None:
    """Put a stack into a parameter's place."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    delattr(module, leaf)
    module.add_module(leaf, stack)
    stack._is_hf_initialized = True  # type: ignore[assignment]  # a mark of the loader's: nothing to initialize
    pack(module)


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every stack of a model, or of a part of one, a plain parameter."""
    for module in list(model.modules()):
        if any(isinstance(getattr(module, name, None), Stack) for name in fused(module)):
            unpack(module, dtype)


# ---- transformers' loader ----


class _Pack(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """What the loader does with a tensor that is to be in few bits: a fused parameter is packed and put into its place
    here, since the loader knows parameters alone; the rest is bitsandbytes' own."""

    def __init__(self, made: Mapping[str, Callable[[Any], Stack]], device: str, linear: ConversionOps) -> None:
        self.made, self.device, self.linear = made, device, linear

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **more: Any) -> Any:
        """See ConversionOps."""
        for name in [name for name in input_dict if name in self.made]:
            value = input_dict.pop(name)
            whole: Tensor = value[0] if isinstance(value, list) else value
            stack = self.made[name](model).to_empty(device=self.device)
            for number in range(stack.count):
                matrix = whole[number].T if stack.transposed else whole[number]
                stack.fill(number, matrix.contiguous())
            put(model, name, stack)
            missing_keys.discard(name)
        return self.linear.convert(input_dict, model=model, missing_keys=missing_keys, **more) if input_dict else {}


class _Packer:
    """What both of transformers' quantizers for bitsandbytes get."""

    quantization_config: Any

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        if param_name in self.quantization_config.experts:
            return True
        needed: bool = super().param_needs_quantization(model, param_name, **more)  # type: ignore[misc]  # likewise
        return needed

    def get_quantize_ops(self) -> ConversionOps:
        config = self.quantization_config
        return _Pack(config.experts, config.device, super().get_quantize_ops())  # type: ignore[misc]  # likewise

    def update_weight_conversions(self, weight_conversions: Sequence[Any], *model: Any) -> list[Any]:
        """Experts are put together in main memory. Older versions of transformers give no model."""
        leaves = {name.rpartition(".")[2] for name in self.quantization_config.experts}
        found: list[Any] = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[misc]  # likewise
        for one in found:
            if isinstance(one, WeightConverter) and {t.rpartition(".")[2] for t in one.target_patterns} & leaves:
                one.force_cpu = True
        return found


class _Reader4(_Packer, Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers has no types
    """4 bits."""


class _Reader8(_Packer, Bnb8BitHfQuantizer):  # type: ignore[misc]  # transformers has no types
    """8 bits."""


READERS = {"fitune-experts-4bit": _Reader4, "fitune-experts-8bit": _Reader8}
for _name, _reader in READERS.items():
    if _name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_name)(_reader)


def reading(settings: Any, names: Sequence[str], quantizer: Quantizer, options: QuantOptions, device: str) -> Any:
    """Let the loader pack experts too.

    Args:
        settings: a BitsAndBytesConfig for the linear layers; it is changed.
        names: of the fused parameters.
        quantizer, options: that pack them.
        device: where they are to lie.
    """

    def made(name: str) -> Callable[[Any], Stack]:
        return lambda model: empty(model, name, quantizer, options)

    settings.quant_method = "fitune-experts-8bit" if settings.load_in_8bit else "fitune-experts-4bit"
    settings.experts, settings.device = {name: made(name) for name in names}, device
    return settings


def was_read(model: Any) -> None:
    """Give a model that the loader packed the settings of bitsandbytes alone: whoever saves it, or puts a method on it,
    knows those."""
    settings: Any = getattr(model.config, "quantization_config", None)
    if getattr(settings, "experts", None):
        settings.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        del settings.experts, settings.device
