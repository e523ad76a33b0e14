"""Rows of preferences: two answers to one prompt, or labelled answers, to pairs of samples and their batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fitune.checks import stepchecks
from fitune.core.errors import DataError
from fitune.core.records import Conversation, Message, Pair, Sample, Source
from fitune.data import preferences, rows
from fitune.data.batches import Loader, flat, split
from fitune.data.conversations import to_conversation
from fitune.data.encode import Encoder
from fitune.data.pairs import Pairs
from fitune.data.store import in_pairs, lengths_of
from fitune.data.templates import choose
from support import tiny
from support.encoding import decoded

pytestmark = pytest.mark.unit

HERE = Source("f.jsonl", 3)
ASKED, GOOD, BAD = "how are you?", "well, thank you", "go away"
TURNS = [{"role": "user", "content": ASKED}]


def answered(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def shape(row: Conversation) -> tuple[list[str], list[str], int]:
    return [m.content for m in row.messages], [m.content for m in row.rejected], row.fork


PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "question": {"question": ASKED, "chosen": GOOD, "rejected": BAD},
    "llamafactory": {
        "conversations": [{"from": "human", "value": ASKED}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "alpaca": {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD},
    "turns": {"prompt": TURNS, "chosen": answered(GOOD), "rejected": answered(BAD)},
    "ultrafeedback": {"prompt": ASKED, "chosen": [*TURNS, *answered(GOOD)], "rejected": [*TURNS, *answered(BAD)]},
    "whole conversations": {"chosen": [*TURNS, *answered(GOOD)], "rejected": [*TURNS, *answered(BAD)]},
    "ms-swift": {"messages": [*TURNS, *answered(GOOD)], "rejected_response": BAD},
    "ms-swift, messages": {"messages": [*TURNS, *answered(GOOD)], "rejected_messages": [*TURNS, *answered(BAD)]},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_style_of_pairs_gives_one_prompt_and_two_answers(name: str) -> None:
    row = to_conversation(PAIRS[name], HERE, wanted="pairs")
    assert shape(row) == ([ASKED, GOOD], [BAD], 1)
    assert [m.content for m in row.other().messages] == [ASKED, BAD]
    plain = to_conversation(PAIRS[name], HERE)
    assert plain.rejected == ()
    assert plain.messages == row.messages


def test_a_system_text_belongs_to_both() -> None:
    row = to_conversation({"system": "be kind", **PAIRS["texts"]}, HERE, wanted="pairs")
    assert shape(row) == (["be kind", ASKED, GOOD], [BAD], 2)


def test_conversations_part_where_they_first_differ() -> None:
    chosen = [*TURNS, *answered("fine"), *TURNS, *answered(GOOD)]
    rejected = [*TURNS, *answered("fine"), *TURNS, *answered(BAD), *TURNS, *answered("still " + BAD)]
    row = to_conversation({"chosen": chosen, "rejected": rejected}, HERE, wanted="pairs")
    assert row.fork == 3
    assert len(row.rejected) == 3
    same = to_conversation({"chosen": chosen, "rejected": chosen}, HERE, wanted="pairs")
    assert (same.fork, len(same.rejected)) == (3, 1)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": ASKED, "chosen": GOOD}, r"f.jsonl:3:rejected: missing \(a row of preferences\)"),
        ({"prompt": ASKED, "completion": GOOD}, "rejected: missing"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": " "}, "rejected: the answer is empty"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": None}, "rejected: missing"),
        (
            {"chosen": [*TURNS, *answered(GOOD)], "rejected": [{"role": "user", "content": "?"}, *answered(BAD)]},
            "do not answer one prompt",
        ),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "weight": 0.5}, "answers of preferences have no weights"),
    ],
)
def test_what_is_no_pair_is_refused_by_its_field(row: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        to_conversation(row, HERE, wanted="pairs")


LABELS = [
    {"prompt": "a?", "completion": "A", "label": True},
    {"prompt": "b?", "completion": "B", "label": False},
    {"messages": [{"role": "user", "content": "b?"}, *answered("B2")], "kto_tag": True},
    {"prompt": "c?", "completion": "C", "desirable": 0},
]


def write(path: Path, some: list[dict[str, Any]]) -> str:
    import json

    path.write_text("\n".join(json.dumps(one) for one in some), encoding="utf-8")
    return str(path)


def test_labelled_answers_get_the_answer_to_another_prompt_beside_them(tmp_path: Path) -> None:
    found = rows.load([write(tmp_path / "a.jsonl", LABELS)], wanted="labels")
    assert [row.desirable for row in found.rows] == [True, False, True, False]
    assert found.rows.column("desirable").tolist() == [True, False, True, False]
    # the first takes the first behind it; B2 the nearest answer before it to another prompt than b?
    assert [(row.messages[-1].content, row.rejected[0].content) for row in found.rows] == [
        ("A", "B"), ("B", "A"), ("B2", "A"), ("C", "B2"),
    ]  # fmt: skip
    assert all(row.other().prompt() == row.prompt() for row in found.rows)
    assert not found.report.unused_columns
    assert {"1 row with label true: taken as good answers", "1 row with label false: taken as bad answers"} <= {
        *found.report.notes
    }


def test_pairs_are_two_labelled_answers_each(tmp_path: Path) -> None:
    found = rows.load([write(tmp_path / "a.jsonl", [PAIRS["texts"], LABELS[0]])], wanted="labels")
    assert [(row.messages[-1].content, row.desirable) for row in found.rows] == [
        (GOOD, True), (BAD, False), ("A", True),
    ]  # fmt: skip
    with pytest.raises(DataError, match="label: missing"):
        rows.load([write(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}])], wanted="labels")


def test_one_prompt_alone_is_compared_with_its_own_answer() -> None:
    alone = Conversation((Message("user", "?"), Message("assistant", "A")), desirable=True)
    (_, made), (_, second) = preferences.mismatched([(0, alone), (0, replace(alone, desirable=False))])
    assert [m.content for m in made.rejected] == ["A"]
    assert second.desirable is False


def test_rows_come_back_from_the_disk_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PAIRS["ultrafeedback"]])
    (row,) = rows.load([path], wanted="pairs").rows
    assert replace(row, source=HERE) == to_conversation(PAIRS["ultrafeedback"], HERE, wanted="pairs")
    (plain,) = rows.load([path]).rows  # the same file for plain tuning is another entry of the cache
    assert plain.rejected == ()


# ---- samples ----


def pair_of(encoder: Encoder, row: dict[str, Any]) -> list[Sample]:
    return encoder.samples(to_conversation(row, HERE, wanted="pairs"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = tiny.make_tokenizer()
    return Encoder(tokenizer, choose("auto", tokenizer), both=True)


def test_both_samples_have_the_prompt_of_chat_and_train_their_answer(encoder: Encoder) -> None:
    chosen, rejected = pair_of(encoder, PAIRS["texts"])
    prompt = encoder.prompt((Message("user", ASKED),))
    for sample, text in ((chosen, GOOD), (rejected, BAD)):
        assert sample.shared == len(prompt)
        assert sample.ids[: len(prompt)].tolist() == prompt
        assert decoded(encoder, sample.ids[sample.mask]) == f"{text}<|end|>"
    plain = Encoder(encoder.tokenizer, encoder.template)  # plain tuning: the chosen answer alone
    (alone,) = plain.samples(to_conversation(PAIRS["texts"], HERE, wanted="pairs"))
    assert alone.ids.tolist() == chosen.ids.tolist()


def test_only_what_stands_behind_the_fork_is_trained(encoder: Encoder) -> None:
    chosen = [*TURNS, *answered("fine"), *TURNS, *answered(GOOD), *TURNS, *answered("bye")]
    row = {"chosen": chosen, "rejected": [*TURNS, *answered("fine"), *TURNS, *answered(BAD)]}
    first, second = pair_of(encoder, row)
    assert decoded(encoder, first.ids[first.mask]) == f"{GOOD}<|end|>bye<|end|>"
    assert decoded(encoder, second.ids[second.mask]) == f"{BAD}<|end|>"


@pytest.mark.parametrize("limit", [60, 40, 30, 26, 20, 12])
def test_a_pair_that_is_too_long_keeps_one_prompt(encoder: Encoder, limit: int) -> None:
    row = {"prompt": "x " * 40, "chosen": "good " * 5, "rejected": "no"}
    whole = pair_of(encoder, row)
    cut = pair_of(encoder.with_max_length(limit), row)
    assert max(map(len, cut)) <= limit
    assert len({tuple(sample.ids[: sample.prompt_length]) for sample in cut}) == 1
    assert cut[0].shared == cut[0].prompt_length
    assert cut[1].cut_answer == 0  # the short answer loses nothing
    if cut[0].cut_answer == 0:
        assert cut[0].ids[cut[0].mask].tolist() == whole[0].ids[whole[0].mask].tolist()
        assert len(cut[0]) == limit


def test_labelled_answers_are_not_cut_for_the_answer_beside_them(encoder: Encoder) -> None:
    messages = (Message("user", "x " * 10), Message("assistant", "A"))
    row = Conversation(messages, HERE, "messages", rejected=(Message("assistant", "B " * 40),), fork=1, desirable=True)
    own, other = encoder.with_max_length(40).samples(row)
    assert own.cut_prompt == own.cut_answer == 0
    assert len(other) == 40


# ---- batches ----


def sample(length: int, prompt: int, start: int = 0) -> Sample:
    ids = np.arange(start, start + length, dtype=np.int32)
    return Sample(ids, np.arange(length) >= prompt, prompt_length=prompt, shared=prompt)


def some(count: int) -> list[Sample]:
    return [sample(3 + n, 2, 100 * n) for n in range(2 * count)]


def test_a_batch_of_pairs_has_both_documents_side_by_side() -> None:
    pairs = Pairs(some(3), np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    batch = flat(pairs, [2, 0])
    assert batch.rows == (2, 0)
    assert batch.weight == 2
    assert np.diff(batch.bounds).tolist() == [7, 8, 3, 4]
    assert batch.answers is not None
    assert batch.answers.reference.tolist() == [5, 6, 1, 2]
    assert np.bincount(batch.answers.of).tolist() == [5, 6, 1, 2]  # labels of each answer
    assert batch.labels[batch.answers.of == 2].tolist() == [2]
    unknown = flat(Pairs(some(1)), [0]).answers
    assert unknown is not None
    assert np.isnan(unknown.reference).all()  # a loss with it is no number, so nobody trains with it unseen


def test_labelled_answers_have_a_batch_of_their_own() -> None:
    pairs = Pairs(some(2), np.array([[1, 2], [3, 4]], np.float32), np.array([True, False]))
    batch = flat(pairs, [1, 0])
    assert batch.answers is not None
    assert np.diff(batch.bounds).tolist() == [5, 3]
    assert batch.answers.reference.tolist() == [3, 1]
    assert batch.answers.desirable is not None
    assert batch.answers.desirable.tolist() == [False, True]
    others = batch.answers.mismatched
    assert others is not None
    assert np.diff(others.bounds).tolist() == [6, 4]
    assert others.answers is not None
    assert others.answers.reference.tolist() == [4, 2]
    assert lengths_of(pairs).tolist() == [3, 5]  # only those get a gradient


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_a_split_keeps_every_pair_whole(labelled: bool, parts: int) -> None:
    reference = np.arange(10, dtype=np.float32).reshape(5, 2)
    pairs = Pairs(some(5), reference, np.arange(5) % 2 == 0 if labelled else None)
    whole = flat(pairs, [4, 1, 0, 3, 2])
    pieces = split(whole, parts)
    assert [row for piece in pieces for row in piece.rows] == [4, 1, 0, 3, 2]
    assert len(pieces) == min(parts, 5)
    for piece in pieces:
        alone = flat(pairs, piece.rows)
        for name in ("ids", "positions", "bounds", "label_rows", "labels"):
            assert getattr(piece, name).tolist() == getattr(alone, name).tolist(), name
        mine, theirs = piece.answers, alone.answers
        assert mine is not None
        assert theirs is not None
        assert mine.of.tolist() == theirs.of.tolist()
        assert mine.reference.tolist() == theirs.reference.tolist()
        if labelled:
            assert mine.mismatched is not None
            assert theirs.mismatched is not None
            assert mine.mismatched.ids.tolist() == theirs.mismatched.ids.tolist()


def test_a_pair_is_the_unit_that_batches_and_lengths_count() -> None:
    pairs = in_pairs(some(7), "pairs")
    assert isinstance(pairs, Pairs)
    assert isinstance(pairs[-1], Pair)
    assert [len(one) for one in pairs[1:3]] == [5 + 6 - 1, 7 + 8 - 1]  # of prompts of two tokens the first stands once
    assert lengths_of(pairs).tolist() == [len(one) for one in pairs]
    loader = Loader(pairs, 2, 1, 0)
    steps = [batch for _, step in loader.steps(0, loader.total_steps(1)) for batch in step]
    assert sorted(row for batch in steps for row in batch.rows) == list(range(7))
    assert all(len(batch.bounds) == 2 * len(batch.rows) + 1 for batch in steps)


def prompted(prompt: int, lengths: tuple[int, int], shared: int) -> list[Sample]:
    both = [np.concatenate([np.arange(prompt), np.arange(length) + 10 * n]) for n, length in enumerate(lengths, 1)]
    made = [(ids.astype(np.int32), np.arange(len(ids)) >= prompt) for ids in both]
    return [Sample(ids, mask, prompt_length=prompt, shared=shared) for ids, mask in made]


def test_a_prompt_stands_once_but_for_its_last_token() -> None:
    samples = [*prompted(4, (2, 3), 4), *prompted(5, (1, 1), 3), *prompted(1, (2, 2), 1)]  # the second one's differ
    pairs = in_pairs(samples, "pairs")
    assert isinstance(pairs, Pairs)
    assert pairs.common is not None
    assert pairs.common.tolist() == [3, 0, 0]
    assert lengths_of(pairs).tolist() == [6 + 7 - 3, 12, 6]
    batch = flat(pairs, [0, 1, 2])
    assert batch.shared is not None
    assert batch.shared.tolist() == [0, 3, 0, 0, 0, 0]
    assert len(batch.ids) == lengths_of(pairs).sum() == sum(map(len, pairs))
    start, end = batch.bounds[1:3]
    assert batch.ids[start:end].tolist() == [3, 20, 21, 22]
    assert batch.positions[start:end].tolist() == [3, 4, 5, 6]
    assert batch.labels[:5].tolist() == [10, 11, 20, 21, 22]
    assert batch.ids[batch.label_rows[:5]].tolist() == [3, 10, 3, 20, 21]
    alone = flat(pairs, [1])
    assert alone.shared is None
    assert split(batch, 3)[0].shared is not None
    assert flat(pairs.apart(), [0, 1, 2]).shared is None
    assert stepchecks.batch_labels([batch], pairs).level == "ok"
    wrong = replace(batch, positions=np.where(np.arange(len(batch.ids)) == start, 0, batch.positions))
    assert "its positions begin at 0, not at 3" in stepchecks.batch_labels([wrong], pairs).text
    other = replace(pairs.samples[1], ids=pairs.samples[1].ids + np.int32(1))
    mixed = Pairs([pairs.samples[0], other, *pairs.samples[2:]], common=pairs.common)
    assert "both answers have other prompts" in stepchecks.batch_labels([flat(mixed, [0])], mixed).text


def test_rows_that_are_cut_share_what_is_left() -> None:
    pairs = in_pairs(prompted(6, (3, 4), 6), "pairs")
    assert isinstance(pairs, Pairs)
    cut = pairs.of([sample.part(slice(0, 4)) for sample in pairs.samples])
    assert cut.common is not None
    assert cut.common.tolist() == [3]
    assert lengths_of(cut).tolist() == pairs.lengths(np.array([4, 4])).tolist() == [5]
