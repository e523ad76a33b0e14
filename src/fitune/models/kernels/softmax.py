"""From logits to their losses and the gradient of these, in the memory of the logits.

In: logits of some rows, their labels. Out: the loss of each row; the logits have become softmax - one-hot, the gradient
of the sum of these losses. No second tensor of their size is made. Logits of 16 bits go through float32 a few rows at a
time, as many as a processor's cache holds: sums are in float32, and the gradient is rounded once, at the end.

A loss is -log of the label's probability, which takes no pass over the row for its largest logit. Where the probability
is too small for that, it is the difference of two logits less the log of the most likely entry's probability.

Shapes: R = rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

import torch
from torch import Tensor

from fitune.core.units import MIB
from fitune.models.kernels.target import of

aten = torch.ops.aten
LEAST = 1e-30  # a probability that float32 holds with all its digits
BLOCK_BYTES = 4 * MIB  # of the float32 rows that are worked on at once, beside logits of 16 bits

Reader = Callable[[Tensor], Tensor]  # an entry of each row, (R,), to the logits there, in float32


def reader(logits: Tensor) -> Reader:
    """From logits that stay as they are."""
    return lambda entries: logits.gather(1, entries[:, None])[:, 0].float()


def in_place(
    logits: Tensor, labels: Tensor, again: Reader, weights: Tensor | None = None, *, gradient: bool = True
) -> Tensor:
    """The loss of each row, (R,), float32; the logits become its gradient.

    Args:
        logits: (R, V), written over.
        labels: (R,).
        again: gives single logits when they were written over.
        weights: (R,), float32, of each row in the gradient alone; before that is rounded.
        gradient: it is wanted; without, what becomes of the logits does not matter.
    """
    if logits.dtype.itemsize >= 4:
        found = _rows(logits, labels, again, gradient=gradient)
        if gradient and weights is not None:
            logits.mul_(weights[:, None])
        return found
    many = block_rows(logits)
    wide = logits.new_empty((many, logits.shape[1]), dtype=torch.float32)
    losses = []
    of_rows = repeat(None) if weights is None else weights.split(many)
    for part, some, weight in zip(logits.split(many), labels.split(many), of_rows, strict=False):
        scores = wide[: len(part)].copy_(part)
        losses.append(_rows(scores, some, reader(part), gradient=gradient))
        if gradient:
            part.copy_(scores if weight is None else scores.mul_(weight[:, None]))
    return torch.cat(losses)


def block_rows(logits: Tensor) -> int:
    """Rows of 16 bits that are in float32 at once: few on a CPU, but one for each thread; elsewhere all."""
    if of(logits.device).kind != "cpu":
        return len(logits)
    return min(len(logits), max(BLOCK_BYTES // (4 * logits.shape[1]), torch.get_num_threads()))


def _rows(scores: Tensor, labels: Tensor, again: Reader, *, gradient: bool) -> Tensor:
    column = labels[:, None]
    aten._softmax.out(scores, -1, False, out=scores)  # an element is read for the last time where it is written
    likely = scores.gather(1, column)
    # what a CPU looks at, a GPU would have to be waited for
    if of(scores.device).kind == "cpu" and bool((likely >= LEAST).all()):
        losses = likely.log().neg_()[:, 0]
    else:
        top = scores.argmax(-1)
        losses = again(top) - again(labels) - scores.gather(1, top[:, None])[:, 0].log()
    if gradient:
        scores.scatter_(1, column, likely - 1)
    return losses.float()
