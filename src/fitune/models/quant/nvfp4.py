"""NVFP4: E2M1 numbers, an FP8 scale for each 16 along the inputs, and one float32 scale for the whole weight.

Two numbers a byte, (out, in / 2) uint8, the low half first; scales (out, in / 16) float8_e4m3fn. compressed-tensors
(`nvfp4-pack-quantized`) stores what scales are divided by, weight_global_scale (1,); NVIDIA's ModelOpt what they are
multiplied by, weight_scale_2 (). 4.5 bits a weight. Both libraries make them plain as here (compressed-tensors 0.20
`compressors/nvfp4`, nvidia-modelopt 0.47 `qtensor/nvfp4_tensor.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fitune.models.quant.fp8 import FLOAT8
from fitune.models.quant.stored import PackedLinear, Parts, Renamed, Stored, e2m1, refuse

BLOCK = 16
BYTES = 0.5 + 1 / BLOCK  # of a weight


class Nvfp4Linear(PackedLinear):
    """See the module's text; what all such files share."""

    weight_scale: Tensor

    def block_scales(self, first: int, last: int) -> Tensor:
        """(rows, in / 16), float32."""
        raise NotImplementedError

    def rows(self, first: int, last: int) -> Tensor:
        """See PackedLinear."""
        numbers = e2m1(self.weight[first:last]).view(last - first, -1, BLOCK)
        return (numbers * self.block_scales(first, last)[..., None]).flatten(1)


class Divided(Renamed, Nvfp4Linear):
    """compressed-tensors'."""

    packed = "weight_packed"
    weight_packed: Tensor
    weight_global_scale: Tensor

    def block_scales(self, first: int, last: int) -> Tensor:
        """See Nvfp4Linear."""
        return self.weight_scale[first:last].float() / self.weight_global_scale.float()


class Multiplied(Nvfp4Linear):
    """ModelOpt's."""

    packed = "weight"
    weight_scale_2: Tensor

    def block_scales(self, first: int, last: int) -> Tensor:
        """See Nvfp4Linear."""
        return self.weight_scale[first:last].float() * self.weight_scale_2.float()


def parts(kind: type[Nvfp4Linear], inputs: int, outputs: int, options: Stored) -> Parts:
    """The tensors of a layer of one of these kinds.

    Raises:
        ModelError: its inputs are no whole number of blocks.
    """
    if inputs % BLOCK:
        raise refuse(options.values, f"a layer of {outputs} x {inputs}", f"inputs that {BLOCK} divides")
    whole = ("weight_global_scale", (1,)) if kind is Divided else ("weight_scale_2", ())
    return {
        kind.packed: ((outputs, inputs // 2), torch.uint8),
        "weight_scale": ((outputs, inputs // BLOCK), FLOAT8),
        whole[0]: (whole[1], torch.float32),
    }
