"""Flat batches: labels, bounds, order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.core.records import Sample
from fitune.data.batches import Loader, flat, in_order

pytestmark = pytest.mark.unit


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


@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 50),
    st.none() | st.integers(1, 60),
    st.booleans(),
)
def test_every_row_comes_once_an_epoch_and_resume_goes_on_with_the_same_rows(
    lengths: list[int], size: int, accumulation: int, seed: int, skip: int, tokens: int | None, by_length: bool
) -> None:
    samples = [sample([0] * length, 1) for length in lengths]
    loader = Loader(samples, size, accumulation, seed, tokens, by_length)
    total = loader.total_steps(2)
    steps = [(epoch, [batch.rows for batch in step]) for epoch, step in loader.steps(0, total)]
    for last in (1, 2):
        rows = [r for epoch, step in steps if last - 1 < epoch <= last for batch in step for r in batch]
        assert sorted(rows) == list(range(len(lengths)))
    start = min(skip, total)
    assert [(epoch, [b.rows for b in step]) for epoch, step in loader.steps(start, total)] == steps[start:]
    if tokens:
        assert all(sum(lengths[r] for r in b) <= tokens or len(b) == 1 for _, step in steps for b in step)
    else:
        assert all(len(batch) <= size for _, step in steps for batch in step)


def test_length_grouping_saves_the_padding_that_random_batches_waste() -> None:
    rng = np.random.default_rng(0)
    samples = [sample([0] * int(n), 1) for n in rng.integers(10, 500, 800)]

    def padded(by_length: bool) -> int:
        steps = Loader(samples, 8, 1, 0, by_length=by_length).epoch_steps(0)
        return sum(len(rows) * max(len(samples[r]) for r in rows) for step in steps for rows in step)

    real = sum(len(s) for s in samples)
    assert padded(False) > 1.6 * real
    assert padded(True) < 1.1 * real


def test_evaluation_sees_every_row() -> None:
    samples = [sample(list(range(n)), 1) for n in (3, 9, 2, 7)]
    assert [batch.rows for batch in in_order(samples, 3)] == [(0, 1, 2), (3,)]
