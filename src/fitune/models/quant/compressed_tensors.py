"""compressed-tensors' files, as llm-compressor and vLLM's people publish them: int4 and int8 in packed ints, int8, FP8.

`pack-quantized`: weight_packed (out, in x bits / 32) int32 holds numbers less their lowest value, the lowest bits
first; weight_scale (out, groups), weight_zero_point packed the same way along the outputs, weight_g_idx (in,) the group
of each input where they are ordered by importance, weight_shape. `int-quantized` and `naive-quantized`: weight
(out, in) int8; `float-quantized`: float8_e4m3fn; weight_scale for all, a row, a group of inputs or a block. A weight is
scale x (number - zero point). `nvfp4-pack-quantized`: see nvfp4.py. What is said of activations is not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fitune.core.options import QuantOptions
from fitune.models.quant import nvfp4
from fitune.models.quant.base import sizes
from fitune.models.quant.fp8 import FLOAT8, scaled
from fitune.models.quant.stored import PackedLinear, Packing, Parts, Renamed, Stored, fields, marlin, refuse

PACKED = "pack-quantized"
NVFP4 = "nvfp4-pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized", NVFP4)
STRATEGIES = ("tensor", "channel", "group", "block")
BITS = {"int": (2, 4, 8), "float": (8,)}


def weights_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """How weights are quantized: the same in all groups.

    Raises:
        ModelError: they differ, or none are.
    """
    groups = values.get("config_groups")
    found = [one.get("weights") for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    if not found or not isinstance(found[0], dict) or any(one != found[0] for one in found):
        raise refuse(values, "config_groups", "one way for all weights")
    first: dict[str, Any] = found[0]
    return first


def is_packed(values: Mapping[str, Any]) -> bool:
    """Are there several numbers in an int?"""
    return values.get("format") == PACKED


class CompressedLinear(PackedLinear):
    """See the module's text."""

    packed = "weight"
    weight_scale: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """See PackedLinear."""
        how, numbers, scales = weights_of(self.values), self.numbers(first, last), self.weight_scale
        if how["strategy"] == "block":
            return scaled(numbers, scales, how["block_structure"], first)
        zeros = self.zeros(how)
        if how["strategy"] == "tensor":
            return (numbers.float() - zeros.reshape(-1)[:1]) * scales.reshape(-1)[:1].float()
        groups = self.groups()
        zeros = zeros[first:last][:, groups] if zeros.dim() else zeros
        return (numbers.float() - zeros) * scales[first:last].float()[:, groups]

    def numbers(self, first: int, last: int) -> Tensor:
        """(rows, in)."""
        found: Tensor = self.weight[first:last]
        return found

    def zeros(self, how: Mapping[str, Any]) -> Tensor:
        """(out, groups), or a scalar where all are 0."""
        there = self._buffers.get("weight_zero_point")
        return self.weight_scale.new_zeros((), dtype=torch.float32) if there is None else there.float()

    def groups(self) -> Tensor:
        """(in,): of each input the column of its scale."""
        ordered = self._buffers.get("weight_g_idx")
        if ordered is not None:
            return ordered.long()
        size = self.in_features // self.weight_scale.shape[1]
        return torch.arange(self.in_features, device=self.weight_scale.device) // size


class IntsLinear(Renamed, CompressedLinear):
    """Several numbers in an int."""

    packed = "weight_packed"
    weight_packed: Tensor

    def numbers(self, first: int, last: int) -> Tensor:
        """See CompressedLinear."""
        bits = weights_of(self.values)["num_bits"]
        found: Tensor = fields(self.weight_packed[first:last], bits).flatten(1)[:, : self.in_features] - 2 ** (bits - 1)
        return found

    def zeros(self, how: Mapping[str, Any]) -> Tensor:
        """See CompressedLinear."""
        there = self._buffers.get("weight_zero_point")
        if there is None:
            return super().zeros(how)
        bits = how["num_bits"]
        unpacked = fields(there, bits).transpose(1, 2).reshape(-1, there.shape[1])[: self.out_features]
        found: Tensor = unpacked - 2 ** (bits - 1)
        return found.float()


