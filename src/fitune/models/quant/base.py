"""What every quantizer offers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from fitune.core.options import QuantOptions
from fitune.models.kernels.experts import Stack
from fitune.models.kernels.frozen import Frozen


def sizes(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a plain linear layer, GPT-2's kind too."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, nn.Linear) else (rows, columns)


class Quantizer:
    """Keeps the frozen weights of linear layers in few bits.

    transformers' loader quantizes each weight as it is read, so that never more than one is there in full;
    bitsandbytes holds the packed weights. `adopt` gives each layer fitune's one path (see kernels/frozen.py).
    """

    name: ClassVar[str]
    base: ClassVar[type[nn.Linear]]  # bitsandbytes' class of such a layer

    def settings(self, options: QuantOptions, compute: torch.dtype, skip: list[str]) -> QuantizationConfigMixin:
        """What transformers' loader is given: a BitsAndBytesConfig.

        Args:
            options: the run's.
            compute: dtype of the products.
            skip: names of layers that stay as they are.
        """
        raise NotImplementedError

    def adopt(self, layer: nn.Module, compute: torch.dtype) -> None:
        """Give a layer of bitsandbytes the one path."""
        raise NotImplementedError

    def make(self, weight: Tensor, options: QuantOptions, device: torch.device) -> Frozen:
        """A quantized layer from a plain weight (out, in), which computes in float32."""
        raise NotImplementedError

    def empty(self, layer: Any, options: QuantOptions) -> Any:
        """The quantized layer that a linear one on meta would become, without values; not yet adopted."""
        raise NotImplementedError

    def stack(self, shape: tuple[int, int, int], options: QuantOptions, *, transposed: bool) -> Stack:
        """Experts in few bits, on meta, without values.

        Args:
            shape: (experts, out, in).
            options: the run's.
            transposed: the plain parameter is (experts, in, out).
        """
        raise NotImplementedError

    def constants(self, layer: Frozen) -> list[Tensor]:
        """The scales of a layer."""
        raise NotImplementedError

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """Weight and scales."""
        raise NotImplementedError
