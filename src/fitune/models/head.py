"""From last hidden states to logits: the output head, and of how many rows it computes them at once.

In: a model. Out: a module, or a number of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fitune.core.config import RunConfig
from fitune.models import attached
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.loss import chunk_rows
from fitune.models.kernels.target import of

# settings of a config that scores are multiplied by, divided by, and bent to stay below
TIMES = ("logit_scale", "lm_head_multiplier")
OVER = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIES = {"hyperclovax": ("logits_scaling",)}  # families that take one of them the other way


class ScaledHead(nn.Module):
    """An output head with what some models do to its scores: a factor (Granite, Cohere), a soft cap (Gemma 2); or to
    what it gets (the decoder of ModernBERT)."""

    def __init__(self, head: nn.Module, factor: float, cap: float | None, before: nn.Module | None = None) -> None:
        super().__init__()
        self.head, self.factor, self.cap, self.before = head, factor, cap, before

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., W) to (..., V)."""
        scores: Tensor = self.head(hidden if self.before is None else self.before(hidden)) * self.factor
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


def output_head(model: nn.Module) -> nn.Module:
    """From last hidden states to the logits that the model's own forward gives."""
    inner = causal_lm(model)
    head: nn.Module = inner.get_output_embeddings()
    config = inner.config
    times = MULTIPLIES.get(config.model_type, TIMES)
    factor = math.prod(getattr(config, name, None) or 1.0 for name in times)
    factor /= math.prod(getattr(config, name, None) or 1.0 for name in OVER if name not in times)
    cap = next((value for name in CAPS if (value := getattr(config, name, None)) is not None), None)
    first = getattr(inner, "lm_head", None)
    before = first if isinstance(first, nn.Module) and first is not head else None
    return head if factor == 1.0 and cap is None and before is None else ScaledHead(head, factor, cap, before)


def loss_rows(model: nn.Module) -> int:
    """Of how many label rows its losses compute the logits at once: as the run has it (`set_loss_rows`), or as the
    vocabulary and the device suggest."""
    inner = causal_lm(model)
    suggested = chunk_rows(inner.config.vocab_size, of(next(inner.parameters()).device))
    return attached.of(inner).loss_rows or suggested


def set_loss_rows(model: nn.Module, config: RunConfig) -> None:
    """Fix that number for a run; auto leaves it open."""
    attached.of(model).loss_rows = None if config.loss_rows == "auto" else config.loss_rows
