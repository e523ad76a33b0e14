"""What the rules on data look at: everything that was prepared, in one record.

In: conversations, their samples, how they were encoded. Out: Prepared, which checks read; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fitune.core.config import RunConfig
from fitune.core.records import Conversation, DataReport, Sample
from fitune.data.encode import Encoder
from fitune.data.store import Block, Samples, blocks

PROBES = 50  # rows that are looked at by rules which encode again
PROBE_CHARACTERS = 20_000  # longer rows are left out there: one of 10 MB takes seconds each time


@dataclass
class Prepared:
    """What the rules look at."""

    config: RunConfig
    conversations: Sequence[Conversation]
    samples: Sequence[Sample]
    report: DataReport
    encoder: Encoder
    vocabulary: int
    limit: int  # longest row that the model can hold
    folder: Path  # where the tokenizer's files are
    rows_of: NDArray[np.int64]  # of each sample, the number of its conversation, ascending
    cached: Cached | None = None  # rows and samples as a cache had them, where it had
    held_out: Samples | None = None  # what is not trained; None: nobody looked

    @cached_property
    def facts(self) -> Facts:
        """What the rules that look at every sample must know of it."""
        return Facts.of(self.samples, self.encoder.stop_ids)


@dataclass(frozen=True)
class Cached:
    """What came from the cache, and how to make it anew."""

    rows: Sequence[Conversation]
    first: Sequence[Conversation]  # as they are read now
    samples: Samples  # uncut, as they were kept
    encoder: Encoder  # that does not cut


@dataclass(frozen=True)
class Facts:
    """Of every sample: its first two and last ids (-1: there is none), the last trained one, the highest; and whether
    a stop token is trained."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    last: NDArray[np.int64]
    last_trained: NDArray[np.int64]
    highest: NDArray[np.int64]
    trains_stop: NDArray[np.bool_]

    @classmethod
    def of(cls, samples: Sequence[Sample], stop_ids: Sequence[int]) -> Facts:
        """Looked up many samples at a time."""
        parts = [cls._block(block, stop_ids) for block in blocks(samples)]
        return cls(*(np.concatenate([part[n] for part in parts] or [np.zeros(0, np.int64)]) for n in range(6)))

    @staticmethod
    def _block(block: Block, stop_ids: Sequence[int]) -> tuple[NDArray[np.generic], ...]:
        ids, starts, ends = block.ids, block.starts, block.ends
        trained = np.flatnonzero(block.mask)
        last_trained = ids[trained[np.searchsorted(trained, ends) - 1]]
        stops = np.cumsum(np.concatenate([[0], np.isin(ids, stop_ids) & block.mask]))
        second = np.where(ends - starts > 1, ids[np.minimum(starts + 1, len(ids) - 1)], -1)
        return (
            ids[starts],
            second,
            ids[ends - 1],
            last_trained,
            np.maximum.reduceat(ids, starts),
            stops[ends] > stops[starts],
        )
