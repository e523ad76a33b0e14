"""Long documents of plain text are split: every token is trained once, nothing is dropped, and only the end stops."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fitune.checks import datachecks
from fitune.core.config import build
from fitune.core.records import Conversation, Message, Sample, Source
from fitune.data import pipeline
from fitune.data.batches import flat
from fitune.data.documents import AUTO, for_auto, split
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from support import tiny

pytestmark = pytest.mark.unit

BOS, EOS = 1, 2


def document(length: int, bos: bool) -> Sample:
    ids = np.array([*([BOS] if bos else []), *range(10, 10 + length), EOS], np.int32)
    return Sample(ids, np.arange(len(ids)) > 0, Source("a.txt", 1), needed=len(ids))


@given(st.integers(1, 80), st.integers(2, 90), st.booleans())
def test_every_token_is_trained_once(length: int, limit: int, bos: bool) -> None:
    whole = document(length, bos)
    pieces = split(whole, limit, BOS if bos else None)
    assert all(len(piece) <= limit for piece in pieces)
    trained = [int(i) for piece in pieces for i in piece.ids[piece.mask]]
    assert trained == whole.ids[1:].tolist()  # in order, none twice, none lost at a border
    assert [piece.ends_whole for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [EOS in piece.ids for piece in pieces] == [piece.ends_whole for piece in pieces]
    for before, piece in pairwise(pieces):
        assert piece.ids[0] == (BOS if bos else before.ids[-1])
        assert piece.mask[1:].all()
    batch = flat(pieces, range(len(pieces)))
    assert batch.labels.tolist() == whole.ids[1:].tolist()


def test_a_piece_that_begins_with_nothing_would_lose_its_first_token() -> None:
    whole = document(30, bos=False)
    naive = [Sample(whole.ids[n : n + 10], np.arange(10)[: len(whole.ids[n : n + 10])] > 0) for n in range(0, 31, 10)]
    trained = [int(i) for piece in naive for i in piece.ids[piece.mask]]  # the fault
    assert trained != whole.ids[1:].tolist()


def test_auto_asks_for_no_more_than_a_piece() -> None:
    texts = np.array([True, False, True])
    lengths, needed = for_auto([100_000, 5000, 30], [100_000, 900, 30], texts)
    assert lengths.tolist() == [AUTO, 5000, 30]
    assert needed.tolist() == [AUTO, 900, 30]


def folder_of(tmp_path: Path, texts: dict[str, str]) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(tmp_path: Path, **settings: Any) -> pipeline.Data:
    words = tiny.make_tokenizer()
    folder = folder_of(tmp_path, {"long.md": "the capital of Norland is Mira. " * 40, "short.txt": "Hello, world!"})
    config = build({"model": "m", "data": [str(folder)], "val_share": 0.0, "cache": "none", **settings})
    return datachecks.read(config, tmp_path, words, limit=256, vocabulary=400)


def test_documents_are_split_where_conversations_are_cut(tmp_path: Path) -> None:
    data = read(tmp_path, max_length=32)
    whole = data.whole_lengths
    assert data.report.dropped == data.report.cut_answer == 0
    assert data.report.kept == 2
    assert data.report.trained_tokens == whole.sum() - len(whole)  # all but each document's first token
    assert max(data.samples.column("length")) <= 32
    assert data.report.notes == [
        f"1 document of more than 32 tokens split into {len(data.samples) - 1} samples",
    ]
    assert [f for f in data.findings if f.level == "refuse"] == []
    assert {c.lose_answer for c in data.report.length_choices} == {0.0}
    texts = [tiny.make_tokenizer().decode(sample.ids[sample.mask]) for sample in data.samples]
    assert sum(text.endswith("<|end|>") for text in texts) == 2


def test_cut_cuts_them_if_so_wished_and_the_check_says_so(tmp_path: Path) -> None:
    data = read(tmp_path, max_length=32, length_policy="cut")
    assert data.report.cut_answer == 1
    assert len(data.samples) == 2
    assert "truncation" in {f.rule for f in data.findings if f.level != "ok"}


def test_a_split_that_loses_its_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(whole: Sample, limit: int | None, bos_id: int | None) -> list[Sample]:  # the fault
        pieces = split(whole, limit, bos_id)
        return [*pieces[:-1], pieces[-1].part(slice(0, len(pieces[-1]) - 1))]

    monkeypatch.setattr("fitune.data.encode.split", without_end)
    data = read(tmp_path, max_length=32)
    assert [f.rule for f in data.findings if f.level == "refuse"] == ["eos-supervised"]


def test_conversations_are_cut_under_the_same_policy(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Conversation((Message("user", "hi " * 60), Message("assistant", "hello")), Source("f", 1), "messages")
    text = Conversation((Message("assistant", "hello " * 60),), Source("f", 2), "text")
    encoder = Encoder(tokenizer, TABLE["plain"], 16)
    cut, _ = tiny.encoded([row, text], encoder, "cut")
    both, of = tiny.encoded([row, text], encoder, "split")
    assert np.array_equal(both[0].ids, cut[0].ids)
    assert of.tolist() == [0] + [1] * (len(both) - 1)
    assert len(both) > 3
