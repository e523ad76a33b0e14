"""A storage that was allocated, and the categories that a plan counts bytes by."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHTS, CONSTANTS, TRAINABLE = "frozen weights", "quantization constants", "trainable weights"
GRADIENTS, STATES, ACTIVATIONS = "gradients", "optimizer states", "activations"
LOSS, PLAIN, OTHER = "logits and loss", "dequantized and cast weights", "temporaries"
CATEGORIES = (WEIGHTS, CONSTANTS, TRAINABLE, GRADIENTS, STATES, ACTIVATIONS, LOSS, PLAIN, OTHER)


@dataclass(slots=True)
class Block:
    """A storage. phase, module, op: where it was made; born, freed: at which event (None: it is still there).

    category: where that is known from the start; region: forward, loss or backward of a step, or none of them.
    """

    bytes: int
    phase: str
    region: str
    module: str
    op: str
    born: int
    freed: int | None = None
    freed_region: str = ""
    category: str = ""

    @property
    def kind(self) -> str:
        """Its category, where it is not known from the start by where it was made and how long it lived."""
        if self.category:
            return self.category
        if self.region == "loss":
            return LOSS
        kept = self.region == "forward" and self.freed_region != "forward"
        recomputed = self.region == "backward" and self.module != ""
        return ACTIVATIONS if kept or recomputed else OTHER
