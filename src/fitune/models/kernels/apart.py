"""The documents of a flat batch one by one, for attention that is called for each of them.

In: q, k, v of all documents side by side, and which queries attend to which keys. Out: what attention gives. On a CPU
all calls are one autograd function around torch's flash kernel: it keeps q, k, v and what comes out, each once and as
they are, where autograd would keep what comes out of each call and once more all of it side by side. Values and
gradients are those of a call for each document, bit for bit.

On a CPU, products in 16 bits have a compiled kernel for each length (oneDNN's: 300 lengths held 60 MiB more within the
bounds of processor.py, 180 within torch's own, and took a third longer than one), so there a document gets rows behind
its own, up to a multiple of STEP, unless it is computed in float32 (`short.py`). They come later than all of its
tokens, which therefore do not see them; what attention gives for them is left out.

Shapes: H = query heads, K = key/value heads, T = tokens of all documents, Q = queries of all, L = of one, S = its keys
with its prefix, E = head width, k = prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fitune.models.kernels import flash, short, target

aten = torch.ops.aten
STEP = 32
KERNEL = (torch.float32, torch.float64, *flash.HALF)  # dtypes of torch's flash kernel on a CPU


@dataclass(frozen=True)
class Part:
    """Queries and keys of one document: `count` queries, which stand at the end of the keys first .. end - 1. Before
    these keys come `shared` others, from `lead` on, which are also keys of a document before it."""

    count: int
    first: int
    end: int
    lead: int = 0
    shared: int = 0

    @property
    def keys(self) -> int:
        """How many it has."""
        return self.end - self.first + self.shared

    @property
    def ahead(self) -> int:
        """How many keys stand before that of the first query."""
        return self.keys - self.count

    def of(self, one: Tensor) -> Tensor:
        """(1, K, S, E): its keys among those of all."""
        own = one[:, :, self.first : self.end]
        return torch.cat([one[:, :, self.lead : self.lead + self.shared], own], dim=2) if self.shared else own


# (L, S, how many keys stand before that of the first query) to what each query sees: (L, S) or (1, H, L, S), bool or
# added to the scores; None: all keys up to its own
Mask = Callable[[int, int, int], Tensor | None]
# (number of a document, its queries, keys, values, how many keys stand before that of the first query) to (1, H, L, E)
Call = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]


def whole(bounds: Sequence[int], shared: Sequence[int] | None = None) -> list[Part]:
    """Every document to itself, or behind so many rows of the nearest one before it that shares none."""
    own = [(start, end) for start, end in pairwise(bounds)]
    if shared is None:
        return [Part(end - start, start, end) for start, end in own]
    begins = flash.leads(np.array(bounds), np.array(shared)).tolist()
    return [
        Part(end - start, start, end, lead, count)
        for (start, end), lead, count in zip(own, begins, shared, strict=True)
    ]


def rows(length: int, query: Tensor) -> int:
    """How many rows a document of that length gets, where queries are like these."""
    compiled = target.of(query.device).kind == "cpu" and flash.computed_in(query) in flash.HALF
    return -(-length // STEP) * STEP if compiled else length


def one_by_one(
    query: Tensor,  # (1, H, Q, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E)
    parts: Sequence[Part],
    call: Call,
    prefix: Sequence[Tensor] = (),  # none, or two of (1, K, k, E)
) -> Tensor:
    """(1, Q, H, E): a call for each document, the prefix in front of its keys. Queries behind those of all documents
    are nobody's: they get zeros."""
    counts = [part.count for part in parts]
    more = query.shape[2] - sum(counts)
    # split, not slices: the backward pass of a slice writes zeros for all other documents
    queries = query.split([*counts, more], dim=2)[:-1]
    keys = zip(*(_keys_of(one, parts) for one in (key, value)), strict=True)
    ahead = prefix[0].shape[2] if prefix else 0
    outputs = []
    for number, (part, one, others) in enumerate(zip(parts, queries, keys, strict=True)):
        length, count = sizes(part, query)
        sides = [filled(other, count) for other in others]
        if prefix:
            sides = [torch.cat(pair, dim=2) for pair in zip(prefix, sides, strict=True)]
        outputs.append(call(number, filled(one, length), sides[0], sides[1], ahead + part.ahead)[:, :, : part.count])
    if more:
        outputs.append(outputs[0].new_zeros(1, query.shape[1], more, value.shape[3]))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _keys_of(one: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """The keys of each document."""
    spans = [((part.lead, part.lead + part.shared), (part.first, part.end)) for part in parts]
    edges = sorted({0, one.shape[2], *(edge for both in spans for span in both for edge in span)})
    pieces, at = one.split([b - a for a, b in pairwise(edges)], dim=2), {edge: n for n, edge in enumerate(edges)}
    found = []
    for both in spans:
        some = [piece for start, end in both for piece in pieces[at[start] : at[end]]]
        found.append(torch.cat(some, dim=2) if len(some) > 1 else some[0])
    return found


def sizes(part: Part, query: Tensor) -> tuple[int, int]:
    """How many queries and keys a document gets; the last query's own key is among them."""
    length = rows(part.count, query)
    return length, rows(part.ahead + length, query)


def filled(one: Tensor, size: int, before: int = 0) -> Tensor:
    """(1, H, L, E), with so many rows before its own, and rows behind them up to a size."""
    behind = size - before - one.shape[2]
    return F.pad(one, (0, 0, before, behind)) if before or behind else one


def without_the_rest(given: Sequence[Tensor]) -> list[Tensor]:
    """What is kept of queries, keys and values. Those that are parts of a larger tensor, which one layer gave, are
    copied where all of them together are not that tensor (rotary positions have replaced the others): it can go."""
    parts = [one for one in given if _span(one) > one.numel()]
    if sum(one.numel() for one in parts) >= max(map(_span, parts), default=0):
        return list(given)
    return [one.contiguous() if _span(one) > one.numel() else one for one in given]


def _span(one: Tensor) -> int:
    """Elements from its first to its last, those between its own too."""
    return 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))


