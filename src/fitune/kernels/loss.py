"""Cross-entropy over the rows that carry a label, a chunk of rows at a time.

In: hidden states of the label rows, their labels, the model's head. Out: the sum of the losses, in float32. Only one
chunk of logits is alive at any time: the gradient with respect to the hidden states (and to the head, where that is
trained) is computed in the forward pass, chunk by chunk, and only scaled in the backward pass. The idea is known from
"Cut Your Losses" (Wijmans et al. 2024, arXiv:2411.09009) and Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); here the
head is any module, quantized or wrapped in an adapter too, and autograd computes each chunk.

Shapes: L = label rows, W = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_BYTES = 32 * 2**20  # float32 logits of one chunk; their gradient takes as much again


def chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits fill a chunk."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _chunk_loss(head: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    logits = head(hidden).float()
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def _parts(rows: int, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Iterator[tuple[Tensor, Any, Any]]:
    """Hidden states, labels and weights, a chunk at a time."""
    of_labels = repeat(None) if weights is None else weights.split(rows)
    return zip(hidden.split(rows), labels.split(rows), of_labels, strict=False)


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses; the gradients are ready when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        rows: int,
        hidden: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grads = []
        weight_grads: list[Tensor] | None = None
        for part, label, weight in _parts(rows, hidden, labels, loss_weights):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = _chunk_loss(head, leaf, label, weight)
            leaf_grad, *grads = torch.autograd.grad(loss, (leaf, *weights))
            total += loss.detach()
            hidden_grads.append(leaf_grad)
            weight_grads = (
                grads if weight_grads is None else [a.add_(b) for a, b in zip(weight_grads, grads, strict=True)]
            )
        ctx.save_for_backward(torch.cat(hidden_grads), *(weight_grads or []))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        hidden_grad, *weight_grads = ctx.saved_tensors
        return None, None, hidden_grad * scale, None, None, *(grad * scale for grad in weight_grads)


def label_loss(
    head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, loss_weights: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropies of the label rows, each times its weight.

    Args:
        head: hidden states to logits.
        hidden: (L, W).
        labels: (L,).
        vocabulary: width of the logits; decides how many rows a chunk has.
        loss_weights: (L,), float32; None: 1 for all.

    Returns:
        A float32 scalar.
    """
    rows = chunk_rows(vocabulary)
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or weights):
        loss: Tensor = _ChunkedLoss.apply(head, rows, hidden, labels, loss_weights, *weights)
        return loss
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, label, weight in _parts(rows, hidden, labels, loss_weights):
        total += _chunk_loss(head, part, label, weight)
    return total
