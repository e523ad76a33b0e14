"""From last hidden states to logits: the output head, and of how many rows it computes them at once.

In: a model. Out: a module, or a number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.models import attached
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.loss import chunk_rows
from fitune.models.kernels.target import of


class ScaledHead(nn.Module):
    """An output head with what some models do to its scores: a factor (Granite, Cohere), a soft cap (Gemma 2)."""

    def __init__(self, head: nn.Module, factor: float, cap: float | None) -> None:
        super().__init__()
        self.head, self.factor, self.cap = head, factor, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., W) to (..., V)."""
        scores: Tensor = self.head(hidden) * self.factor
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


def output_head(model: nn.Module) -> nn.Module:
    """From last hidden states to the logits that the model's own forward gives."""
    inner = causal_lm(model)
    head: nn.Module = inner.get_output_embeddings()
    config = inner.config
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return head if factor == 1.0 and cap is None else ScaledHead(head, factor, cap)


def loss_rows(model: nn.Module) -> int:
    """Of how many label rows its losses compute the logits at once: as the run has it (`set_loss_rows`), or as the
    vocabulary and the device suggest."""
    inner = causal_lm(model)
    suggested = chunk_rows(inner.config.vocab_size, of(next(inner.parameters()).device))
    return attached.of(inner).loss_rows or suggested


def set_loss_rows(model: nn.Module, config: RunConfig) -> None:
    """Fix that number for a run; auto leaves it open."""
    attached.of(model).loss_rows = None if config.loss_rows == "auto" else config.loss_rows
