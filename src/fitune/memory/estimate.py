"""What a run will take, by closed forms, before it starts.

In: a model with its method, the largest micro-batch. Out: MiB by component. Trainable parameters cost 16 bytes each
(float32 weight, gradient and two Adam states); frozen ones their weight alone.

Activations: what the backward pass keeps of each token in each block of a Llama-like model in float32. Counted in
widths (W) and MLP widths (M) of 4 bytes: two norms keep input and output (4 W), attention keeps its input to q, k, v
(shared with the norm), q, k, v after rotation and its output (about 4 W), the MLP keeps gate, up, the activation and
the product (4 M).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fitune.kernels.loss import chunk_rows

MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """MiB by component. `runtime` is what the process holds before the model: Python, torch, the data."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """By component, in MiB."""
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
            "runtime": self.runtime,
        }


def estimate(model: Any, config: Any, *, longest_batch: int, runtime_mib: float, state_bytes: float = 8) -> Estimate:
    """See the module's text.

    Args:
        model: with its method attached.
        config: the transformers config.
        longest_batch: tokens of the largest micro-batch that can come.
        runtime_mib: what the process holds without the model.
        state_bytes: of the optimizer, for each trained parameter.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width = config.hidden_size
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    per_token = 4 * config.num_hidden_layers * (8 * width + 4 * mlp)
    rows = min(longest_batch, chunk_rows(config.vocab_size))
    return Estimate(
        weights=weights / MIB,
        gradients=4 * trained / MIB,
        optimizer=state_bytes * trained / MIB,
        activations=longest_batch * per_token / MIB,
        logits=2 * 4 * rows * config.vocab_size / MIB,
        runtime=runtime_mib,
    )
