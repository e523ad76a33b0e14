"""Pairs: two samples with one prompt, as one row of a batch.

In: samples, two a row; what the reference model gives them. Out: a sequence of pairs, and how both samples of a row are
cut, so that they keep one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fitune.core.records import Pair, Sample

Side = Callable[[int | None], Sample | None]  # a sample, by its max_length; None: nothing of it would be trained


def cut(sides: Sequence[Side], limit: int | None, *, alike: bool) -> list[Sample]:
    """Both samples of a row, none longer than a limit; none where one has nothing to train.

    Args:
        sides: of the chosen and of the rejected answer.
        limit: in tokens; None: nothing is cut.
        alike: the longer one decides what is cut of the prompt; the other loses as much of it, and nothing of its
            answer.
    """
    made = _all([side(None) for side in sides])
    excess = max(map(len, made), default=0) - (limit or 0)
    if limit is not None and excess > 0:
        room = [max(len(sample) - excess, min(sample.needed, limit)) if alike else limit for sample in made]
        made = _all([side(each) for side, each in zip(sides, room, strict=True)])
    shared = _same(*made) if made else 0
    return [replace(sample, shared=shared, weights=None) for sample in made]


def _all(made: Sequence[Sample | None]) -> list[Sample]:
    found = [sample for sample in made if sample is not None]
    return found if len(found) == len(made) else []


def _same(first: Sample, second: Sample) -> int:
    """How many ids of their prompts are the same."""
    length = min(first.prompt_length, second.prompt_length)
    differ = np.flatnonzero(first.ids[:length] != second.ids[:length])
    return int(differ[0]) if len(differ) else length


def common(shared: NDArray[np.int32], prompts: NDArray[np.int32]) -> NDArray[np.int32]:
    """(R,): how many first tokens of both samples of a pair a model computes once: the prompt but for its last token,
    which gives the first token of each answer, and so stands before each. A pair whose prompts differ has none.

    Args:
        shared: (2 R,), of each sample how many ids of its prompt are the other one's, too.
        prompts: (2 R,), how many ids its prompt has.
    """
    both = prompts.reshape(-1, 2)
    whole = (both == shared.reshape(-1, 2)).all(axis=1)
    return np.where(whole, np.maximum(both[:, 0], 1) - 1, 0).astype(np.int32)


def _within(shared: NDArray[np.int32], lengths: NDArray[Any]) -> NDArray[np.int32]:
    """(R,): how much of it is left of samples that are cut to these lengths, (2 R,): each keeps a token of its own."""
    left: NDArray[np.int32] = np.minimum(shared, np.maximum(lengths.reshape(-1, 2).min(axis=1), 1) - 1).astype(np.int32)
    return left


class Pairs(Sequence[Pair]):
    """Rows of preferences.

    Args:
        samples: two a row: chosen, rejected, chosen, ...
        reference: (R, 2), log-probabilities of each row's answers by the reference model; None: nobody computed them.
        desirable: (R,), of labelled answers, whose second sample only says how far the model is from the reference;
            None: these are pairs.
        common: (R,), so many first tokens of both samples of a pair stand once in a batch (`common`); None: of none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        reference: NDArray[np.float32] | None = None,
        desirable: NDArray[np.bool_] | None = None,
        common: NDArray[np.int32] | None = None,
    ) -> None:
        self.samples, self.reference, self.desirable, self.common = samples, reference, desirable, common

    def with_reference(self, reference: NDArray[np.float32]) -> Pairs:
        """The same rows, with what the reference model gives them."""
        return Pairs(self.samples, reference, self.desirable, self.common)

    def of(self, samples: Sequence[Sample]) -> Pairs:
        """The same rows of samples that are cut."""
        if samples is self.samples:
            return self
        left = None if self.common is None else _within(self.common, np.array([len(one) for one in samples], np.int32))
        return Pairs(samples, self.reference, self.desirable, left)

    def apart(self) -> Pairs:
        """The same rows, each sample with a prompt of its own."""
        return Pairs(self.samples, self.reference, self.desirable)

    def supposed(self) -> Pairs:
        """The same rows, as if the reference gave 0 to every answer: for plans, in which no value counts but that it is
        a number."""
        return self.with_reference(np.zeros((len(self), 2), np.float32))

    def lengths(self, each: NDArray[Any]) -> NDArray[Any]:
        """Tokens that a row has in a batch, by those of each sample."""
        both = each.reshape(-1, 2)
        if self.desirable is not None:
            return both[:, 0]
        sums = both.sum(axis=1, dtype=each.dtype)
        found: NDArray[Any] = sums if self.common is None else sums - _within(self.common, each)
        return found

    def __len__(self) -> int:
        return len(self.samples) // 2

    @overload
    def __getitem__(self, at: int) -> Pair: ...
    @overload
    def __getitem__(self, at: slice) -> list[Pair]: ...
    def __getitem__(self, at: int | slice) -> Pair | list[Pair]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        at = range(len(self))[at]  # from the end, too
        reference = None if self.reference is None else (float(self.reference[at, 0]), float(self.reference[at, 1]))
        desirable = None if self.desirable is None else bool(self.desirable[at])
        common = 0 if self.common is None else int(self.common[at])
        return Pair(self.samples[2 * at], self.samples[2 * at + 1], reference, desirable, common)

    def __iter__(self) -> Iterator[Pair]:
        return (self[n] for n in range(len(self)))
