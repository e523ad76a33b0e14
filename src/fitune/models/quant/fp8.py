"""FP8 with block scales, as DeepSeek-V3 (arXiv:2412.19437, section 3.3) and Qwen3's FP8 models are published.

weight (out, in) is float8_e4m3fn; weight_scale_inv, one float32 for each block of 128 x 128, or one for all, is what
its values are multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fitune.core.options import QuantOptions
from fitune.models.quant.stored import PackedLinear, Packing, Parts, Stored, refuse

FLOAT8 = torch.float8_e4m3fn


def scaled(numbers: Tensor, scales: Tensor, block: Sequence[int], first: int) -> Tensor:
    """(rows, in), float32: rows of a weight from `first` on, (rows, in), whose blocks have scales."""
    rows = torch.arange(first, first + len(numbers), device=numbers.device) // block[0]
    wide = scales[rows].float().repeat_interleave(block[1], dim=1)[:, : numbers.shape[1]]
    return numbers.float() * wide


class Fp8Linear(PackedLinear):
    """See the module's text."""

    packed = "weight"
    weight_scale_inv: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """See PackedLinear."""
        if self.weight_scale_inv.numel() == 1:
            found: Tensor = self.weight[first:last].float() * self.weight_scale_inv.float()
            return found
        return scaled(self.weight[first:last], self.weight_scale_inv, self.values["weight_block_size"], first)


class Fp8(Packing):
    """See the module's text."""

    name = "fp8"
    base = Fp8Linear
    marks = (".weight_scale_inv",)
    spare = (".activation_scale", ".input_scale")

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        if values.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise refuse(values, f"fmt {values['fmt']!r}", "e4m3")
        size = values.get("weight_block_size")
        if size is not None and not (
            isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        ):
            raise refuse(values, f"weight_block_size {size!r}", "two numbers, or null")

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing."""
        return list(values.get("modules_to_not_convert") or [])

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        size = options.values.get("weight_block_size")
        scales = () if size is None else (-(-outputs // size[0]), -(-inputs // size[1]))
        return {"weight": ((outputs, inputs), FLOAT8), "weight_scale_inv": (scales, getattr(torch, options.scales))}

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """One."""
        return 1.0


QUANTIZER = Fp8()
