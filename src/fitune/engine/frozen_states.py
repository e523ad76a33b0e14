"""Hidden states of frozen blocks, computed once and kept for later epochs.

In: batches of a run whose first blocks are all frozen and draw no random numbers. Out: the same losses and gradients,
bit for bit; a batch of rows that were met before begins behind these blocks. What such blocks give for a document
follows from its ids alone, where a row of a product has the same bits in any batch: that is no law, so it is tried
before it is relied on (`checks/frozencheck.py`), and some batches are computed both ways: the first one, and one of
each epoch.

A resumed run finds nothing kept: each row goes through all blocks once more, with the same bits.

Shapes: T = tokens of a batch, R = rows of the model (with the filler), W = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fitune.core.errors import TrainingError
from fitune.core.records import Batch
from fitune.engine.state_store import Store
from fitune.engine.step import rows_of_all
from fitune.models.frozen_blocks import Enough, Output, given, seen
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.placed import Placed, place
from fitune.models.tensors import same_bits

EACH = 256  # rows that are given, at least, before a batch is computed both ways again
# makes the store, once the width and the dtype of the states are known
MakeStore = Callable[[int, torch.dtype], Store]


class FrozenStates:
    """States of the rows that a run has met.

    Args:
        count: of the blocks that are frozen.
        lengths: of all rows that may come, in tokens.
        make: makes the place where they are kept.
        report: is called with one line where keeping them ends early.
        asked: they were asked for, so a run ends where they turn out wrong; else it goes on without, if none was given
            out before.
    """

    def __init__(
        self,
        count: int,
        lengths: Sequence[int] | NDArray[np.integer],
        make: MakeStore,
        report: Callable[[str], None] = lambda text: None,
        *,
        asked: bool = True,
    ) -> None:
        self.count, self._make, self._report = count, make, report
        self._strict = asked  # from the first row that is given out on
        self._bounds = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
        self._there = np.zeros(len(lengths), np.bool_)
        self._store: Store | None = None
        self._form: Output | None = None  # what the blocks give, without rows
        self._unchecked = 0  # rows that may be given before one batch is computed both ways
        self.off = False

    @contextmanager
    def through(self, model: nn.Module, batch: Batch, placed: Placed) -> Iterator[None]:
        """Inside, a forward pass of this batch begins behind the frozen blocks; or it goes through them, and what they
        give is kept.

        Args:
            batch: rows by the numbers that `lengths` has.
            placed: the batch on the model's device.

        Raises:
            TrainingError: what was kept is not what the model gives now.
        """
        there = self._gathered(batch, placed)
        if there is None:
            with seen(model, self.count, partial(self.keep, batch)):
                yield
            return
        if self._unchecked <= 0:
            if not self._are_those_of(model, batch, there):
                yield
                return
            self._unchecked = max(len(self._there), EACH)
        self._unchecked -= len(batch.rows)
        self._strict = True
        with given(model, self.count, there):
            yield

    def keep(self, batch: Batch, output: Output) -> None:
        """Keep what the frozen blocks gave for a batch."""
        if self.off:
            return
        rows = output.states.detach()[0, : len(batch.ids)].cpu()
        if self._store is None or self._form is None:
            self._store = self._make(rows.shape[1], rows.dtype)
            self._form = Output(rows[:0][None], output.others)
        try:
            for row, (start, end) in zip(batch.rows, pairwise(batch.bounds.tolist()), strict=True):
                self._store.write(int(self._bounds[row]), rows[start:end])
                self._there[row] = True
        except OSError as error:
            self._report(f"states of frozen blocks are not kept any longer: {error}; the losses stay the same")
            self.close()

    def _gathered(self, batch: Batch, placed: Placed) -> Output | None:
        """The states of a batch's rows, the filler's behind them; None: not all are there."""
        if self._store is None or self._form is None or not self._there[list(batch.rows)].all():
            return None
        device, total = placed.ids.device, len(placed.ids)
        kept = self._form.states
        out = torch.empty(total, kept.shape[2], dtype=kept.dtype, pin_memory=device.type == "cuda")
        for row, (start, end) in zip(batch.rows, pairwise(batch.bounds.tolist()), strict=True):
            if end - start != self._bounds[row + 1] - self._bounds[row]:
                raise TrainingError(f"row {row} has another length than before", fix="please report it")
            if not self._store.read(int(self._bounds[row]), out[start:end]):
                self._there[row] = False  # it goes through the blocks once more
                return None
        if total > len(batch.ids):  # what the filler repeats; no label looks at it
            which = torch.arange(total - len(batch.ids)) % int(batch.bounds[1])
            out[len(batch.ids) :] = out[which]
        return Output(out[None].to(device, non_blocking=True), self._form.others)

    def _are_those_of(self, model: nn.Module, batch: Batch, there: Output) -> bool:
        """Does the model give the same now? If not, nothing is kept any longer, or TrainingError is raised."""
        now = states_of(model, batch, self.count).states[0, : len(batch.ids)]
        if same_bits(now, there.states[0, : len(batch.ids)]):
            return True
        if self._strict:
            raise TrainingError(
                "the states of frozen blocks that were kept are not those that the model gives now",
                received=f"other bits for some of the rows {', '.join(map(str, batch.rows[:8]))}",
                expected="the same bits in every batch",
                fix="--frozen-cache off, and begin anew",
            )
        self._report("states of frozen blocks are not kept any longer: they have other bits in another batch")
        self.close()
        return False

    def close(self) -> None:
        """Keep nothing from here on."""
        self.off = True
        self._there[:] = False
        if self._store is not None:
            self._store.close()
            self._store = None


@torch.no_grad()
def states_of(model: nn.Module, batch: Batch, count: int) -> Output:
    """What the first `count` blocks give for a flat batch; the blocks above them do nothing."""
    found: list[Output] = []

    def look(output: Output) -> None:
        found.append(output)
        raise Enough

    try:
        with seen(model, count, look):
            rows_of_all(model, batch, "flat", place(batch, next(causal_lm(model).parameters()).device))
    except Enough:
        pass
    return found[0]
