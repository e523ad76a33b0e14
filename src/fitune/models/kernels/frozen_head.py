"""Cross-entropy under a frozen head that is one matrix, on a CPU: a block of the vocabulary at a time.

In: hidden states of label rows, the head's weight. Out: the loss of each row, and its gradient with respect to the
hidden states. That gradient is the mean of the head's rows under the row's softmax, less the label's own. The mean is
added up over blocks as attention is over keys (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135): each logit is made once and dropped with its block, the head is read once for many rows, and both
products have sizes that a CPU computes at its full rate, on operands that its cache holds.

The label is kept out of the sums, which leaves 1 - p(label) exact where p(label) is nearly 1: the gradient is
(1 - p(label)) x (mean of the others - the label's row). Sums are in float32; what is rounded to the dtype of the
products are logits, as everywhere, the probabilities within a block, and a block's sum.

Shapes: L = label rows, R = rows at once, W = width, V = vocabulary, N = entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
ROWS = 1024  # at once: from some hundred on a product runs at its full rate
LOGITS = 2**21  # at once: 8 MiB in float32
WIDEST = 2**14  # entries of a block: its rows of the head are to stay in the cache for the second product
NONE = -1e30  # the logarithm of nothing; finite, so that a block may hold no more than it


@dataclass(frozen=True)
class Matrix:
    """A head. weight: (V, W), in any dtype. bias: (V,). compute: the dtype of the products."""

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype

    def blocks(self, number: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Where each of so many blocks begins, its weight (N, W) and its bias."""
        start = 0
        for weight in self.weight.tensor_split(number):
            end = start + len(weight)
            yield start, weight.to(self.compute), None if self.bias is None else self.bias[start:end]
            start = end


def losses(
    head: Matrix, hidden: Tensor, labels: Tensor, logits: int, weights: Tensor | None = None, grad: Tensor | None = None
) -> Tensor:
    """The loss of each row, (L,), without its weight.

    Args:
        head: frozen.
        hidden: (L, W).
        labels: (L,).
        logits: at once, at most.
        weights: (L,) of the rows, for the gradient; None: 1 for all.
        grad: (L, W), where the gradient is written; None: it is not wanted.
    """
    parts = max(1, -(-len(labels) // ROWS))
    split = [None if one is None else one.tensor_split(parts) for one in (hidden, labels, weights, grad)]
    store = _Store(head, -(-len(labels) // parts), logits)
    found = []
    for some, label, weight, place in zip(*(one or (None,) * parts for one in split), strict=True):
        rows = _Rows(some.to(head.compute), label, store, gradient=place is not None)
        for start, part, bias in head.blocks(store.blocks):
            rows.see(start, part, bias)
        apart = rows.others - rows.own
        found.append(F.softplus(apart))
        if place is not None:
            factor = apart.sigmoid() if weight is None else apart.sigmoid().mul_(weight)
            own = head.weight.index_select(0, label).to(rows.mean.dtype)
            place.copy_(rows.mean.sub_(own).mul_(factor[:, None]))
    return torch.cat(found)


class _Store:
    """Memory for the logits of a block, which every block uses again.

    made: in the dtype of the products. scores: in float32, or the same memory. blocks: how many the vocabulary has.
    """

    def __init__(self, head: Matrix, rows: int, logits: int) -> None:
        count = len(head.weight)
        self.blocks = -(-count // max(1, min(WIDEST, logits // max(1, rows))))
        self.made = head.weight.new_empty(rows * -(-count // self.blocks), dtype=head.compute)
        wide = torch.promote_types(head.compute, torch.float32)
        self.scores = self.made if wide == head.compute else torch.empty_like(self.made, dtype=wide)


class _Rows:
    """What some rows know of the blocks that they have seen.

    others: (R,), the logarithm of the sum of exp(logit) over all entries but the label. own: (R,), the label's logit.
    mean: (R, W), of the head's rows under the softmax of all entries but the label.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, store: _Store, *, gradient: bool) -> None:
        self.hidden, self.labels, self.store, self.gradient = hidden, labels, store, gradient
        wide = store.scores.dtype
        self.others, self.own = (hidden.new_full((len(hidden),), NONE, dtype=wide) for _ in range(2))
        self.mean = hidden.new_zeros(hidden.shape if gradient else (0,), dtype=wide)
        self.sums = torch.empty_like(hidden) if gradient else hidden  # of a block, as the product gives them
        self.numbers = torch.arange(len(hidden), device=hidden.device)

    def see(self, start: int, weight: Tensor, bias: Tensor | None) -> None:
        """A block, (N, W), whose first entry is `start`."""
        size = len(self.hidden), len(weight)
        made, scores = (one[: size[0] * size[1]].view(size) for one in (self.store.made, self.store.scores))
        torch.mm(self.hidden, weight.t(), out=made)
        if made.dtype != scores.dtype:
            scores.copy_(made)
        if bias is not None:
            scores.add_(bias)
        self._keep_labels_out(scores, start)
        largest = scores.amax(1)
        aten._softmax.out(scores, -1, False, out=scores)  # an element is read for the last time where it is written
        block = largest - scores.amax(1).log_()
        before, self.others = self.others, torch.logaddexp(self.others, block)
        if not self.gradient:
            return
        if made.dtype != scores.dtype:
            made.copy_(scores)
        sums = torch.mm(made, weight, out=self.sums).to(scores.dtype)
        self.mean.mul_((before - self.others).exp_()[:, None])
        self.mean.addcmul_(sums, (block - self.others).exp_()[:, None])

    def _keep_labels_out(self, scores: Tensor, start: int) -> None:
        """Note the logits of the labels in this block, and give them no share in it."""
        place, count = self.labels - start, scores.shape[1]
        here = (place >= 0) & (place < count)
        place = place.clamp_(0, count - 1).add_(self.numbers, alpha=count)
        flat = scores.view(-1)  # a scatter of 16 bits would take as long as a tenth of the product
        found = flat.index_select(0, place)
        self.own = torch.where(here, found, self.own)
        flat.index_copy_(0, place, found.masked_fill_(here, NONE))
