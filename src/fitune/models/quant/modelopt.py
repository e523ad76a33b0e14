"""NVIDIA ModelOpt's files (nvidia-modelopt 0.47, `export/convert_hf_config.py`): NVFP4, and FP8 with a scale for all.

FP8: weight (out, in) float8_e4m3fn, weight_scale () what it is multiplied by. Older folders have no quantization_config
in config.json, but hf_quant_config.json beside it (`beside`). What is said of activations and caches is not followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import translate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitune.core.untrusted import read_json
from fitune.models.quant import nvfp4
from fitune.models.quant.base import sizes
from fitune.models.quant.fp8 import FLOAT8
from fitune.models.quant.stored import PackedLinear, Packing, Parts, Stored, refuse

FILE = "hf_quant_config.json"


class ScaledLinear(PackedLinear):
    """FP8."""

    packed = "weight"
    weight_scale: Tensor

    def rows(self, first: int, last: int) -> Tensor:
        """See PackedLinear."""
        found: Tensor = self.weight[first:last].float() * self.weight_scale.float()
        return found


ALGORITHMS: dict[str, type[PackedLinear]] = {
    "NVFP4": nvfp4.Multiplied,
    "W4A16_NVFP4": nvfp4.Multiplied,  # activations are not quantized there, and nowhere here
    "FP8": ScaledLinear,
}


def beside(folder: Path) -> dict[str, Any] | None:
    """The quantization_config that config.json would have, from the file beside it; None: there is none."""
    try:
        values = read_json(folder / FILE)
    except FileNotFoundError:
        return None
    found = values.get("quantization") if isinstance(values, dict) else None
    found = found if isinstance(found, dict) else {}
    return {"quant_method": "modelopt", **found, "ignore": found.get("exclude_modules")}


class ModelOpt(Packing):
    """See the module's text."""

    name = "modelopt"
    base = PackedLinear
    marks = (".weight_scale",)
    spare = (".input_scale", ".k_scale", ".v_scale", ".output_scale")

    def check(self, values: Mapping[str, Any]) -> None:
        """See Packing."""
        if values.get("quant_algo") not in ALGORITHMS:
            raise refuse(values, f"quant_algo {values.get('quant_algo')!r}", ", ".join(ALGORITHMS))
        left = values.get("ignore")
        if left is not None and not (isinstance(left, list) and all(isinstance(one, str) for one in left)):
            raise refuse(values, "ignore", "names, or null")
        groups = values.get("config_groups")
        several = groups.values() if isinstance(groups, dict) else ()
        sizes_ = [(one.get("weights") or {}).get("group_size") for one in several if isinstance(one, dict)]
        wrong = [one for one in (*sizes_, values.get("group_size")) if one not in (None, nvfp4.BLOCK)]
        if self._kind(values) is nvfp4.Multiplied and wrong:
            raise refuse(values, f"group_size {wrong[0]!r}", str(nvfp4.BLOCK))

    def left_out(self, values: Mapping[str, Any]) -> list[str]:
        """See Packing; patterns are those of a shell."""
        return [f"re:{translate(one)}" if "*" in one else one for one in values.get("ignore") or []]

    def _kind(self, values: Mapping[str, Any]) -> type[PackedLinear]:
        return ALGORITHMS[values["quant_algo"]]

    def empty(self, layer: Any, options: Any) -> Any:
        """See Quantizer."""
        inputs, outputs = sizes(layer)
        return self._kind(options.values)(inputs, outputs, self.parts(inputs, outputs, options), options.values)

    def parts(self, inputs: int, outputs: int, options: Stored) -> Parts:
        """See Packing."""
        kind = self._kind(options.values)
        if issubclass(kind, nvfp4.Nvfp4Linear):
            return nvfp4.parts(kind, inputs, outputs, options)
        return {"weight": ((outputs, inputs), FLOAT8), "weight_scale": ((), torch.float32)}

    def bytes_per_weight(self, options: Any) -> float:
        """The number, and of NVFP4 a byte for 16."""
        return nvfp4.BYTES if issubclass(self._kind(options.values), nvfp4.Nvfp4Linear) else 1.0


QUANTIZER = ModelOpt()
