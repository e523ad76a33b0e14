"""Attention in its parts, where torch has no kernel for it: a soft cap on the scores (Gemma 2, arXiv:2408.00118),
sinks (gpt-oss), and on a CPU dropout on the weights.

In: q, k, v of a document, or of all documents of a flat batch. Out: what attention gives. Of a batch all documents are
one autograd function, which keeps q, k and v once, and makes scores and weights again in the backward pass: autograd
would keep several tensors of (H, L, S) for every document, and keys and values once for every query head. What dropout
drew is drawn again, from the state that the generator had: 5 KB, however many weights there are.

Shapes: H = query heads, K = key/value heads, L = rows of a document, S = its keys, E = head width, k = prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fitune.models.kernels import apart, flash, target


@dataclass(frozen=True)
class How:
    """See `attention.flat_attention`. scaling None: 1 / sqrt(E)."""

    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


Mask = Callable[[int, int, int], Tensor]  # (L, S, keys before that of the first query) to (L, S): True where it sees


def suits(query: Tensor, how: How) -> bool:
    """Is a batch of such queries computed by this module?"""
    if how.softcap is None and how.sinks is None:
        return bool(how.dropout) and target.of(query.device).kind == "cpu"
    return not how.dropout or target.of(query.device).kind == "cpu"  # a GPU has another generator


@dataclass(frozen=True)
class _Weights:
    """Of one document. bent: tanh of the scores, where they are capped. plain: (1, H, L, S), the softmax, float32.
    sinks: (1, H, L), that of seeing nothing. drawn: the factors of dropout."""

    bent: Tensor | None
    plain: Tensor
    sinks: Tensor | None
    drawn: Tensor | None

    @classmethod
    def of(cls, query: Tensor, keys: Tensor, mask: Tensor | None, how: How) -> _Weights:
        """Of queries (1, H, L, E) and keys (1, H, S, E)."""
        scores = query @ keys.transpose(-1, -2) * scale(how, query)
        bent = None
        if how.softcap is not None:
            bent = torch.tanh(scores / how.softcap)
            scores = bent * how.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        sinks = None
        if how.sinks is None:
            plain = scores.softmax(dim=-1, dtype=torch.float32)
        else:
            column = how.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
            whole = torch.cat([scores, column], dim=-1).softmax(dim=-1, dtype=torch.float32)
            plain, sinks = whole[..., :-1], whole[..., -1]
        drawn = None
        if how.dropout:
            drawn = torch.empty_like(plain, dtype=query.dtype).bernoulli_(1 - how.dropout).div_(1 - how.dropout)
        return cls(bent, plain, sinks, drawn)

    def taken(self, dtype: torch.dtype) -> Tensor:
        """What values are multiplied with."""
        weights = self.plain.to(dtype)
        return weights if self.drawn is None else weights * self.drawn


def scale(how: How, query: Tensor) -> float:
    """What scores are multiplied with."""
    return how.scaling or query.shape[-1] ** -0.5


def _heads(one: Tensor, query: Tensor) -> Tensor:
    """(1, H, S, E) of keys or values."""
    groups = query.shape[1] // one.shape[1]
    return one if groups == 1 else one.repeat_interleave(groups, dim=1)


def of_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """Attention of one document: (1, H, L, E)."""
    weights = _Weights.of(query, _heads(key, query), mask, how)
    return weights.taken(query.dtype) @ _heads(value, query)


def attend(
    query: Tensor,  # (1, H, Q, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E)
    parts: Sequence[apart.Part],
    mask: Mask,
    how: How,
    prefix: Sequence[Tensor] = (),  # none, or two of (1, K, k, E)
) -> Tensor:
    """(1, Q, H, E): attention of every document, the prefix in front of its keys; mask is asked twice."""
    dtype = flash.computed_in(query)
    given = [one.to(dtype) for one in (query, key, value, *prefix)]
    out: Tensor = _Written.apply(parts, mask, how, how.sinks, *given)
    return out


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[apart.Part], mask: Mask, how: How, sinks: Tensor | None, *given: Tensor
    ) -> Tensor:
        ctx.parts, ctx.mask, ctx.how = parts, mask, how
        draws = how.dropout and any(ctx.needs_input_grad)
        ctx.drawn_from = torch.get_rng_state().numpy().copy() if draws else None
        kept = apart.without_the_rest(given[:3]) if any(ctx.needs_input_grad) else given[:3]
        ctx.save_for_backward(sinks, *kept, *given[3:])

        def call(number: int, query: Tensor, key: Tensor, value: Tensor, ahead: int) -> Tensor:
            return of_one(query, key, value, mask(query.shape[2], key.shape[2], ahead), how)

        return apart.one_by_one(given[0], given[1], given[2], parts, call, given[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sinks, *given = ctx.saved_tensors
        made = [torch.zeros_like(one, memory_format=torch.contiguous_format) for one in given]
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        at, grad = 0, grads[0].transpose(1, 2)  # (1, H, Q, E)
        with _drawing_from(ctx.drawn_from):
            for part in ctx.parts:  # in the order of the forward pass, since they draw
                found = _Back.of(part, given, at, grad, ctx.mask, ctx.how)
                found.put(made, part, at)
                if of_sinks is not None and found.sinks is not None:
                    of_sinks += found.sinks
                at += part.count
        return None, None, None, None if sinks is None or of_sinks is None else of_sinks.to(sinks.dtype), *made


@contextmanager
def _drawing_from(state: NDArray[np.uint8] | None) -> Iterator[None]:
    """Inside, torch's generator goes on from that state; afterwards from where it was."""
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.from_numpy(state))
        yield


