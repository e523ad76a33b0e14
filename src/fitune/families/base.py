"""What fitune must know of an architecture to tune it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of an architecture's parts, as they stand in its state dict.

    blocks: path of the list of transformer blocks, from the causal-LM class. attention, mlp: names of the linear layers
    inside a block. lora_targets: what `targets: auto` means, the attention projections that Hu et al. (2021) tuned.
    """

    model_type: str
    blocks: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    lora_targets: tuple[str, ...]
