"""int8 weights by bitsandbytes (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339); the reference is absmax.py.

Only its weights are taken: they are made plain in the compute dtype for a product, and dropped, on every device.
LLM.int8() quantizes inputs too, but for the columns that hold a value above a threshold, and those it looks for over
the whole batch: in a flat batch one document would move another. It waits for the GPU to count them, at each layer.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from fitune.core.options import QuantOptions
from fitune.models.kernels.experts import Stack
from fitune.models.kernels.frozen import Frozen
from fitune.models.kernels.target import of
from fitune.models.quant.absmax import HIGHEST
from fitune.models.quant.base import Quantizer, sizes


class Int8Linear(Frozen, bnb.nn.Linear8bitLt):
    """See the module's text."""

    state: Any

    def scales(self) -> Tensor:
        """(out,): the largest value of each row of the weight."""
        scales: Tensor = self.weight.SCB if self.state.SCB is None else self.state.SCB
        return scales

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen. torch's own arithmetic: no kernel of bitsandbytes takes part."""
        return _plain(self.weight.data, self.scales(), dtype)


def _plain(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) int8 times (out,)."""
    each = (scales / HIGHEST).to(dtype)[:, None]
    if of(values.device).kind == "cuda":
        return values * each  # cast as they are read, in one kernel
    return values.to(dtype).mul_(each)  # a CPU would cast into a tensor beside the result


class Int8Stack(Stack):
    """Experts: weight (experts, out, in) int8, scales (experts, out)."""

    scales: Tensor

    def fill(self, number: int, matrix: Tensor) -> None:
        """See Stack."""
        packed = bnb.nn.Int8Params(matrix.cpu(), requires_grad=False).to(self.weight.device)
        self.weight.data[number], self.scales[number] = packed.data, packed.SCB

    def matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        """See Stack."""
        return _plain(self.weight.data[number], self.scales[number], dtype)


class Int8(Quantizer):
    """See the module's text."""

    name = "int8"
    base = bnb.nn.Linear8bitLt

    def settings(self, options: QuantOptions, compute: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
        """See Quantizer."""
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=options.threshold, llm_int8_skip_modules=skip)

    def adopt(self, layer: Any, compute: torch.dtype) -> None:
        """See Quantizer."""
        layer.__class__, layer.compute = Int8Linear, compute

    def make(self, weight: Tensor, options: QuantOptions, device: torch.device) -> Frozen:
        """See Quantizer."""
        layer: Frozen = bnb.nn.Linear8bitLt(
            weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=options.threshold
        )
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
        layer, layer.source_cls = layer.to(device), nn.Linear
        self.adopt(layer, torch.float32)
        return layer

    def empty(self, layer: Any, options: QuantOptions) -> Any:
        """See Quantizer."""
        inputs, outputs = sizes(layer)
        how = {"has_fp16_weights": False, "threshold": options.threshold, "device": "meta"}
        made = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, **how)
        values = torch.empty(outputs, inputs, dtype=torch.int8, device="meta")
        scales = torch.empty(outputs, dtype=torch.float32, device="meta")
        made.weight = bnb.nn.Int8Params(values, requires_grad=False, SCB=scales)
        return made

    def stack(self, shape: tuple[int, int, int], options: QuantOptions, *, transposed: bool) -> Stack:
        """See Quantizer."""
        made = Int8Stack(*shape, transposed=transposed)
        values = torch.empty(shape, dtype=torch.int8, device="meta")
        made.hold(values, scales=torch.empty(shape[:2], dtype=torch.float32, device="meta"))
        return made

    def constants(self, layer: Any) -> list[Tensor]:
        """See Quantizer."""
        return [layer.scales()]

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """One, and four for each row."""
        return 1.0


QUANTIZER = Int8()
