"""Cross-entropy under a frozen head that is one matrix, on a CPU: a block of the vocabulary at a time.

In: hidden states of label rows, the head's weight. Out: the loss of each row, and its gradient with respect to the
hidden states. That gradient is the mean of the head's rows under the row's softmax, less the label's own. The mean is
added up over blocks as attention is over keys (Dao et al. 2022, arXiv:2205.14135): each logit is made once and dropped
with its block, the head is read once for many rows, and both products have sizes that a CPU computes at its full rate,
on operands that its cache holds.

Between the products an element is read twice, for its exponential and for the sum of these. No largest logit is looked
for first: float32 and bfloat16 hold exp(80), so an exponential is taken of the logits as they are, or, where those of
labels are large, of what they are above the label's. Sums that still came out too large are made once more, of what the
logits are below the largest.

The label is kept out of the sums, which leaves 1 - p(label) exact where p(label) is nearly 1: the gradient is
(1 - p(label)) x (mean of the others - the label's row). Sums are in float32; what is rounded to the dtype of the
products are logits, as everywhere, their exponentials, and a block's sum. float16 holds no exponential of a usual
logit, so that a head of float16 is computed in float32.

Shapes: L = label rows, R = rows at once, W = width, V = vocabulary, N = entries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 1024  # at once: from some hundred on a product runs at its full rate
LOGITS = 2**21  # at once: 8 MiB in float32
WIDEST = 2**14  # entries of a block: its rows of the head are to stay in the cache for the second product
ALIGNED = 64  # entries: both products are faster where their rows begin at full lines of the cache
NONE = -1e30  # the logarithm of nothing, in a dtype that need not hold infinity
NEAR = 40.0  # a logit of a label so far from zero leaves room for the others, as they are
PIECE = 64  # rows of 16 bits that are in float32 at once, in the cache
LARGE = 1e30  # a sum of exponentials; up to here float32 holds it times an entry of the head


@dataclass(frozen=True)
class Matrix:
    """A head. weight: (V, W), in any dtype. bias: (V,). compute: the dtype of the products."""

    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype

    def blocks(self, entries: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Where each block of so many entries begins, its weight (N, W) and its bias."""
        for start in range(0, len(self.weight), entries):
            here = slice(start, start + entries)
            yield start, self.weight[here].to(self.compute), None if self.bias is None else self.bias[here]


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
    compute = torch.float32 if head.compute == torch.float16 else head.compute
    head = replace(head, compute=compute)
    parts = max(1, -(-len(labels) // ROWS))
    split = [None if one is None else one.tensor_split(parts) for one in (hidden, labels, weights, grad)]
    store = _Store(head, -(-len(labels) // parts), logits)
    found = []
    for some, label, weight, place in zip(*(one or (None,) * parts for one in split), strict=True):
        rows = _sums(head, some.to(compute), label, store, gradient=place is not None)
        apart = rows.log_total() - rows.own
        found.append(F.softplus(apart))
        if place is not None:
            factor = apart.sigmoid() if weight is None else apart.sigmoid().mul_(weight)
            own = head.weight.index_select(0, label).to(rows.sums.dtype)
            place.copy_(rows.mean().sub_(own).mul_(factor[:, None]))
    return torch.cat(found)


class _Store:
    """Memory that every block uses again.

    entries: of a block. made: of its logits, in the dtype of the products. wide: of some of its rows in float32; None:
    all are.
    """

    def __init__(self, head: Matrix, rows: int, logits: int) -> None:
        most = max(1, min(WIDEST, len(head.weight), logits // max(1, rows)))
        self.entries = most - most % ALIGNED if most > ALIGNED else most
        self.made = head.weight.new_empty(rows * self.entries, dtype=head.compute)
        narrow = head.compute.itemsize < 4
        self.wide = self.made.new_empty(min(rows, PIECE) * self.entries, dtype=torch.float32) if narrow else None


def _sums(head: Matrix, hidden: Tensor, labels: Tensor, store: _Store, *, gradient: bool) -> _Rows:
    """Some rows after all blocks."""

    def seen(shift: Tensor | None) -> _Rows:
        rows = _Rows(hidden, labels, store, shift, gradient=gradient)
        for block in head.blocks(store.entries):
            rows.add(*block)
        return rows

    own = head.weight.index_select(0, labels).to(hidden.dtype)
    near = own.mul_(hidden).sum(1).float()  # the label's logit, about
    del own
    rows = seen(None if bool((near.abs() <= NEAR).all()) else near)
    if bool((rows.total >= LARGE).logical_not().all()):  # what is no number stays none
        return rows
    rows.sums, largest = rows.sums[:0].clone(), torch.full_like(near, NONE)  # the first sums make room
    for block in head.blocks(store.entries):
        largest = torch.maximum(largest, rows.logits(*block).amax(1))
    return seen(largest)


class _Rows:
    """What some rows know of the blocks that they have seen.

    shift: (R,), what is taken from each logit before its exponential; None: nothing. total: (R,), the sum of these
    exponentials over all entries but the label. own: (R,), the label's logit. sums: (R, W), of the head's rows, each
    times its exponential.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, store: _Store, shift: Tensor | None, *, gradient: bool) -> None:
        self.hidden, self.labels, self.store, self.gradient = hidden, labels, store, gradient
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.shift = None if shift is None else shift.to(wide)[:, None]
        self.total, self.own = (hidden.new_zeros((len(hidden),), dtype=wide) for _ in range(2))
        self.sums = hidden.new_zeros(hidden.shape if gradient else (0,), dtype=wide)
        self.part = torch.empty_like(hidden) if gradient and hidden.dtype != wide else None  # of a block
        self.numbers = torch.arange(len(hidden), device=hidden.device)

    def add(self, start: int, weight: Tensor, bias: Tensor | None) -> None:
        """A block, (N, W), whose first entry is `start`."""
        made = self.logits(start, weight, bias)
        self._exponentials(made)
        if self.part is not None:
            self.sums.add_(torch.mm(made, weight, out=self.part).to(self.sums.dtype))
        elif self.gradient:
            torch.addmm(self.sums, made, weight, out=self.sums)  # which is counted as a product

    def _exponentials(self, made: Tensor) -> None:
        """Of logits, (R, N), in their place; adds them up."""
        wide, count = self.store.wide, made.shape[1]
        at_once = len(made) if wide is None else PIECE
        for begin in range(0, len(made), max(1, at_once)):
            part = made[begin : begin + at_once]
            scores = part if wide is None else wide[: len(part) * count].view(len(part), count).copy_(part)
            if self.shift is not None:
                scores.sub_(self.shift[begin : begin + at_once])
            self.total[begin : begin + at_once].add_(scores.exp_().sum(1))
            if wide is not None:
                part.copy_(scores)

    def logits(self, start: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Those of a block, (R, N), but of the labels, which are noted instead."""
        size = len(self.hidden), len(weight)
        made = self.store.made[: size[0] * size[1]].view(size)
        if bias is None:
            torch.mm(self.hidden, weight.t(), out=made)
        else:
            torch.addmm(bias.to(made.dtype), self.hidden, weight.t(), out=made)
        self._keep_labels_out(made, start)
        return made

    def _keep_labels_out(self, made: Tensor, start: int) -> None:
        """Note the logits of the labels in this block, and give them no share in it."""
        place, count = self.labels - start, made.shape[1]
        here = (place >= 0) & (place < count)
        place = place.clamp_(0, count - 1).add_(self.numbers, alpha=count)
        flat = made.view(-1)  # a scatter of 16 bits would take as long as a tenth of the product
        found = flat.index_select(0, place)
        self.own = torch.where(here, found.to(self.own.dtype), self.own)
        flat.index_copy_(0, place, found.masked_fill_(here, NONE))

    def log_total(self) -> Tensor:
        """(R,): the logarithm of the sum of exp(logit) over all entries but the label."""
        found = self.total.log()
        return found if self.shift is None else found.add_(self.shift[:, 0])

    def mean(self) -> Tensor:
        """(R, W): of the head's rows under the softmax of all entries but the label. Overwrites the sums."""
        return self.sums.div_(self.total.clamp_min(torch.finfo(self.total.dtype).tiny)[:, None])
