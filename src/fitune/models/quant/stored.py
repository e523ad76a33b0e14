"""Checkpoints that come quantized by other tools: packed tensors are loaded as they are, and made plain for a product.

In: `quantization_config` of a folder, and the names in its files. Out: linear layers that hold the tensors of the files
under their own names, read by transformers' loader, and the plain weight that they stand for, in torch alone. Packings
are files beside this one: gptq, awq, compressed_tensors, fp8. Only weights are looked at: where a format quantizes
activations too, they stay in the run's precision, as in training they must.

Shapes: weight (out, in).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fitune.core.errors import ModelError, shorten
from fitune.core.options import QuantOptions
from fitune.models.kernels.frozen import Frozen
from fitune.models.quant.base import Quantizer, sizes

PIECE = 2**20  # weights that are unpacked at once: in 32 bits they are there beside the plain weight
READER = "fitune-stored"  # what transformers knows the loader of these layers by

Parts = dict[
    str, tuple[Sequence[int], torch.dtype]
]  # of a layer: the shape and dtype of each tensor, the first is packed


class Stored(QuantOptions):
    """How a folder is packed by another tool.

    name: its quant_method, which no user chooses, so that it is none of the settings' own. values: the rest of
    quantization_config. layers: those that its files have packed; None: only the config is there. scales: dtype of the
    scales in its files.
    """

    name: Any = "none"
    values: dict[str, Any] = Field(default_factory=dict)
    layers: list[str] | None = None
    scales: str = "float16"


class PackedLinear(Frozen, nn.Linear):
    """A linear layer that holds the tensors of its packing: the packed values as a frozen parameter, the rest as
    buffers."""

    packed: ClassVar[str]  # the name of the first
    source_cls = nn.Linear
    compute = torch.float32

    def __init__(self, inputs: int, outputs: int, parts: Parts, values: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.values = inputs, outputs, dict(values)
        for name, (shape, dtype) in parts.items():
            empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
            if name == self.packed:
                self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            else:
                self.register_buffer(name, empty)
        self.register_parameter("bias", None)

    def rows(self, first: int, last: int) -> Tensor:
        """(last - first, in), float32: what these rows stand for."""
        raise NotImplementedError

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen; some rows at a time."""
        made = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        step = max(1, PIECE // self.in_features)
        for first in range(0, self.out_features, step):
            last = min(self.out_features, first + step)
            made[first:last] = self.rows(first, last)
        return made


class Renamed(PackedLinear):
    """One whose packed values have another name than `weight`."""

    @property
    def weight(self) -> Any:  # type: ignore[override]  # a tensor of another name
        """Packed."""
        return getattr(self, self.packed)


class Renaming(WeightRenaming):  # type: ignore[misc]  # transformers has no types
    """A name in the files of a packing to that in a model, by a pattern; a model that is saved forgets it."""


class Packing(Quantizer):
    """A format in which others publish quantized models."""

    marks: ClassVar[tuple[str, ...]]  # how the name of a tensor ends that only a packed layer has
    spare: ClassVar[tuple[str, ...]] = ()  # ends of names of tensors that are about activations
    of_experts: ClassVar[bool] = False  # it packs fused experts, and no linear layers
    renamed: ClassVar[tuple[Renaming, ...]] = ()  # names of tensors in the files that are others in a model

    def check(self, values: Mapping[str, Any]) -> None:
        """Raises ModelError for settings that are not understood."""
        raise NotImplementedError

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """Names, or parts of names, of linear layers that are plain, where only the config is there."""
        raise NotImplementedError

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """The tensors of a layer."""
        raise NotImplementedError

    def empty(self, layer: Any, options: QuantOptions) -> Any:
        """See Quantizer."""
        assert isinstance(options, Stored)
        inputs, outputs = sizes(layer)
        made: Any = self.base
        return made(inputs, outputs, self.parts(inputs, outputs, options), options.values)

    def adopt(self, layer: Any, compute: torch.dtype) -> None:
        """See Quantizer."""
        layer.compute = compute
        layer.weight.stands_for = layer.in_features * layer.out_features
        layer.weight.requires_grad_(False)


ORIGINAL = "take the original model, with --quant nf4 or int8 if it is to be small"


def refuse(values: Mapping[str, Any], what: str, expected: str, fix: str = ORIGINAL) -> ModelError:
    """The error for a quantization_config that is not understood."""
    return ModelError(
        f"quantization_config: {what}",
        received=shorten(json.dumps(values, default=str, sort_keys=True), 600),
        expected=expected,
        fix=fix,
    )


def marlin(values: Mapping[str, Any], instead: str) -> ModelError:
    """The error for weights in the order in which a CUDA kernel wants them (Frantar et al. 2024, arXiv:2408.11743)."""
    what = "weights that were put into the order of the Marlin kernel, which inference servers do by themselves"
    return refuse(values, what, f"format {instead}", f"take the same model in format {instead}; or {ORIGINAL[5:]}")


def fields(packed: Tensor, bits: int) -> Tensor:
    """The unsigned numbers of packed ints, the lowest bits first: (..., n) int32 to (..., n, 32 / bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    found: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return found


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # one bit of sign, two of exponent, one behind the point


def e2m1(packed: Tensor) -> Tensor:
    """(..., n) bytes to (..., 2 n) float32: the values of the numbers in their halves, the low half first."""
    values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)
    return pairs.index_select(0, packed.reshape(-1).int()).view(*packed.shape[:-1], -1)


def whole(values: Mapping[str, Any], name: str, allowed: Iterable[int]) -> int:
    """A setting that is one of these numbers.

    Raises:
        ModelError: it is not.
    """
    found, known = values.get(name), list(allowed)
    if type(found) is not int or found not in known:
        raise refuse(values, f"{name} {shorten(found, 40)}", f"{name} one of {', '.join(map(str, known))}")
    return found


# ---- transformers' loader ----


class Reading(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """What transformers' loader is given.

    Args:
        lay_out: makes the linear layers and experts of a model on meta what the files hold.
        renamed: names of their tensors that are others in the model.
    """

    def __init__(self, lay_out: Callable[[Any], None], renamed: Sequence[Renaming]) -> None:
        self.quant_method, self.lay_out = READER, lay_out  # type: ignore[assignment]  # its own name, as it is registered
        self.renamed = list(renamed)


class Reader(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """transformers' seam for quantized layers: the model gets them before its files are read."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: object) -> None:
        self.quantization_config.lay_out(model)

    def get_weight_conversions(self) -> list[Renaming]:
        """Names that are others in the files."""
        found: list[Renaming] = self.quantization_config.renamed
        return found

    def is_serializable(self) -> bool:
        """fitune saves adapters, and merged models that are plain."""
        return False

    @property
    def is_trainable(self) -> bool:
        """What is on it."""
        return True


if READER not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(READER)(Reader)