def is_one_function(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Are all calls one function?"""
    same = query.shape[-1] == value.shape[-1]
    return target.of(query.device).kind == "cpu" and not dropout and same and flash.computed_in(query) in KERNEL


def attend(
    query: Tensor,  # (1, H, Q, E)
    key: Tensor,  # (1, K, T, E)
    value: Tensor,  # (1, K, T, E)
    parts: Sequence[Part],
    masks: Sequence[Mask],
    scale: float | None = None,
    prefix: Sequence[Tensor] = (),  # none, or two of (1, K, k, E)
) -> Tensor:
    """(1, Q, H, E): attention of every document, the prefix in front of its keys; of queries behind those zeros.

    Args:
        masks: one for all documents, or one of each; they are asked once more in the backward pass.
    """
    each = list(masks) * (len(parts) // len(masks))
    dtype = flash.computed_in(query)
    out: Tensor = _Attention.apply(parts, each, scale, *(one.to(dtype) for one in (query, key, value, *prefix)))
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Sequence[Part], masks: Sequence[Mask], scale: float | None, *given: Tensor) -> Tensor:
        query = given[0]
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        sums: list[Tensor] = []  # of each query's exponentials
        at = 0
        for part, mask in zip(parts, masks, strict=True):
            call = _OneCall.of(part, mask, given, at)
            found, one = aten._scaled_dot_product_flash_attention_for_cpu(*call.sides, 0.0, **call.how, scale=scale)
            out[:, call.here] = found[:, :, call.own].transpose(1, 2)
            sums.append(one)
            at += part.count
        out[:, at:] = 0
        ctx.parts, ctx.masks, ctx.scale, ctx.given = parts, masks, scale, len(given)
        kept = without_the_rest(given[:3]) if any(ctx.needs_input_grad) else given[:3]
        ctx.save_for_backward(*kept, *given[3:], out, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: what is recomputed is handed out once
        given, (out, *sums) = saved[: ctx.given], saved[ctx.given :]
        seen = sum(part.keys for part in ctx.parts) == given[1].shape[2] and not any(one.shared for one in ctx.parts)
        made = [torch.empty_like(given[0])]
        made += [torch.empty_like(one) if seen else torch.zeros_like(one) for one in given[1:3]]
        made += [torch.zeros_like(one) for one in given[3:]]
        at, grad = sum(part.count for part in ctx.parts), grads[0].contiguous()
        made[0][:, :, at:] = 0
        for part, mask, one in reversed(list(zip(ctx.parts, ctx.masks, sums, strict=True))):
            at -= part.count
            call = _OneCall.of(part, mask, given, at)
            back = [call.as_queries(side[:, call.here].transpose(1, 2)) for side in (grad, out)]
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                back[0], *call.sides, back[1], one, 0.0, **call.how, scale=ctx.scale
            )
            call.put(made, found, part, added=any(one.shared for one in ctx.parts))
        return None, None, None, *made


@dataclass(frozen=True)
class _OneCall:
    """The kernel's call for one document.

    sides: queries (1, H, L, E), keys and values (1, K, S, E). here: its queries among those of all; own: among L. how:
    what each query sees. The kernel skips what a plain causal mask hides, but not what another one does. So where keys
    stand before that of the first query, and fewer than there are queries, as many rows of zeros stand before the
    queries: more rows, and half the work. A short document in 16 bits is computed in float32 (`short.py`).
    """

    sides: list[Tensor]
    here: slice
    own: slice
    how: dict[str, Any]

    @classmethod
    def of(cls, part: Part, mask: Mask, given: Sequence[Tensor], at: int) -> _OneCall:
        """The call of a document whose queries begin at `at`."""
        query, *keys = given[:3]
        prefix = given[3].shape[2] if given[3:] else 0
        own, first = part.keys, prefix + part.ahead
        # one token shows whether every document has a mask (ALiBi), which need not be made to see that
        plain = mask(1, 1, 0) is None and short.suits(query, prefix + own)
        wide = plain and mask(part.count, prefix + own, first) is None
        length, count = (part.count, own) if wide else sizes(part, query)
        lead, seen = 0, None
        if not wide:
            before = rows(first + part.count, query)
            if 0 < first < part.count and mask(before, before, 0) is None:
                lead, length, count = first, before, before - prefix
            else:
                seen = mask(length, prefix + count, first)
        sides = [filled(part.of(one), count) for one in keys]
        if prefix:
            sides = [torch.cat(pair, dim=2) for pair in zip(given[3:], sides, strict=True)]
        if seen is not None and seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        here = slice(at, at + part.count)
        how = {"is_causal": seen is None and length > 1, "attn_mask": seen}
        sides = [filled(query[:, :, here], length, lead), *sides]
        return cls([one.float() for one in sides] if wide else sides, here, slice(lead, lead + part.count), how)

    def as_queries(self, one: Tensor) -> Tensor:
        """(1, H, L, E) of what stands beside a document's own queries."""
        query = self.sides[0]
        return filled(one, query.shape[2], self.own.start).to(query.dtype)

    def put(self, made: Sequence[Tensor], found: Sequence[Tensor], part: Part, *, added: bool) -> None:
        """Gradients of a document, to their places among those of all; added: to what stands there."""
        made[0][:, :, self.here] = found[0][:, :, self.own]
        length = part.end - part.first
        for number in (1, 2):
            prefix = made[number + 2].shape[2] if len(made) > 3 else 0
            begin = prefix + part.shared
            # documents come from the last to the first: what is shared was added to before its own document comes
            place = made[number][:, :, part.first : part.end]
            (place.add_ if added else place.copy_)(found[number][:, :, begin : begin + length])
            if part.shared:
                made[number][:, :, part.lead : part.lead + part.shared] += found[number][:, :, prefix:begin]
            if prefix:
                made[number + 2].add_(found[number][:, :, :prefix])
