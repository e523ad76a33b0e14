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
    """Deterministic batches: the order depends on the seed and the epoch alone, so step n is known without the others.

    Args:
        samples: the training samples.
        batch_size: rows per micro-batch.
        accumulation: micro-batches per optimizer step.
        seed: decides the order.
    """

    samples: Sequence[Sample]
    batch_size: int
    accumulation: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch; the last one takes the rows that are left."""
        return -(-len(self.samples) // (self.batch_size * self.accumulation))

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, each exactly once."""
        return [int(row) for row in np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))]

    def steps(self, start: int, end: int) -> Iterator[list[Batch]]:
        """The micro-batches of the optimizer steps start .. end - 1 (from 0, over all epochs)."""
        order: list[int] = []
        epoch_of_order = -1
        for step in range(start, end):
            epoch, at = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                order, epoch_of_order = self.order(epoch), epoch
            size = self.batch_size * self.accumulation
            rows = order[at * size : (at + 1) * size]
            yield [flat(self.samples, rows[n : n + self.batch_size]) for n in range(0, len(rows), self.batch_size)]


def in_order(samples: Sequence[Sample], batch_size: int) -> Iterator[Batch]:
    """All samples once, in their order: for evaluation."""
    for start in range(0, len(samples), batch_size):
        yield flat(samples, range(start, min(start + batch_size, len(samples))))


def longest(samples: Sequence[Sample], batch_size: int) -> Batch:
    """The largest batch that can come: the longest rows together."""
    rows = sorted(range(len(samples)), key=lambda row: -len(samples[row]))[:batch_size]
    return flat(samples, rows)
