"""Samples on disk are the samples that were put there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fitune.batches import flat
from fitune.records import Sample, Source
from fitune.store import IDS, SampleStore, StoreWriter


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    made = []
    for n in range(50):
        ids = rng.integers(0, 60_000, n % 7 + 1).astype(np.int32)
        source = None if n == 3 else Source("a.jsonl" if n % 2 else "数据.json", n)
        made.append(Sample(ids, ids % 2 == 0, source, n, n % 3, n % 5 > 0))
    return made


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    with StoreWriter(tmp_path) as writer:
        for sample in samples():
            writer.append(sample)
    store = SampleStore(tmp_path)
    assert len(store) == 50
    for one, other in zip(store, samples(), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert one.mask.tolist() == other.mask.tolist()
        assert (one.source, one.cut_prompt, one.cut_answer, one.ends_whole) == (
            other.source,
            other.cut_prompt,
            other.cut_answer,
            other.ends_whole,
        )
    assert store.lengths.tolist() == [len(sample) for sample in samples()]
    assert flat(store, [4, 2]).ids.tolist() == flat(samples(), [4, 2]).ids.tolist()
    assert [len(s) for s in store[3:6]] == [4, 5, 6]


def test_an_empty_store_and_a_store_that_was_cut_off(tmp_path: Path) -> None:
    empty, cut = tmp_path / "empty", tmp_path / "cut"
    for folder in (empty, cut):
        folder.mkdir()
        with StoreWriter(folder) as writer:
            for sample in samples() if folder == cut else []:
                writer.append(sample)
    assert len(SampleStore(empty)) == 0
    data = (cut / IDS).read_bytes()
    for shorter in (data[:-1], data[:-4]):
        (cut / IDS).write_bytes(shorter)
        with pytest.raises(ValueError, match=r"cut off|not a finished store"):
            SampleStore(cut)
