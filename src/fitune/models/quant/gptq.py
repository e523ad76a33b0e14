"""GPTQ's files (Frantar et al. 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

qweight (in x bits / 32, out) int32 holds columns of unsigned numbers, the lowest bits first, of 3 bits 32 in three ints
that are one string of 96 bits; qzeros
(groups, out x bits / 32) the zero points the same way along a row; scales (groups, out); g_idx (in,) the group of each
input, which `desc_act` orders by their importance. A weight is scale x (number - zero point). Format `gptq` stores zero
points less one, format `gptq_v2` as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from fitune.core.options import QuantOptions
from fitune.models.quant.stored import PIECE, Packing, Parts, Renamed, Stored, fields, marlin, refuse, whole

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is taken off the zero points


class GptqLinear(Renamed):
    """See the module's text."""

    packed = "qweight"
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen. Packed along the inputs, so some of them at a time."""
        bits = self.values["bits"]
        zeros = self._zeros(bits)
        made = torch.empty(self.in_features, self.out_features, dtype=dtype, device=self.weight.device)
        ints = _together(bits)
        step = ints * max(1, PIECE * bits // (32 * ints * self.out_features))
        for first in range(0, len(self.qweight), step):
            some = numbers(self.qweight[first : first + step], bits)
            start = first * 32 // bits
            groups = self.g_idx[start : start + len(some)].long()
            made[start : start + len(some)] = (some.float() - zeros[groups]) * self.scales[groups].float()
        weight: Tensor = made.T
        return weight

    def _zeros(self, bits: int) -> Tensor:
        """(groups, out)."""
        less = FORMATS[self.values.get("checkpoint_format") or "gptq"]
        zeros: Tensor = (numbers(self.qzeros.T, bits).T + less) & (2**bits - 1)
        return zeros.float()


def _together(bits: int) -> int:
    """Ints that hold whole numbers together."""
    return bits // gcd(bits, 32)


def numbers(packed: Tensor, bits: int) -> Tensor:
    """The unsigned numbers of columns of ints: (n, m) int32 to (n x 32 / bits, m) int32."""
    count = _together(bits)
    if count == 1:
        return fields(packed, bits).transpose(1, 2).reshape(-1, packed.shape[1])
    ints = packed.view(-1, count, packed.shape[1]).long() & 0xFFFFFFFF
    starts = torch.arange(0, 32 * count, bits, device=packed.device)
    first, shift = starts // 32, (starts % 32)[:, None]
    low, high = ints[:, first] >> shift, ints[:, (first + 1).clamp(max=count - 1)] << (32 - shift)
    found: Tensor = ((low | high) & (2**bits - 1)).int().reshape(-1, packed.shape[1])
    return found


class Gptq(Packing):
    """See the module's text."""

    name = "gptq"
    base = GptqLinear
    marks = (".qweight",)

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        whole(values, "bits", BITS)
        form = values.get("checkpoint_format") or "gptq"
        if values.get("is_marlin_format") or "marlin" in str(form):
            raise marlin(values, "gptq")
        if form not in FORMATS:
            raise refuse(values, f"checkpoint_format {form!r}", " or ".join(FORMATS))
        if values.get("dynamic"):
            raise refuse(values, "settings of single layers (dynamic)", "the same settings for all layers")
        size = values.get("group_size", -1)
        if type(size) is not int or size == 0 or size < -1:
            raise refuse(values, f"group_size {size!r}", "-1, or inputs of a group")

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing."""
        return []

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        bits, size = options.values["bits"], options.values.get("group_size", -1)
        groups = 1 if size == -1 else -(-inputs // size)
        if inputs * bits % 32 or outputs * bits % 32:
            raise refuse(
                options.values, f"a layer of {outputs} x {inputs}", f"sizes that {32 // gcd(bits, 32)} divides"
            )
        return {
            "qweight": ((inputs * bits // 32, outputs), torch.int32),
            "qzeros": ((groups, outputs * bits // 32), torch.int32),
            "scales": ((groups, outputs), getattr(torch, options.scales)),
            "g_idx": ((inputs,), torch.int32),
        }

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """The number, and of each group a scale and a zero point."""
        assert isinstance(options, Stored)
        bits, size = options.values["bits"], options.values.get("group_size", -1)
        return float(bits / 8 + ((2 + bits / 8) / size if size > 0 else 0))


QUANTIZER = Gptq()
