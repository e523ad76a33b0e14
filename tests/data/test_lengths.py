"""max_length: the rule, auto, and what becomes of rows that are longer."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fitune.core.config import LengthPolicy
from fitune.core.errors import DataError, Problems
from fitune.core.records import Conversation, DataReport, Message, Source
from fitune.data.encode import Encoder
from fitune.data.fitting import counted
from fitune.data.lengths import automatic, choices, rule_of_thumb
from fitune.data.templates import TABLE, choose
from fitune.data.templates.base import as_json
from fitune.data.templates.jinja import ChatTemplate
from support import tiny
from support.encoding import sample_of

pytestmark = pytest.mark.unit


def test_the_rule_of_thumb_by_hand() -> None:
    # quartiles 10 and 10: nothing but 10 is inside, 10 x 1.5 = 15, rounded up to 16
    assert rule_of_thumb([10] * 20 + [1000]) == 16
    # 1 .. 9: quartiles 3 and 7, all inside, mean 5 x 1.5 = 7.5, rounded up to 8
    assert rule_of_thumb(range(1, 10)) == 8


def test_auto_is_raised_until_one_percent_loses_answers_and_stops_at_the_models_limit() -> None:
    lengths = [100] * 95 + [400, 410, 420, 430, 900]
    assert rule_of_thumb(lengths) == 152
    assert automatic(lengths, lengths, 4096) == 432  # one row of a hundred may lose: the one of 900
    assert automatic(lengths, [100] * 100, 4096) == 152  # old exchanges may go: nothing else needs more
    assert automatic(lengths, lengths, 200) == 200
    found = {c.name: c for c in choices(lengths, lengths, lengths, chosen=104, auto=432)}
    assert (found["chosen"].max_length, found["chosen"].cut, found["chosen"].lose_answer) == (104, 0.05, 0.05)
    assert (found["auto"].cut, found["max"].cut) == (0.01, 0.0)
    assert found["rule of thumb"].max_length == 152
    assert set(found) == {"chosen", "auto", "rule of thumb", "p50", "p95", "p99", "max"}


def test_auto_takes_the_longest_row_where_that_costs_little() -> None:
    lengths = [100] * 95 + [400, 410, 420, 430, 500]
    # eight rows: 430 (rounded 432) beside seven of the 95 % (400): 3,232 tokens; with the longest (504) 3,304
    assert automatic(lengths, lengths, 4096, batch_size=8) == 504
    assert automatic(lengths, lengths, 4096) == 504  # alone: 504 is less than a quarter more than 432
    far = [*lengths[:-1], 2000]
    assert automatic(far, far, 4096, batch_size=8) == 432  # 4,800 tokens against 3,232
    assert automatic(far, far, 4096, batch_tokens=2000) == 2000  # a micro-batch holds as much anyway
    assert automatic(far, far, 450, batch_tokens=2000) == 450
    assert automatic([*lengths[:20], 231], [*lengths[:20], 231], 4096) == 232  # of twenty rows none may lose


TOOLS = ({"type": "function", "function": {"name": "weather", "description": "of a city, " * 20}},)
CALLED = (Message("user", "where " * 12), Message("assistant", "Mira"))


def tool_row(*messages: Message, tools: bool = True) -> Conversation:
    return Conversation(messages or CALLED, Source("f.jsonl", 7), tools=TOOLS if tools else ())


def test_tools_and_system_texts_are_never_cut_inside(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, TABLE["chatml"])
    whole = sample_of(encoder, tool_row())
    listed = as_json(TOOLS[0])
    assert whole.intact == len(whole)
    cut = sample_of(encoder.with_max_length(whole.needed), tool_row())
    assert listed in tokenizer.decode(cut.ids)
    assert (cut.cut_text, cut.cut_answer) == (len(whole) - whole.needed, 0)  # all that was cut is the user's text
    shorter = sample_of(encoder.with_max_length(whole.needed - 1), tool_row())
    assert listed in tokenizer.decode(shorter.ids)
    assert shorter.cut_answer > 0


# a template whose turns no special token begins: its marks and the texts are encoded as one
WORDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["auto", "chatml", "alpaca", "llama2", "llama3", "words"])
def test_a_system_text_stays_whole_wherever_a_template_has_it(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    template = ChatTemplate(WORDS, tokenizer, "<|end|>") if name == "words" else choose(name, tokenizer)
    encoder = Encoder(tokenizer, template)
    rules = "only ever say what is true of Norland " * 3
    first, asked = Message("system", rules), (Message("user", "why " * 30), Message("assistant", "no"))
    row, alone = tool_row(first, *CALLED, *asked, tools=False), tool_row(first, *asked, tools=False)
    last = Encoder(tokenizer, template, train_on="last")
    sample = sample_of(last, row)
    assert sample.needed < sample.intact == len(sample_of(last, alone)) < len(sample)
    for limit in range(sample.needed, len(sample)):
        cut = sample_of(last.with_max_length(limit), row)
        assert rules.strip() in tokenizer.decode(cut.ids)
        assert cut.cut_answer == 0
        assert (cut.cut_text > 0) == (limit < sample.intact)
    whole = sample_of(encoder, row)
    assert whole.intact == len(whole)  # an old answer that is trained is no old history


def test_of_an_instruction_and_its_input_the_longer_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Conversation((Message("user", "sum it up", context="and so on " * 30), Message("assistant", "so")))
    encoder = Encoder(tokenizer, TABLE["alpaca"])
    cut = sample_of(encoder.with_max_length(len(sample_of(encoder, row)) - 40), row)
    assert "sum it up" in tokenizer.decode(cut.ids)
    assert cut.cut_text == 40


def rows() -> list[Conversation]:
    made = []
    for n in range(40):
        question = Message("user", "why " * (40 if n % 4 == 0 else 2))
        answer = Message("assistant", "so " * (60 if n == 7 else 5))
        made.append(Conversation((question, answer), Source("f.jsonl", n + 1)))
    return made


def encoded(tokenizer: PreTrainedTokenizerFast, limit: int, policy: LengthPolicy) -> tuple[list, DataReport]:
    encoder = Encoder(tokenizer, choose("auto", tokenizer), limit)
    samples, of = tiny.encoded(rows(), encoder, policy)
    return list(samples), counted(DataReport(), samples, of, len(rows()))


def test_what_a_row_needs_is_what_cuts_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    for row in rows():
        needed = sample_of(encoder, row).needed
        assert sample_of(encoder.with_max_length(needed), row).cut_answer == 0
        assert sample_of(encoder.with_max_length(needed - 1), row).cut_answer > 0


def test_a_conversation_needs_all_its_trained_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Message("user", "a b c"), Message("assistant", "d"), Message("user", "e f g"), Message("assistant", "h"))
    every = Encoder(tokenizer, choose("auto", tokenizer))
    last = Encoder(tokenizer, choose("auto", tokenizer), train_on="last")
    assert sample_of(every, Conversation(turns)).needed == len(sample_of(every, Conversation(turns)))
    needed = sample_of(last, Conversation(turns)).needed
    assert needed == 4  # <|user|> <|assistant|> h <|end|>
    assert sample_of(last.with_max_length(needed), Conversation(turns)).cut_answer == 0


@pytest.mark.parametrize(("policy", "kept", "dropped"), [("cut", 40, 0), ("drop", 29, 11)])
def test_rows_that_are_too_long_are_cut_or_dropped(
    tokenizer: PreTrainedTokenizerFast, policy: LengthPolicy, kept: int, dropped: int
) -> None:
    samples, report = encoded(tokenizer, 40, policy)
    assert (len(samples), report.kept, report.dropped) == (kept, kept, dropped)
    assert max(len(sample) for sample in samples) <= 40
    assert (report.cut_prompt, report.cut_answer) == ((11, 1) if policy == "cut" else (0, 0))
    ends = [sample.ends_whole for sample in samples]
    assert ends.count(False) == (1 if policy == "cut" else 0)


def test_rows_that_are_too_long_can_refuse_the_run(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Problems) as caught:
        encoded(tokenizer, 40, "refuse")
    assert len(caught.value.problems) == 11
    first = caught.value.problems[0]
    assert isinstance(first, DataError)
    assert str(first).startswith("f.jsonl:1: the row is too long\n  received: ")
    assert "at most 40 (max_length)" in str(first)


def test_uncut_rows_are_the_same_whatever_the_policy(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, _ = encoded(tokenizer, 10_000, "cut")
    for policy in ("drop", "refuse"):
        other, _ = encoded(tokenizer, 10_000, policy)
        assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plain, other, strict=True))
