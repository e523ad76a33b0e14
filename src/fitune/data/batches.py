"""Samples to batches: the one place of the label shift, and of the order of the rows.

In: samples, a seed. Out: for each optimizer step a list of micro-batches. A batch is a flat list of documents with
their bounds: no padding, positions restart in each document, a label never comes from the next document. What is not
trained has no label row at all, so there is no ignore index anywhere after this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fitune.core.records import Answers, Batch, Pair, Sample, Units
from fitune.data.sharing import shares
from fitune.data.store import lengths_of

WINDOW = 50  # micro-batches that are sorted by length together
# A number of tokens is rounded up to a multiple of a power of two that is at most a 32nd of it: 32 sizes from one power
# of two to the next, and on average 1 % more work. LEAST: the multiple below 128 tokens; MOST: the one from 4,096 on.
PARTS, LEAST, MOST = 32, 4, 128


def rounded(count: int) -> int:
    """The size that so many tokens, or rows, are filled up to.

    Every number of tokens that a model meets costs a compiled kernel for each of its shapes on a CPU, and blocks of its
    own in a GPU's allocator; few sizes cost few.
    """
    step = min(MOST, max(LEAST, 1 << max(0, (count // PARTS).bit_length() - 1)))
    return -(-count // step) * step


def flat(samples: Units, rows: Iterable[int]) -> Batch:
    """The rows as one flat batch.

    Args:
        samples: all samples, or pairs of them.
        rows: which of them, in this order.
    """
    rows = [int(row) for row in rows]
    chosen = [samples[row] for row in rows]
    pairs = [one for one in chosen if isinstance(one, Pair)]
    return _of_pairs(pairs, rows) if pairs else _of_samples([one for one in chosen if isinstance(one, Sample)], rows)


def _of_pairs(pairs: Sequence[Pair], rows: Sequence[int]) -> Batch:
    """Both samples of each pair; of labelled answers those that are labelled, and beside them a batch of the others."""
    reference = np.array([pair.reference or (np.nan, np.nan) for pair in pairs], np.float32)
    if pairs[0].desirable is None:
        shared = np.array([count for pair in pairs for count in (0, pair.common)], np.int32)
        sides = [side for pair in pairs for side in (pair.chosen, pair.rejected.part(slice(pair.common, None)))]
        both = _of_samples(sides, rows, shared if shared.any() else None)
        return replace(both, answers=Answers(_documents(both), reference.reshape(-1)))
    own, others = (_of_samples(some, rows) for some in ([p.chosen for p in pairs], [p.rejected for p in pairs]))
    others = replace(others, answers=Answers(_documents(others), reference[:, 1]))
    marks = np.array([bool(pair.desirable) for pair in pairs])
    return replace(own, answers=Answers(_documents(own), reference[:, 0], marks, others))


def _documents(batch: Batch) -> NDArray[np.int64]:
    """Of each label the number of its document."""
    return np.searchsorted(batch.bounds, batch.label_rows, side="right") - 1


def _of_samples(chosen: Sequence[Sample], rows: Sequence[int], shared: NDArray[np.int32] | None = None) -> Batch:
    """Args: shared: of each sample, as Batch has it; the samples are without it."""
    lengths = [len(sample) for sample in chosen]
    starts = np.zeros(len(chosen), np.int32) if shared is None else shared
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([sample.ids for sample in chosen]).astype(np.int64)
    trained = np.concatenate([sample.mask for sample in chosen]).copy()
    trained[bounds[:-1]] = False  # a document's first token has nothing before it
    targets = np.flatnonzero(trained)
    weights = None
    if any(sample.weights is not None for sample in chosen):
        each = [np.ones(len(s), np.float32) if s.weights is None else s.weights for s in chosen]
        weights = np.concatenate(each)[targets]
    return Batch(
        ids=ids,
        positions=np.concatenate([np.arange(n, n + count) for n, count in zip(starts, lengths, strict=True)]).astype(
            np.int64
        ),
        bounds=bounds,
        label_rows=targets - 1,
        labels=ids[targets],
        rows=tuple(rows),
        weights=weights,
        shared=shared,
    )


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch as so many smaller ones (at most one a row), every row whole in one of them."""
    count = len(batch.rows)
    edges = np.unique(np.linspace(0, count, min(parts, count) + 1).round().astype(int))
    return [_part(batch, first, last) for first, last in pairwise(edges.tolist())]


def _part(batch: Batch, first: int, last: int) -> Batch:
    """The rows from `first` to before `last`."""
    each = (len(batch.bounds) - 1) // len(batch.rows)  # documents of a row
    start, end = int(batch.bounds[each * first]), int(batch.bounds[each * last])
    here = (batch.label_rows >= start) & (batch.label_rows < end)
    return Batch(
        ids=batch.ids[start:end],
        positions=batch.positions[start:end],
        bounds=batch.bounds[each * first : each * last + 1] - start,
        label_rows=batch.label_rows[here] - start,
        labels=batch.labels[here],
        rows=batch.rows[first:last],
        weights=None if batch.weights is None else batch.weights[here],
        answers=None if batch.answers is None else _part_of(batch.answers, each, here, (first, last)),
        shared=None if batch.shared is None else batch.shared[each * first : each * last],
    )


