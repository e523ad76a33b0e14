"""Cross-entropy over the rows that carry a label, a chunk of rows at a time.

In: hidden states of the label rows, their labels, the model's head. Out: the sum of the losses, in float32. Only one
chunk of logits is alive at any time: the gradient with respect to the hidden states (and to the head, where that is
trained) is computed in the forward pass, chunk by chunk, and only scaled in the backward pass. The idea is known from
"Cut Your Losses" (Wijmans et al. 2024, arXiv:2411.09009) and Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); here the
head is any module, quantized or wrapped in an adapter too, and autograd computes what of a chunk is not its logits.

Shapes: L = label rows, W = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fitune.core.units import MIB
from fitune.models.kernels import fused
from fitune.models.kernels.frozen import Frozen
from fitune.models.kernels.target import CPU, Target, of

aten = torch.ops.aten
CHUNK_BYTES = 32 * MIB  # float32 logits of one chunk; their gradient takes as much again
LEAST = {"cuda": 512}  # rows for which the head is read; fewer than this, and a GPU reads more than it computes


def chunk_rows(vocabulary: int, target: Target = CPU) -> int:
    """Rows whose float32 logits fill a chunk, or the fewest for a kind of device; a power of two, so that of few sizes
    few are left."""
    return max(LEAST.get(target.kind, 1), 1 << max(1, CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1)


class _CrossEntropy(torch.autograd.Function):
    """Sum of weight x cross-entropy, in float32. The log-softmax is all that is kept, and its gradient is made in its
    place: with logits of 16 bits 6 bytes for each are there at once, where autograd takes 12."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, ours: bool) -> Tensor:
        """Args: ours: nobody else looks at the logits, which may be written over."""
        scores = logits.detach()
        if ours:  # each kernel reads an element for the last time where it writes it
            aten._log_softmax.out(scores, -1, False, out=scores)
        else:
            scores = aten._log_softmax(scores, -1, False)
        ctx.scores, ctx.given = scores, (labels, weights)
        if weights is None:
            return F.nll_loss(scores, labels, reduction="sum")
        return (F.nll_loss(scores, labels, reduction="none") * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,), (labels, weights) = grads, ctx.given
        each = scale.expand(len(labels)) if weights is None else scale * weights
        made: Tensor = ctx.scores.exp_().mul_(each[:, None])
        ctx.scores = None  # it is the gradient now, and is not to outlive it
        made[torch.arange(len(labels), device=labels.device), labels] -= each
        return made, None, None, None


def _chunk_loss(head: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    logits = head(hidden)
    if fused.used(logits, widest=2**31):
        plain = type(head) is nn.Linear or isinstance(head, Frozen)  # others may need what they gave
        return fused.cross_entropy(logits, labels, weights, ours=plain)
    ours = logits.dtype != torch.float32
    loss: Tensor = _CrossEntropy.apply(logits.float(), labels, weights, ours)
    return loss


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
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    vocabulary: int,
    loss_weights: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of the label rows, each times its weight.

    Args:
        head: hidden states to logits.
        hidden: (L, W).
        labels: (L,).
        vocabulary: width of the logits.
        loss_weights: (L,), float32; None: 1 for all.
        rows: of a chunk; None: as many as the vocabulary and the device suggest.

    Returns:
        A float32 scalar.
    """
    rows = rows or chunk_rows(vocabulary, of(hidden.device))
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or weights):
        loss: Tensor = _ChunkedLoss.apply(head, rows, hidden, labels, loss_weights, *weights)
        return loss
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, label, weight in _parts(rows, hidden, labels, loss_weights):
        total += _chunk_loss(head, part, label, weight)
    return total