class CompressedTensors(Packing):
    """See the module's text."""

    name = "compressed-tensors"
    base = PackedLinear
    marks = (".weight_scale",)
    spare = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".input_global_scale")

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        how = weights_of(values)
        form, kind = values.get("format"), how.get("type", "int")
        if "marlin" in str(form):
            raise marlin(values, PACKED)
        if form not in FORMATS:
            raise refuse(values, f"format {form!r}", ", ".join(FORMATS))
        if form == NVFP4:
            if (kind, how.get("num_bits"), how.get("group_size"), how.get("symmetric", True)) != (
                "float", 4, nvfp4.BLOCK, True,
            ):  # fmt: skip
                raise refuse(values, "NVFP4 of another kind", f"floats in 4 bits, symmetric, groups of {nvfp4.BLOCK}")
        else:
            self._check_numbers(values, how)
        if (values.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise refuse(values, "sparse weights", "dense ones")
        if values.get("quantization_status", "compressed") not in ("compressed", "frozen"):
            raise refuse(values, f"quantization_status {values['quantization_status']!r}", "compressed")

    def _check_numbers(self, values: Mapping[str, Any], how: Mapping[str, Any]) -> None:
        form, kind, strategy = values.get("format"), how.get("type", "int"), how.get("strategy")
        if kind not in BITS or how.get("num_bits") not in BITS[kind] or (how["num_bits"] != 8 and form != PACKED):
            raise refuse(
                values, f"weights of {how.get('num_bits')} bits, {kind}", "int in 2, 4 or 8 bits, or float in 8"
            )
        if kind == "float" and form == PACKED:
            raise refuse(values, "packed floats", "float-quantized")
        if strategy not in STRATEGIES or (strategy == "group" and type(how.get("group_size")) is not int):
            raise refuse(values, f"strategy {strategy!r}", ", ".join(STRATEGIES))

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing."""
        return list(values.get("ignore") or [])

    def empty(self, layer: Any, options: QuantOptions) -> Any:
        """See Quantizer."""
        assert isinstance(options, Stored)
        kind: type[PackedLinear] = IntsLinear if is_packed(options.values) else CompressedLinear
        kind = nvfp4.Divided if options.values["format"] == NVFP4 else kind
        inputs, outputs = sizes(layer)
        return kind(inputs, outputs, self.parts(inputs, outputs, options), options.values)

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        values, how = options.values, weights_of(options.values)
        if values["format"] == NVFP4:
            return nvfp4.parts(nvfp4.Divided, inputs, outputs, options)
        strategy, bits = how["strategy"], how["num_bits"]
        shape: tuple[int, ...] = (outputs, 1)
        if strategy == "group":
            shape = (outputs, -(-inputs // how["group_size"]))
        if strategy == "block":
            shape = tuple(
                -(-size // block) for size, block in zip((outputs, inputs), how["block_structure"], strict=True)
            )
        if strategy == "tensor":
            shape = (1,)
        scales = {"weight_scale": (shape, getattr(torch, options.scales))}
        ordered: Parts = {"weight_g_idx": ((inputs,), torch.int32)} if how.get("actorder") == "group" else {}
        if is_packed(values):
            found: Parts = {
                "weight_packed": ((outputs, -(-inputs * bits // 32)), torch.int32),
                **scales,
                "weight_shape": ((2,), torch.int64),
                **ordered,
            }
            zeros: tuple[tuple[int, ...], torch.dtype] = (-(-outputs * bits // 32), shape[-1]), torch.int32
        else:
            found = {
                "weight": ((outputs, inputs), FLOAT8 if how.get("type") == "float" else torch.int8),
                **scales,
                **ordered,
            }
            zeros = shape, torch.int8
        return found if how.get("symmetric", True) else {**found, "weight_zero_point": zeros}

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """The number, and a scale for each group."""
        assert isinstance(options, Stored)
        how = weights_of(options.values)
        if options.values["format"] == NVFP4:
            return nvfp4.BYTES
        return float(how["num_bits"] / 8 + (2 / how["group_size"] if how["strategy"] == "group" else 0))


QUANTIZER = CompressedTensors()
