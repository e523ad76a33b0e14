"""MXFP4 (OCP Microscaling Formats 1.0), as gpt-oss is published: fused experts in 4.25 bits.

NAME_blocks (experts, out, in / 32, 16) uint8 holds two numbers a byte, the low half first; NAME_scales (experts, out,
in / 32) uint8. A weight is an E2M1 value x 2^(scale - 127). Attention, embeddings, router and biases are plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fitune.core.options import QuantOptions
from fitune.models.kernels.experts import Stack
from fitune.models.quant.stored import PIECE, PackedLinear, Packing, Parts, Renaming, Stored, e2m1, refuse

BLOCK = 32
MEAN = 127  # the scale that stands for 1


class Mxfp4Stack(Stack):
    """See the module's text."""

    scales: Tensor

    def matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        """See Stack; some rows at a time."""
        blocks, scales = self.weight.data[number], self.scales[number]
        made = torch.empty(self.outputs, self.inputs, dtype=dtype, device=blocks.device)
        step = max(1, PIECE // self.inputs)
        for first in range(0, self.outputs, step):
            numbers = e2m1(blocks[first : first + step])
            powers = scales[first : first + step].int() - MEAN
            made[first : first + step] = torch.ldexp(numbers, powers[..., None]).flatten(1)
        return made


class Mxfp4(Packing):
    """See the module's text."""

    name = "mxfp4"
    base = PackedLinear  # of which such a model has none
    marks = ("_blocks",)
    of_experts = True
    renamed = (Renaming(r"\.(\w+_proj)_blocks$", r".\1.weight"), Renaming(r"\.(\w+_proj)_scales$", r".\1.scales"))

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        left = values.get("modules_to_not_convert")
        if left is not None and not (isinstance(left, list) and all(isinstance(one, str) for one in left)):
            raise refuse(values, "modules_to_not_convert", "names, or null")

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing."""
        return list(values.get("modules_to_not_convert") or [])

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        raise refuse(options.values, "linear layers", "fused experts")

    def stack(self, shape: tuple[int, int, int], options: QuantOptions, *, transposed: bool) -> Stack:
        """See Quantizer."""
        assert isinstance(options, Stored)
        count, outputs, inputs = shape
        if inputs % BLOCK:
            raise refuse(options.values, f"experts of {outputs} x {inputs}", f"inputs that {BLOCK} divides")
        made = Mxfp4Stack(*shape, transposed=transposed)
        made.hold(
            torch.empty(count, outputs, inputs // BLOCK, BLOCK // 2, dtype=torch.uint8, device="meta"),
            scales=torch.empty(count, outputs, inputs // BLOCK, dtype=torch.uint8, device="meta"),
        )
        return made

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """Half a byte, and one for 32."""
        return 0.5 + 1 / BLOCK


QUANTIZER = Mxfp4()
