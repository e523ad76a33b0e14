"""Rotary positions whose base grows with the longest row that was seen (dynamic NTK scaling): as for a first row.

In: a transformers model. Out: the same, its frequencies as they are before any row. transformers keeps those of the
longest row for the shorter ones behind it, so that what a row gives would depend on the rows before it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def reset(model: nn.Module) -> None:
    """Forget the rows that were seen; nothing is done to models whose positions do not depend on them."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" not in (rope.get("rope_type"), *(v.get("rope_type") for v in rope.values() if isinstance(v, dict))):
        return
    for module in model.modules():
        rotary: Any = module  # transformers' class of each family, with the same attributes
        if getattr(rotary, "rope_type", None) == "dynamic":
            rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
            rotary.max_seq_len_cached = rotary.original_max_seq_len