@dataclass(frozen=True)
class _Back:
    """Gradients of one document: of queries (1, H, L, E), of keys and values (1, K, S, E), of sinks (H,)."""

    query: Tensor
    keys: Sequence[Tensor]
    sinks: Tensor | None

    @classmethod
    def of(cls, part: apart.Part, given: Sequence[Tensor], at: int, grad: Tensor, mask: Mask, how: How) -> _Back:
        """Of a document whose queries begin at `at`, by the gradient of what comes out for all, (1, H, Q, E)."""
        length, count = apart.sizes(part, given[0])
        query, back = (apart.filled(t[:, :, at : at + part.count], length) for t in (given[0], grad))
        sides = [apart.filled(part.of(t), count) for t in given[1:3]]
        if given[3:]:
            sides = [torch.cat(pair, dim=2) for pair in zip(given[3:], sides, strict=True)]
        key, value = (_heads(side, query) for side in sides)
        ahead = part.ahead + (given[3].shape[2] if given[3:] else 0)
        weights = _Weights.of(query, key, mask(length, key.shape[2], ahead), how)
        value_grad = weights.taken(query.dtype).transpose(-1, -2) @ back
        arrived = back @ value.transpose(-1, -2)
        if weights.drawn is not None:
            arrived = arrived * weights.drawn
        arrived = arrived.float()
        sums = (arrived * weights.plain).sum(-1, keepdim=True)
        scores = (weights.plain * (arrived - sums)).to(query.dtype)
        if weights.bent is not None:
            scores = scores * (1 - weights.bent * weights.bent)
        scores = scores * scale(how, query)
        sinks = None if weights.sinks is None else -(weights.sinks * sums[..., 0])[:, :, : part.count].sum((0, 2))
        key_grad = scores.transpose(-1, -2) @ query
        folded = [_folded(one, sides[0].shape[1]) for one in (key_grad, value_grad)]
        return cls(scores @ key, folded, sinks)

    def put(self, made: Sequence[Tensor], part: apart.Part, at: int) -> None:
        """To their places among those of all documents."""
        made[0][:, :, at : at + part.count] = self.query[:, :, : part.count]
        for number, found in enumerate(self.keys, 1):
            prefix = made[number + 2].shape[2] if len(made) > 3 else 0
            own = prefix + part.shared
            made[number][:, :, part.first : part.end] += found[:, :, own : own + part.end - part.first]
            if part.shared:
                made[number][:, :, part.lead : part.lead + part.shared] += found[:, :, prefix:own]
            if prefix:
                made[number + 2] += found[:, :, :prefix]


def _folded(grad: Tensor, heads: int) -> Tensor:
    """(1, K, S, E): the sum over the query heads that share a key's."""
    times = grad.shape[1] // heads
    return grad if times == 1 else grad.unflatten(1, (heads, times)).sum(2)
