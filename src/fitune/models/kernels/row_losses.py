"""The cross-entropy of each label row, a chunk of rows at a time: for objectives that are no sum over rows.

In: hidden states of the label rows, their labels, the model's head. Out: the loss of each row, in float32, with a
gradient with respect to the hidden states. Only one chunk of logits is alive at any time. What a row's loss does to its
hidden state is known in the forward pass up to a factor, the gradient that comes back for this row; so the head is read
once each way, as in `kernels/loss.py`. As there, a frozen head that is one matrix goes by blocks of the vocabulary on a
CPU (`frozen_head.py`).

Shapes: L = label rows, W = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fitune.models.kernels import frozen_head
from fitune.models.kernels.frozen_head import Matrix
from fitune.models.kernels.loss import as_matrix, at_once, chunk_rows
from fitune.models.kernels.target import of

aten = torch.ops.aten


def _chunks(rows: int, hidden: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    for start in range(0, len(labels), rows):
        here = slice(start, start + rows)
        yield here, hidden[here].detach(), labels[here]


def _losses(logits: Tensor, labels: Tensor, *, slope: bool) -> tuple[Tensor, Tensor]:
    """(R,) losses of a chunk, and (R, V): with `slope` the gradient of each with respect to its logits."""
    scores = aten._log_softmax(logits.detach().float(), -1, False)
    losses = -scores.gather(1, labels[:, None])[:, 0]
    if slope:
        scores.exp_()
        scores[torch.arange(len(labels), device=labels.device), labels] -= 1
    return losses, scores


def _by_blocks(head: Matrix, rows: int, hidden: Tensor, labels: Tensor, grads: Tensor | None) -> Tensor:
    """(L,), of a head that is a matrix; grads: (L, W), where the gradient of each is written."""
    most = at_once(rows, len(head.weight), of(hidden.device))
    return frozen_head.losses(head, hidden, labels, most, grad=grads).float()


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: nn.Module, rows: int, hidden: Tensor, labels: Tensor) -> Tensor:
        grads, matrix = torch.empty_like(hidden), as_matrix(head, hidden, gradient=True)
        if matrix is not None:
            ctx.save_for_backward(grads)
            return _by_blocks(matrix, rows, hidden.detach(), labels, grads)
        found = hidden.new_empty(len(labels), dtype=torch.float32)
        for here, part, label in _chunks(rows, hidden, labels):
            with torch.enable_grad():
                leaf = part.requires_grad_()
                logits = head(leaf)
            found[here], slope = _losses(logits, label, slope=True)
            (grads[here],) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
        ctx.save_for_backward(grads)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None]:
        (each,), (made,) = grads, ctx.saved_tensors
        return None, None, made * each[:, None].to(made.dtype), None


def row_losses(head: nn.Module, hidden: Tensor, labels: Tensor, vocabulary: int, rows: int | None = None) -> Tensor:
    """(L,), float32: the cross-entropy of each label row.

    Args:
        head: hidden states to logits; what is trained of it gets no gradient here.
        hidden: (L, W).
        labels: (L,).
        vocabulary: width of the logits.
        rows: of a chunk; None: as many as the vocabulary and the device suggest.
    """
    rows = rows or chunk_rows(vocabulary, of(hidden.device))
    if torch.is_grad_enabled() and hidden.requires_grad:
        made: Tensor = _RowLosses.apply(head, rows, hidden, labels)
        return made
    matrix = as_matrix(head, hidden, gradient=False)
    if matrix is not None:
        return _by_blocks(matrix, rows, hidden.detach(), labels, None)
    found = hidden.new_empty(len(labels), dtype=torch.float32)
    with torch.no_grad():
        for here, part, label in _chunks(rows, hidden, labels):
            found[here], _ = _losses(head(part), label, slope=False)
    return found
