"""A system text between turns: written in its place, or refused by name with its row; and what cutting leaves."""

from __future__ import annotations

from typing import Any

import pytest

from fitune.core.errors import DataError
from fitune.core.records import Conversation, Message, Source
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from support import served_chatglm, tiny
from support.encoding import decoded, sample_of

pytestmark = pytest.mark.unit

FIRST, LATER = Message("system", "Be kind."), Message("system", "Be brief.")
HI, HELLO, BYE, SO_LONG = (
    Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Bye."), Message("assistant", "So long."),
)  # fmt: skip
ROW = Conversation((FIRST, HI, HELLO, LATER, BYE, SO_LONG), Source("f.jsonl", 3))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    special = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return tiny.make_tokenizer([*tiny.SPECIAL, *special])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "Hello.<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBye."),
        ("qwen", "Hello.<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBye."),
        ("llama3", "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"),
    ],
)
def test_a_template_with_turns_of_the_system_writes_it_in_its_place(name: str, text: str, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE[name])
    sample = sample_of(encoder, ROW)
    assert text in decoded(encoder, sample.ids)
    assert "Be brief" not in decoded(encoder, sample.ids[sample.mask])
    assert sample.ids.tolist()[: len(encoder.prompt(ROW.messages[:5]))] == encoder.prompt(ROW.messages[:5])


def test_chatglm3_writes_it_in_its_place_and_no_answer_is_taught_to_begin_it() -> None:
    encoder = Encoder(served_chatglm.make_tokenizer("chatglm3"), TABLE["chatglm3"])
    sample = sample_of(encoder, ROW)
    text = decoded(encoder, sample.ids)
    assert text.count("<|system|>") == 2
    assert "Hello.<|system|>\n Be brief.<|user|>\n Bye.<|assistant|>" in text
    # servers stop at the ids of user and observation and at EOS, not at the system's
    assert decoded(encoder, sample.ids[sample.mask]) == "\n Hello. \n So long.</s>"
    assert sample.ids.tolist()[: len(encoder.prompt(ROW.messages[:5]))] == encoder.prompt(ROW.messages[:5])
    later = encoder.prompt(ROW.messages[:4])  # the next answer is asked for behind the system text
    assert decoded(encoder, later).endswith("Hello.<|system|>\n Be brief.<|assistant|>")


@pytest.mark.parametrize("name", ["chatglm", "chatglm2"])
def test_the_rounds_of_chatglm_have_no_place_for_it(name: str) -> None:
    encoder = Encoder(served_chatglm.make_tokenizer(name), TABLE[name])
    with pytest.raises(DataError, match=f"template '{name}' has no place for a system text"):
        encoder.samples(ROW)


@pytest.mark.parametrize("name", ["alpaca", "alpaca-zh", "llama2", "bloom", "plain"])
def test_a_template_without_a_place_for_it_names_itself_and_the_row(name: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"template '{name}' has no place for a system text") as caught:
        Encoder(tokenizer, TABLE[name]).samples(ROW)
    assert "f.jsonl:3" in str(caught.value)
    assert "turn 4: 'Be brief.'" in str(caught.value)


def test_it_is_cut_with_the_exchange_behind_it_and_never_alone(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE["chatml"])
    rows = (FIRST, HI, HELLO, LATER, BYE, SO_LONG, Message("user", "Wait."), Message("assistant", "Yes?"))
    whole = len(sample_of(encoder, Conversation(rows)))
    less = decoded(encoder, sample_of(encoder.with_max_length(whole - 1), Conversation(rows)).ids)
    assert "Hi." not in less
    assert "Be kind." in less
    assert "Be brief.<|im_end|>\n<|im_start|>user\nBye." in less
    shortest = sample_of(encoder, Conversation((FIRST, *rows[-2:])))
    least = sample_of(encoder.with_max_length(len(shortest)), Conversation(rows))
    assert least.ids.tolist() == shortest.ids.tolist()


def test_what_is_needed_of_a_row_counts_the_system_text_before_its_question(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE["chatml"], train_on="last")
    sample = sample_of(encoder, ROW)
    assert sample.intact == len(sample_of(encoder, Conversation((FIRST, *ROW.messages[3:]))))
