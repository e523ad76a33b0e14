"""Which steps of a run decide its memory: one that makes the optimizer's states, and that with the largest micro-batch.

In: a loader, or only a number of rows and their length. Out: the micro-batches of those steps, for a plan to go over.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from fitune.core.config import RunConfig
from fitune.core.options import Wanted
from fitune.core.records import Batch, Layout, Sample, Units
from fitune.data.batches import Loader, flat, in_order, rounded
from fitune.data.pairs import Pairs
from fitune.data.store import documents_of, in_pairs, lengths_of
from fitune.models import families
from fitune.models.switches import has_own_attention

LOOK = 200_000  # steps that are looked through; a run of more repeats itself


def deciding(loader: Loader, total: int, processes: int = 1) -> list[list[Batch]]:
    """A row of the first step, so that the optimizer has states; and a step with the largest micro-batches: of those
    that come first in their step, and of those that meet gradients. A run of a single step has no states before it.

    Args:
        loader: gives the steps.
        total: how many there are.
        processes: that share each step; it is decided for the one that takes most.
    """
    lengths = lengths_of(loader.samples).astype(np.int64)
    short: list[NDArray[np.int64]] = []
    ahead: list[NDArray[np.int64]] = []
    behind: list[NDArray[np.int64]] = []  # with the one before it
    alone = met = -1  # their sizes
    for step in islice(_of_each(loader, processes), processes * min(total, LOOK)):
        if not step:
            continue
        sizes = [_size(lengths[rows], padded=loader.by_length) for rows in step]
        short = short or [step[0][:1]]
        if sizes[0] > alone:
            alone, ahead = sizes[0], step[:1]
        if max(sizes[1:], default=-1) > met:
            largest = 1 + int(np.argmax(sizes[1:]))
            met, behind = sizes[largest], step[largest - 1 : largest + 1]
    best = [*ahead, *behind[-1:]] if alone > met else behind
    return [[flat(loader.samples, rows) for rows in step] for step in ((short, best) if total > 1 else (best,))]


def _of_each(loader: Loader, processes: int) -> Iterator[list[NDArray[np.int64]]]:
    """The steps, or what each process takes of them."""
    for step in _steps(loader):
        yield from [step] if processes == 1 else loader.shares(np.concatenate(step), processes)


def _size(lengths: NDArray[np.int64], *, padded: bool) -> int:
    return rounded(int(lengths.max())) * len(lengths) if padded else rounded(int(lengths.sum()))


class Largest:
    """Tokens of the largest micro-batch of a run, for any number of rows in one, in the order in which they come.

    Args:
        samples: the training rows.
        config: seed, epochs and max_steps decide how much of which order is met.
        padded: rows of about a length share a micro-batch, and all count as the longest.
    """

    def __init__(self, samples: Units, config: RunConfig, *, padded: bool) -> None:
        self.samples, self.config, self.padded = samples, config, padded
        self.lengths = lengths_of(documents_of(samples)).astype(np.int64)  # of both samples of a pair
        self.known: dict[tuple[int, int], int] = {}

    def __call__(self, rows: int, longest: int) -> int:
        """With so many rows in a micro-batch, none longer than that."""
        key = rows, longest
        if key not in self.known:
            lengths = np.minimum(self.lengths, longest)
            if isinstance(self.samples, Pairs):
                lengths = self.samples.lengths(lengths)
            if self.padded:
                lengths = np.array([rounded(length) for length in range(int(lengths.max()) + 1)])[lengths]
            self.known[key] = self._look(rows, lengths)
        return self.known[key]

    def _look(self, rows: int, lengths: NDArray[np.int64]) -> int:
        loader = Loader(self.samples, rows, 1, self.config.seed, None, self.padded)
        left = min(LOOK, self.config.max_steps or loader.total_steps(self.config.epochs))
        most = epoch = 0
        while left > 0:
            ordered = lengths[loader.order(epoch)]
            grid = np.pad(ordered, (0, -len(ordered) % rows)).reshape(-1, rows)[:left]
            sizes = grid.max(axis=1) * (grid > 0).sum(axis=1) if self.padded else grid.sum(axis=1)
            most, left, epoch = max(most, int(sizes.max())), left - len(grid), epoch + 1
        return most if self.padded else rounded(most)


def _steps(loader: Loader) -> Iterator[list[NDArray[np.int64]]]:
    epoch = 0
    while True:
        yield from loader.epoch_steps(epoch)
        epoch += 1


def largest_held_out(samples: Units, batch_size: int) -> Batch | None:
    """The evaluation's batch with the most tokens."""
    lengths = lengths_of(samples)
    if not len(lengths):
        return None
    sums = [int(lengths[at : at + batch_size].sum()) for at in range(0, len(lengths), batch_size)]
    return next(islice(in_order(samples, batch_size), int(np.argmax(sums)), None))


def made_up(rows: int, length: int, vocabulary: int, labels: int | None = None, wanted: Wanted = "answers") -> Batch:
    """A micro-batch of documents that are all that long, every token but the first with a label, or so many at the end;
    of what an objective needs: pairs are half as many rows, with a reference of zero."""
    mask = np.arange(length) > (0 if labels is None else max(0, length - 1 - labels))
    ids = (np.arange(length) % max(1, vocabulary)).astype(np.int32)
    samples = [Sample(ids, mask)] * 2
    batch = flat(in_pairs(samples, wanted), [0] * (rows // 2 if wanted == "pairs" else rows))
    if batch.answers is not None:
        batch.answers.reference[:] = 0  # so that the loss is finite where the steps are not on paper
    return batch


def likely_layout(wanted: str, model_config: PretrainedConfig) -> Layout:
    """The layout that a run will have, before the model is there to be probed: flat, but where transformers lets nobody
    put another attention into the model, and no family of ours does."""
    if wanted != "auto":
        return cast(Layout, wanted)  # a setting of these names
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    own = kind is not None and has_own_attention(kind) and model_config.model_type not in families.TABLE
    return "padded" if own else "flat"
