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
        values: Tensor = self.weight.data
        scales = (self.scales() / HIGHEST).to(dtype)[:, None]
        if of(values.device).kind == "cuda":
            return values * scales  # cast as they are read, in one kernel
        return values.to(dtype).mul_(scales)  # a CPU would cast into a tensor beside the result


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

    def constants(self, layer: Any) -> list[Tensor]:
        """See Quantizer."""
        return [layer.scales()]

    def bytes_per_weight(self, options: QuantOptions) -> float:
        """One, and four for each row."""
        return 1.0


QUANTIZER = Int8()
