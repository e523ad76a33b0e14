"""max_length: the rule, auto, and what becomes of rows that are longer."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from fitune.encode import Encoder
from fitune.errors import DataError, Problems
from fitune.lengths import automatic, choices, rule_of_thumb
from fitune.records import Conversation, DataReport, Message, Source
from fitune.templates import choose


def test_the_rule_of_thumb_by_hand() -> None:
    # quartiles 10 and 10: nothing but 10 is inside, 10 x 1.5 = 15, rounded up to 16
    assert rule_of_thumb([10] * 20 + [1000]) == 16
    # 1 .. 9: quartiles 3 and 7, all inside, mean 5 x 1.5 = 7.5, rounded up to 8
    assert rule_of_thumb(range(1, 10)) == 8


def test_auto_is_raised_until_one_percent_loses_answers_and_stops_at_the_models_limit() -> None:
    lengths = [100] * 95 + [400, 410, 420, 430, 900]
    assert rule_of_thumb(lengths) == 152
    assert automatic(lengths, lengths, 4096) == 432  # one row of a hundred may lose: the one of 900
    assert automatic(lengths, [100] * 100, 4096) == 152  # long prompts may be cut: no answer needs more
    assert automatic(lengths, lengths, 200) == 200
    told = {c.name: c for c in choices(lengths, lengths, 4096, 104)}
    assert (told["chosen"].max_length, told["chosen"].cut, told["chosen"].lose_answer) == (104, 0.05, 0.05)
    assert (told["auto"].cut, told["max"].cut) == (0.01, 0.0)
    assert told["rule of thumb"].max_length == 152
    assert set(told) == {"chosen", "auto", "rule of thumb", "p50", "p95", "p99", "max"}


def rows() -> list[Conversation]:
    made = []
    for n in range(40):
        question = Message("user", "why " * (40 if n % 4 == 0 else 2))
        answer = Message("assistant", "so " * (60 if n == 7 else 5))
        made.append(Conversation((question, answer), Source("f.jsonl", n + 1)))
    return made


def encoded(tokenizer, limit: int, policy: str) -> tuple[list, DataReport]:
    report = DataReport()
    encoder = Encoder(tokenizer, choose("auto", tokenizer), limit)
    samples, _ = tiny.encoded(rows(), encoder, report, policy)
    return list(samples), report


def test_what_a_row_needs_is_what_cuts_no_answer(tokenizer) -> None:
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    for row in rows():
        needed = encoder.sample(row).needed
        assert encoder.with_max_length(needed).sample(row).cut_answer == 0
        assert encoder.with_max_length(needed - 1).sample(row).cut_answer > 0


def test_a_conversation_needs_all_its_trained_answers(tokenizer) -> None:
    turns = (Message("user", "a b c"), Message("assistant", "d"), Message("user", "e f g"), Message("assistant", "h"))
    every = Encoder(tokenizer, choose("auto", tokenizer))
    last = Encoder(tokenizer, choose("auto", tokenizer), train_on="last")
    assert every.sample(Conversation(turns)).needed == len(every.sample(Conversation(turns)))
    needed = last.sample(Conversation(turns)).needed
    assert needed == 4  # <|user|> <|assistant|> h <|end|>
    assert last.with_max_length(needed).sample(Conversation(turns)).cut_answer == 0


@pytest.mark.parametrize(("policy", "kept", "dropped"), [("cut", 40, 0), ("drop", 29, 11)])
def test_rows_that_are_too_long_are_cut_or_dropped(tokenizer, policy: str, kept: int, dropped: int) -> None:
    samples, report = encoded(tokenizer, 40, policy)
    assert (len(samples), report.kept, report.dropped) == (kept, kept, dropped)
    assert max(len(sample) for sample in samples) <= 40
    assert (report.cut_prompt, report.cut_answer) == ((11, 1) if policy == "cut" else (0, 0))
    ends = [sample.ends_whole for sample in samples]
    assert ends.count(False) == (1 if policy == "cut" else 0)


def test_rows_that_are_too_long_can_refuse_the_run(tokenizer) -> None:
    with pytest.raises(Problems) as caught:
        encoded(tokenizer, 40, "refuse")
    assert len(caught.value.problems) == 11
    first = caught.value.problems[0]
    assert isinstance(first, DataError)
    assert str(first).startswith("f.jsonl:1: the row is too long\n  received: ")
    assert "at most 40 (max_length)" in str(first)


def test_uncut_rows_are_the_same_whatever_the_policy(tokenizer) -> None:
    plain, _ = encoded(tokenizer, 10_000, "cut")
    for policy in ("drop", "refuse"):
        other, _ = encoded(tokenizer, 10_000, policy)
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plain, other, strict=True))
