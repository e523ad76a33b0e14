"""The rows of a step, shared out by their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from fitune.core.records import Sample
from fitune.data.batches import Loader
from fitune.data.sharing import shares

SLOWEST = 1.03  # of the mean


@given(some.lists(some.integers(1, 2000), max_size=60), some.integers(1, 9))
def test_each_row_is_taken_once_and_no_share_is_longer_than_must_be(lengths: list[int], ranks: int) -> None:
    found = shares(lengths, ranks)
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert all(rows == sorted(rows) for rows in found)
    assert found == shares(lengths, ranks)
    sums = [sum(lengths[row] for row in rows) for rows in found]
    assert max(sums) <= sum(lengths) / ranks + max(lengths, default=0)  # what is always possible


def test_few_long_rows_go_to_processes_of_their_own() -> None:
    lengths = [10, 1, 1, 10, 1, 1]
    assert [sum(lengths[row] for row in rows) for rows in shares(lengths, 2)] == [12, 12]
    assert shares([5], 3) == [[0], [], []]


def loader(lengths: list[int], **more: Any) -> Loader:
    samples = [Sample(np.arange(n, dtype=np.int32) + 1, np.arange(n) > 0) for n in lengths]
    return Loader(samples, batch_size=4, accumulation=2, seed=1, **more)


@pytest.mark.parametrize("more", [{}, {"batch_tokens": 40}])
def test_shares_of_a_step_are_micro_batches_no_larger_than_its_own(more: dict[str, int]) -> None:
    made = loader([3, 9, 17, 4, 6, 30, 2, 8, 12, 5, 7, 11], **more)
    for _, step in made.steps(0, made.count(0)):
        each = [made.share(step, rank, 3) for rank in range(3)]
        rows = sorted(row for batches in each for batch in batches for row in batch.rows)
        assert rows == sorted(row for batch in step for row in batch.rows)
        assert sum(b.targets for batches in each for b in batches) == sum(b.targets for b in step)
        for batch in (batch for batches in each for batch in batches):
            assert len(batch.ids) <= 40 or len(batch.rows) == 1 if more else len(batch.rows) <= 4


@pytest.mark.shared
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_slowest_process_has_hardly_more_than_the_mean(ranks: int, shared: Path) -> None:
    rows = json.loads((shared / "data" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    lengths = np.array([sum(len(str(value)) for value in row.values()) for row in rows])
    order = np.random.default_rng(0).permutation(len(lengths))
    worst = 0.0
    for start in range(0, len(order) - 64, 64):  # 64 rows a step
        step = lengths[order[start : start + 64]].tolist()
        sums = [sum(step[row] for row in one) for one in shares(step, ranks)]
        worst = max(worst, max(sums) * ranks / sum(sums))
    assert worst <= SLOWEST
