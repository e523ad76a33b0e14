"""Flat batches: labels, bounds, order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fitune.batches import Loader, flat, in_order, longest
from fitune.records import Sample


def sample(ids: list[int], trained_from: int) -> Sample:
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= trained_from)


def test_labels_are_the_next_token_of_the_same_document() -> None:
    batch = flat([sample([1, 2, 3, 4], 2), sample([5], 0), sample([6, 7], 0)], [0, 1, 2])
    assert batch.ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.bounds.tolist() == [0, 4, 5, 7]
    # 3 and 4 are predicted from 2 and 3; nothing is predicted across a bound, the last prompt token is no label
    assert batch.label_rows.tolist() == [1, 2, 5]
    assert batch.labels.tolist() == [3, 4, 7]


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(0, 3), st.integers(0, 50))
def test_every_row_comes_once_an_epoch_and_resume_goes_on_with_the_same_rows(
    count: int, batch_size: int, accumulation: int, seed: int, skip: int
) -> None:
    loader = Loader([sample([n, n + 1], 1) for n in range(count)], batch_size, accumulation, seed)
    per_epoch = loader.steps_per_epoch
    steps = [[batch.rows for batch in step] for step in loader.steps(0, 2 * per_epoch)]
    for epoch in (0, 1):
        rows = [r for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for batch in step for r in batch]
        assert sorted(rows) == list(range(count))
    start = min(skip, 2 * per_epoch)
    assert [[b.rows for b in step] for step in loader.steps(start, 2 * per_epoch)] == steps[start:]


def test_evaluation_sees_every_row_and_the_largest_batch_is_found() -> None:
    samples = [sample(list(range(n)), 1) for n in (3, 9, 2, 7)]
    assert [batch.rows for batch in in_order(samples, 3)] == [(0, 1, 2), (3,)]
    assert longest(samples, 2).rows == (1, 3)