def _part_of(answers: Answers, each: int, here: NDArray[np.bool_], rows: tuple[int, int]) -> Answers:
    first, last = rows
    return Answers(
        of=answers.of[here] - each * first,
        reference=answers.reference[each * first : each * last],
        desirable=None if answers.desirable is None else answers.desirable[first:last],
        mismatched=None if answers.mismatched is None else _part(answers.mismatched, first, last),
    )


@dataclass(frozen=True)
class Loader:
    """Deterministic batches: what a step holds follows from the seed and the step's number alone.

    Args:
        samples: the training samples, or pairs of them.
        batch_size: rows per micro-batch.
        accumulation: micro-batches per optimizer step.
        seed: decides the order.
        batch_tokens: tokens per micro-batch, instead of rows. A longer row is a micro-batch of its own.
        by_length: rows of about the same length share a micro-batch, for models that need padding.
    """

    samples: Units
    batch_size: int
    accumulation: int
    seed: int
    batch_tokens: int | None = None
    by_length: bool = False

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch, each exactly once."""
        rows = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        if not self.by_length:
            return rows
        # Sorted within windows of many batches: near lengths meet, and no two epochs are alike.
        window = self.batch_size * WINDOW
        longest_first = np.lexsort((-lengths_of(self.samples)[rows], np.arange(len(rows)) // window))
        return rows[longest_first]

    def epoch_steps(self, epoch: int) -> list[list[NDArray[np.int64]]]:
        """The epoch's optimizer steps, each a list of micro-batches, each an array of rows."""
        micro = self._micro(epoch)
        steps = [micro[n : n + self.accumulation] for n in range(0, len(micro), self.accumulation)]
        if self.by_length:  # the longest first would be an order that teaches; the steps are shuffled again
            np.random.default_rng([self.seed, epoch, 1]).shuffle(steps)
        return steps

    def _micro(self, epoch: int) -> list[NDArray[np.int64]]:
        order = self.order(epoch)
        if self.batch_tokens is None:
            return [order[n : n + self.batch_size] for n in range(0, len(order), self.batch_size)]
        starts, room = [0], self.batch_tokens
        for at, length in enumerate(lengths_of(self.samples)[order].tolist()):
            if length > room and at > starts[-1]:
                starts.append(at)
                room = self.batch_tokens
            room -= length
        return [order[start:end] for start, end in pairwise([*starts, len(order)])]

    def count(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        micro = len(self._micro(epoch)) if self.batch_tokens else -(-len(self.samples) // self.batch_size)
        return -(-micro // self.accumulation)

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, at least one."""
        whole = sum(self.count(epoch) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        return max(1, whole + (round(part * self.count(int(epochs))) if part else 0))

    def steps(self, start: int, end: int) -> Iterator[tuple[float, list[Batch]]]:
        """The optimizer steps start .. end - 1 (from 0, over all epochs), with the epochs that lie behind each."""
        number, epoch = 0, 0
        while number < end:
            count = self.count(epoch)
            steps = self.epoch_steps(epoch) if number + count > start else []
            for at, micro in enumerate(steps):
                if start <= number + at < end:
                    yield epoch + (at + 1) / count, [flat(self.samples, rows) for rows in micro]
            number, epoch = number + count, epoch + 1

    def share(self, step: Sequence[Batch], rank: int, ranks: int) -> list[Batch]:
        """The rows of a step that one of several processes takes, in micro-batches as large as those of the step."""
        rows = np.array([row for batch in step for row in batch.rows], np.int64)
        return [flat(self.samples, mine) for mine in self.shares(rows, ranks)[rank]]

    def shares(self, rows: NDArray[np.int64], ranks: int) -> list[list[NDArray[np.int64]]]:
        """For each process the micro-batches, as arrays of rows, that it takes of a step."""
        lengths = lengths_of(self.samples)[rows].tolist()
        return [[rows[group] for group in self._groups(mine, lengths)] for mine in shares(lengths, ranks)]

    def _groups(self, mine: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """These places in a step, in micro-batches."""
        groups: list[list[int]] = []
        tokens = 0
        for place in mine:
            tokens += lengths[place]
            full = len(groups[-1]) == self.batch_size if groups else True
            if self.batch_tokens is not None:
                full = not groups or tokens > self.batch_tokens
            if full:
                groups.append([])
                tokens = lengths[place]
            groups[-1].append(place)
        return groups


def in_order(samples: Units, batch_size: int, *, by_length: bool = False) -> Iterator[Batch]:
    """All samples once, for evaluation: in their order, or for models that need padding the longest first."""
    order = np.argsort(-lengths_of(samples), kind="stable") if by_length else np.arange(len(samples))
    for start in range(0, len(samples), batch_size):
        yield flat(samples, order[start : start + batch_size])
