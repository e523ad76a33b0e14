"""Cross-entropy over the rows that carry a label, never all of their logits at once.

In: hidden states of the label rows, their labels, the model's head. Out: the sum of the losses, in float32. The
gradient with respect to the hidden states (and to the head, where that is trained) is computed in the forward pass, and
only scaled in the backward pass. The idea is known from "Cut Your Losses" (Wijmans et al. 2024, arXiv:2411.09009) and
Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).

The head is any module, quantized or wrapped in an adapter too: a chunk of rows goes through it, and autograd computes
what of a chunk is not its logits (`softmax.py` has those). On a CPU a frozen head that is no more than a matrix goes by
blocks of the vocabulary (`frozen_head.py`).

Shapes: L = label rows, W = width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fitune.core.units import MIB
from fitune.models.kernels import frozen_head, fused, softmax
from fitune.models.kernels.frozen import Frozen, StoredLinear
from fitune.models.kernels.frozen_head import Matrix
from fitune.models.kernels.target import CPU, Target, of

Hook = TypeVar("Hook", bound=Callable[..., Any])
CHUNK_BYTES = 32 * MIB  # float32 logits of one chunk; their gradient takes as much again
LOOKS_ON = "fitune_looks_on"
LEAST = {"cuda": 512}  # rows for which the head is read; fewer than this, and a GPU reads more than it computes


def chunk_rows(vocabulary: int, target: Target = CPU) -> int:
    """Rows whose float32 logits fill a chunk, or the fewest for a kind of device; a power of two, so that of few sizes
    few are left."""
    return max(LEAST.get(target.kind, 1), 1 << max(1, CHUNK_BYTES // (4 * vocabulary)).bit_length() - 1)


def at_once(rows: int, vocabulary: int, target: Target = CPU) -> int:
    """Logits that are there at once under a frozen head: those of so many rows, on a CPU never more than a block."""
    return min(rows * vocabulary, frozen_head.LOGITS) if target.kind == "cpu" else rows * vocabulary


@dataclass(frozen=True)
class _Rows:
    """Those of a loss. hidden: (L, W). labels: (L,). weights: (L,); None: 1 for all. at_once: in a chunk."""

    hidden: Tensor
    labels: Tensor
    weights: Tensor | None
    at_once: int

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Where each chunk stands; its hidden states, labels and weights."""
        for start in range(0, len(self.labels), self.at_once):
            here = slice(start, start + self.at_once)
            yield here, self.hidden[here], self.labels[here], None if self.weights is None else self.weights[here]


class _Gradients:
    """What the chunks of a loss add up to. hidden: (L, W). weights: of what is trained in the head."""

    def __init__(self, hidden: Tensor, trained: Sequence[Tensor]) -> None:
        self.hidden = torch.empty_like(hidden)
        self.trained, self.weights = trained, list[Tensor]()

    def add(self, here: slice, hidden: Tensor, *weights: Tensor) -> None:
        """Those of a chunk."""
        self.hidden[here] = hidden
        if not self.weights:
            self.weights = list(weights)
            return
        for total, one in zip(self.weights, weights, strict=True):
            total.add_(one)

    def all(self) -> list[Tensor]:
        """Of everything; zeros where no row has a label."""
        return [self.hidden, *(self.weights or map(torch.zeros_like, self.trained))]


def as_matrix(head: nn.Module, hidden: Tensor, *, gradient: bool) -> Matrix | None:
    """A head as a matrix, on a CPU, if it is no more than that and nothing of it is trained here."""
    plain = type(head) is nn.Linear
    if of(hidden.device).kind != "cpu" or not (plain or type(head) is StoredLinear) or _is_changed(head):
        return None
    if gradient and any(one.requires_grad for one in head.parameters()):
        return None
    weight, bias = cast(Tensor, head.weight).detach(), cast("Tensor | None", head.bias)
    compute = hidden.dtype
    if torch.is_autocast_enabled("cpu"):
        compute = torch.get_autocast_dtype("cpu")
    elif plain and weight.dtype != compute:
        return None  # the head itself will report it
    return Matrix(weight, None if bias is None else bias.detach(), compute)


def _is_changed(head: nn.Module) -> bool:
    """Does a layer give something else than its class does?"""
    hooks = *head._forward_hooks.values(), *head._forward_pre_hooks.values()
    return "forward" in vars(head) or not all(getattr(hook, LOOKS_ON, False) for hook in hooks)


def looks_on(hook: Hook) -> Hook:
    """Marks a hook of a module that changes nothing: the module may be computed in another way, and the hook not be
    called."""
    setattr(hook, LOOKS_ON, True)
    return hook


# ---- any head ----


def _by_module(head: nn.Module, rows: _Rows, grads: _Gradients | None, trained: Sequence[Tensor]) -> Tensor:
    """The same, by autograd."""
    total = rows.hidden.new_zeros((), dtype=torch.float32)
    for here, hidden, labels, weights in rows.chunks():
        with torch.set_grad_enabled(grads is not None):
            leaf = hidden.detach().requires_grad_(grads is not None)
            loss, start, slope = _chunk(head, leaf, labels, weights)
        total += loss.detach()
        if grads is not None:
            grads.add(here, *torch.autograd.grad(start, (leaf, *trained), slope))
        del loss, start, slope  # the next chunk's logits come in their place
    return total


def _sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    """In float32."""
    return (losses if weights is None else losses * weights).sum(dtype=torch.float32)


def _chunk(
    head: nn.Module, hidden: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of a chunk; where the backward pass begins, with which gradient."""
    logits = head(hidden)
    own = type(head) is nn.Linear or isinstance(head, Frozen)  # another module may need what it gave
    if fused.used(logits, widest=2**31):
        loss = fused.cross_entropy(logits, labels, weights, ours=own)
        return loss, loss, None
    given, gradient = logits.detach(), logits.requires_grad
    slope = given if own and given.dtype.itemsize < 4 else given.clone()  # wide ones are read again
    losses = softmax.in_place(slope, labels, softmax.reader(given), weights, gradient=gradient)
    return _sum(losses, weights), logits, slope


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses; the gradients are ready when forward returns."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, rows: _Rows, hidden: Tensor, *trained: Tensor) -> Tensor:
        grads = _Gradients(hidden, trained)
        total = _summed(head, rows, grads, trained)
        ctx.save_for_backward(*grads.all())
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        hidden_grad, *weight_grads = ctx.saved_tensors
        return None, None, hidden_grad * scale, *(grad * scale for grad in weight_grads)


def _summed(head: nn.Module, rows: _Rows, grads: _Gradients | None, trained: Sequence[Tensor]) -> Tensor:
    matrix = as_matrix(head, rows.hidden, gradient=grads is not None)
    if matrix is None:
        return _by_module(head, rows, grads, trained)
    place, most = None if grads is None else grads.hidden, at_once(rows.at_once, len(matrix.weight))
    losses = frozen_head.losses(matrix, rows.hidden, rows.labels, most, rows.weights, place)
    return _sum(losses, rows.weights)


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
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    given = _Rows(hidden.detach(), labels, loss_weights, rows or chunk_rows(vocabulary, of(hidden.device)))
    if torch.is_grad_enabled() and (hidden.requires_grad or trained):
        loss: Tensor = _ChunkedLoss.apply(head, given, hidden, *trained)
        return loss
    with torch.no_grad():
        return _summed(head, given, None, trained)
