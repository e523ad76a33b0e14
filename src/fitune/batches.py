"""Samples to batches: the one place of the label shift, and of the order of the rows.

In: samples, a seed. Out: for each optimizer step a list of micro-batches. A batch is a flat list of documents with
their bounds: no padding, positions restart in each document, a label never comes from the next document. What is not
trained has no label row at all, so there is no ignore index anywhere after this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fitune.records import Batch, Sample

WINDOW = 50  # micro-batches that are sorted by length together


def flat(samples: Sequence[Sample], rows: Sequence[int]) -> Batch:
    """The rows as one flat batch.

    Args:
        samples: all samples.
        rows: which of them, in this order.
    """
    chosen = [samples[row] for row in rows]
    lengths = [len(sample) for sample in chosen]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([sample.ids for sample in chosen]).astype(np.int64)
    trained = np.concatenate([sample.mask for sample in chosen]).copy()
    trained[bounds[:-1]] = False  # a document's first token has nothing before it
    targets = np.flatnonzero(trained)
    return Batch(
        ids=ids,
        positions=np.concatenate([np.arange(length) for length in lengths]).astype(np.int64),
        bounds=bounds,
        label_rows=targets - 1,
        labels=ids[targets],
        rows=tuple(int(row) for row in rows),
    )


@dataclass(frozen=True)
class Loader:
    """Deterministic batches: what a step holds follows from the seed and the step's number alone.

    Args:
        samples: the training samples.
        batch_size: rows per micro-batch.
        accumulation: micro-batches per optimizer step.
        seed: decides the order.
        batch_tokens: tokens per micro-batch, instead of rows. A longer row is a micro-batch of its own.
        by_length: rows of about the same length share a micro-batch, for models that need padding.
    """

    samples: Sequence[Sample]
    batch_size: int
    accumulation: int
    seed: int
    batch_tokens: int | None = None
    by_length: bool = False

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, each exactly once."""
        random = np.random.default_rng([self.seed, epoch])
        rows = [int(row) for row in random.permutation(len(self.samples))]
        if not self.by_length:
            return rows
        # Sorted within windows of many batches: near lengths meet, and no two epochs are alike.
        window = self.batch_size * WINDOW
        windows = [rows[n : n + window] for n in range(0, len(rows), window)]
        return [row for some in windows for row in sorted(some, key=lambda row: -len(self.samples[row]))]

    def epoch_steps(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's optimizer steps, each a list of micro-batches, each a list of rows."""
        micro = self._by_tokens(self.order(epoch)) if self.batch_tokens else self._by_rows(self.order(epoch))
        steps = [micro[n : n + self.accumulation] for n in range(0, len(micro), self.accumulation)]
        if self.by_length:  # the longest first would be an order that teaches; the steps are shuffled again
            np.random.default_rng([self.seed, epoch, 1]).shuffle(steps)
        return steps

    def _by_rows(self, order: list[int]) -> list[list[int]]:
        return [order[n : n + self.batch_size] for n in range(0, len(order), self.batch_size)]

    def _by_tokens(self, order: list[int]) -> list[list[int]]:
        micro: list[list[int]] = []
        room = 0
        for row in order:
            length = len(self.samples[row])
            if not micro or length > room:
                micro.append([])
                room = self.batch_tokens or 0
            micro[-1].append(row)
            room -= length
        return micro

    def total_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, at least one."""
        whole = sum(len(self.epoch_steps(epoch)) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        return max(1, whole + (round(part * len(self.epoch_steps(int(epochs)))) if part else 0))

    def steps(self, start: int, end: int) -> Iterator[tuple[float, list[Batch]]]:
        """The optimizer steps start .. end - 1 (from 0, over all epochs), with the epochs that lie behind each."""
        number, epoch = 0, 0
        while number < end:
            steps = self.epoch_steps(epoch)
            for at, micro in enumerate(steps):
                if start <= number < end:
                    yield epoch + (at + 1) / len(steps), [flat(self.samples, rows) for rows in micro]
                number += 1
            epoch += 1

    def largest(self) -> int:
        """Tokens of the largest micro-batch that can come."""
        lengths = sorted((len(sample) for sample in self.samples), reverse=True)
        if self.batch_tokens:
            return max(self.batch_tokens, lengths[0])
        return sum(lengths[: self.batch_size])


def in_order(samples: Sequence[Sample], batch_size: int) -> Iterator[Batch]:
    """All samples once, in their order: for evaluation."""
    for start in range(0, len(samples), batch_size):
        yield flat(samples, range(start, min(start + batch_size, len(samples))))
