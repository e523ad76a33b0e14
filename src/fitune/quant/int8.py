"""int8 weights by bitsandbytes (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339); the reference is absmax.py.

On a CUDA GPU the product is LLM.int8()'s: inputs are quantized too, but for columns over the threshold. On any other
device bitsandbytes trains with plain inputs and evaluates with quantized ones cast to float16, so that a held-out loss
measures another function; here the inputs are never quantized there: 8-bit weights, products in the compute dtype.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from fitune.config import QuantOptions
from fitune.kernels.frozen import Frozen
from fitune.quant import trust
from fitune.quant.absmax import llm_int8
from fitune.quant.base import Quantizer, sizes


class Int8Linear(Frozen, bnb.nn.Linear8bitLt):  # type: ignore[misc]  # bitsandbytes has no types
    """See the module's text."""

    state: Any

    def scales(self) -> Tensor:
        """(out,): the largest value of each row of the weight."""
        scales: Tensor = self.weight.SCB if self.state.SCB is None else self.state.SCB
        return scales

    def plain_weight(self, dtype: torch.dtype) -> Tensor:
        """See Frozen. torch's own arithmetic: no kernel of bitsandbytes takes part."""
        values: Tensor = self.weight.data.to(dtype)
        return values * (self.scales() / 127).to(dtype)[:, None]

    def product(self, x: Tensor) -> Tensor:
        """See Frozen."""
        return self.fused_product(x) if trust.fused(self, x) else Frozen.product(self, x)

    # what trust.py asks of a packed layer

    def kind(self) -> trust.Kind:
        """See Nf4Linear."""
        return trust.Kind("int8", tuple(self.weight.shape), f"threshold {self.state.threshold:g}")

    def ways(self) -> list[tuple[str, trust.Way]]:
        """See Nf4Linear."""
        return [("torch's product of numbers and scales", Int8Linear.plain_weight)]

    def watched(self) -> list[tuple[str, trust.Way]]:
        """See Nf4Linear."""
        return []

    def fused_product(self, x: Tensor) -> Tensor:
        """LLM.int8() by bitsandbytes."""
        if self.weight.CB is not None:
            self.init_8bit_state()  # type: ignore[operator]
        out: Tensor = bnb.matmul(x, self.weight, state=self.state)
        return out

    def expected_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """LLM.int8() by the reference."""
        return llm_int8(x.float(), weight, self.state.threshold)


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

    def make(self, weight: Tensor, options: QuantOptions, device: torch.device) -> Any:
        """See Quantizer."""
        layer = bnb.nn.Linear8bitLt(
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
