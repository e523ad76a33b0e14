"""AWQ's files (Lin et al. 2023, arXiv:2306.00978), as AutoAWQ's `gemm` writes them.

qweight (in, out / 8) int32 and qzeros (groups, out / 8) hold eight numbers of 4 bits in an int, whose n-th lowest is
that of column ORDER[n] of the eight; scales (groups, out). A weight is scale x (number - zero point).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fitune.core.options import QuantOptions
from fitune.models.quant.stored import PIECE, Packing, Parts, Renamed, Stored, fields, marlin, refuse, whole

BITS, PER = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def numbers(packed: Tensor) -> Tensor:
    """(rows, n) int32 to (rows, 8 n), in the order of the columns."""
    found = fields(packed, BITS)
    return found[..., [ORDER.index(column) for column in range(PER)]].flatten(1)


class AwqLinear(Renamed):
    """See the module's text."""

    packed = "qweight"
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen; some inputs at a time."""
        size = self.in_features // len(self.scales)
        zeros = numbers(self.qzeros).float()
        made = torch.empty(self.in_features, self.out_features, dtype=dtype, device=self.weight.device)
        step = max(1, PIECE // self.out_features)
        for first in range(0, self.in_features, step):
            some = numbers(self.qweight[first : first + step])
            groups = torch.arange(first, first + len(some), device=some.device) // size
            made[first : first + len(some)] = (some.float() - zeros[groups]) * self.scales[groups].float()
        weight: Tensor = made.T
        return weight


class Awq(Packing):
    """See the module's text."""

    name = "awq"
    base = AwqLinear
    marks = (".qweight",)

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        whole({"bits": values.get("bits", values.get("w_bit")), **values}, "bits", (BITS,))
        version = str(values.get("version", "gemm")).lower()
        if "marlin" in version:
            raise marlin(values, "gemm")
        if version != "gemm":
            raise refuse(values, f"version {version!r}", "gemm")
        if not values.get("zero_point", True):
            raise refuse(values, "no zero points", "zero_point: true")
        size = _size(values)
        if type(size) is not int or size == 0 or size < -1:
            raise refuse(values, f"group_size {size!r}", "-1, or inputs of a group")

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing."""
        return list(values.get("modules_to_not_convert") or [])

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        size = _size(options.values)
        size = inputs if size == -1 else size
        if outputs % PER or inputs % size:
            raise refuse(
                options.values, f"a layer of {outputs} x {inputs}", f"outputs that {PER}, inputs that {size} divides"
            )
        return {
            "qweight": ((inputs, outputs // PER), torch.int32),
            "qzeros": ((inputs // size, outputs // PER), torch.int32),
            "scales": ((inputs // size, outputs), getattr(torch, options.scales)),
        }

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """Half a byte, and of each group a scale and a zero point."""
        assert isinstance(options, Stored)
        size = _size(options.values)
        return 0.5 + (2.5 / size if size > 0 else 0)


def _size(values: Mapping[str, Any]) -> Any:
    return values.get("group_size", values.get("q_group_size", 128))


QUANTIZER = Awq()
