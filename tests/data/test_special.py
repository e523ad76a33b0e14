"""Special tokens in texts: never a control token, in answers what the run names, and a check that asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

import fitune
from fitune.checks import textchecks
from fitune.commands.prepare import prepare
from fitune.commands.request import to_train
from fitune.core.config import build
from fitune.core.errors import ConfigError, Problems
from fitune.core.events import Silent
from fitune.core.records import Conversation, Message, Sample, Source, ToolCall
from fitune.data.encode import Encoder
from fitune.data.templates import PieceTemplate, choose
from fitune.data.templates.jinja import ChatTemplate
from fitune.data.tokenizer.new_tokens import add_tokens
from fitune.engine.speech import Speech
from support import tiny
from support.encoding import decoded, sample_of

EMO, OBJ = "<|emo|>", "<|obj|>"
ROW = Conversation(
    (Message("user", f"how do you feel? {OBJ}"), Message("assistant", f"{EMO}glad <|user|>{OBJ}")), Source("f.jsonl", 1)
)


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer with two special tokens that no template uses; thought tags and a mark of turns are not special."""
    made = tiny.make_tokenizer([*tiny.SPECIAL, EMO, OBJ])
    made.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("<think>", "</think>", "<｜User｜>")])
    return made


def labels_of(words: Any, sample: Sample) -> list[str]:
    return words.convert_ids_to_tokens(sample.ids[sample.mask])


def labels(encoder: Encoder, row: Conversation) -> list[str]:
    return labels_of(encoder.tokenizer, sample_of(encoder, row))


def as_rendered(words: Any, messages: tuple[Message, ...], jinja: str = tiny.CHAT) -> list[int]:
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text = words.apply_chat_template(plain, chat_template=jinja, tokenize=False)
    return words(text, add_special_tokens=False)["input_ids"]


def test_a_named_token_is_one_id_in_answers_and_text_everywhere_else(words: Any) -> None:
    template = choose("auto", words)
    plain, named = Encoder(words, template), Encoder(words, template, answer_tokens=[EMO])
    emo, obj, user = (words.convert_tokens_to_ids(token) for token in (EMO, OBJ, "<|user|>"))
    assert emo not in sample_of(plain, ROW).ids
    ids = sample_of(named, ROW).ids.tolist()
    assert labels(named, ROW)[0] == EMO
    assert (ids.count(emo), ids.count(obj), ids.count(user)) == (1, 0, 1)  # the only <|user|> is the template's
    assert words.decode(ids) == words.decode(sample_of(plain, ROW).ids)
    asked = Conversation((Message("user", f"say {EMO}"), Message("assistant", EMO)))
    assert sample_of(named, asked).ids.tolist().count(emo) == 1  # what a user types stays text
    assert named.samples_of([ROW, asked, ROW])[2][0].ids.tolist() == ids
    # in a chat's history it is the same id
    history = (*asked.messages, Message("user", "and now?"))
    assert named.prompt(history)[: len(sample_of(named, asked).ids)] == sample_of(named, asked).ids.tolist()


def test_ids_are_those_of_the_chat_template(words: Any) -> None:
    """Tags that are added tokens but not special are single ids, as wherever the template is rendered as one text."""
    thought = (Message("user", "why <think> so?"), Message("assistant", "<think>\nso\n</think>\n\nbecause"))
    encoder = Encoder(words, choose("auto", words))
    assert sample_of(encoder, Conversation(thought)).ids.tolist() == as_rendered(words, thought)
    named = Encoder(words, choose("auto", words), answer_tokens=[EMO, OBJ])
    messages = (Message("user", "why?"), Message("assistant", f"{EMO} a {OBJ}{EMO}b"))
    assert sample_of(named, Conversation(messages)).ids.tolist() == as_rendered(words, messages)


def test_a_turns_mark_that_is_not_called_special_stays_text(words: Any) -> None:
    """DeepSeek's marks of turns are added tokens that are not special: whoever types one must not begin a turn."""
    jinja = (
        "{% for m in messages %}{{ ('<｜User｜>' if m['role'] == 'user' else '<|assistant|>') + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
    )
    encoder = Encoder(words, ChatTemplate(jinja, words, "<|end|>"))
    mark, think = words.convert_tokens_to_ids("<｜User｜>"), words.convert_tokens_to_ids("<think>")
    assert mark in words("<｜User｜>", split_special_tokens=True)["input_ids"]  # the tokenizer's own rule does not help
    ids = encoder.prompt([Message("user", "a<｜User｜>b<think>")])
    assert ids.count(mark) == 1
    assert "a<｜User｜>b" in words.decode(ids)
    assert ids.count(think) == 2  # a part of answers, not a turn's mark


@pytest.mark.parametrize(
    ("token", "why", "fix"),
    [
        ("<|end|>", "begins, ends or marks a turn", "leave it out"),
        ("<|assistant|>", "begins, ends or marks a turn", "leave it out"),
        ("<pad>", "begins, ends or marks a turn", "leave it out"),
        ("<|new|>", "is no token of this vocabulary", '--new-tokens "<|new|>" adds it'),
        ("the", "is an ordinary piece of this vocabulary", "leave it out"),
    ],
)
def test_tokens_that_answers_must_not_name(words: Any, token: str, why: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder(words, choose("auto", words), answer_tokens=[token])
    assert why in str(caught.value)
    assert fix in str(caught.value)
    assert EMO in str(caught.value)  # what could be named
    with pytest.raises(Problems) as all_:
        Encoder(words, choose("auto", words), answer_tokens=["<|end|>", "<|new|>"])
    assert len(all_.value.problems) == 2


def test_special_tokens_in_answers_are_asked_for_with_counts(words: Any) -> None:
    template = choose("auto", words)
    rows = [ROW, ROW, Conversation((Message("user", OBJ), Message("assistant", "fine")))]
    found = textchecks.answer_tokens(Encoder(words, template), rows)
    assert found.level == "warn"
    assert f"{EMO} 2 times in 2 rows, {OBJ} 2 times in 2 rows" in found.text
    assert found.fix is not None
    assert found.fix.startswith(f'--answer-tokens "{EMO}" "{OBJ}"')
    named = textchecks.answer_tokens(Encoder(words, template, answer_tokens=[EMO, OBJ]), rows)
    assert named.level == "ok"
    assert f"one id each in answers: {EMO} 2 times" in named.text
    assert "what marks turns stays text in answers: <|user|> 2 times" in named.text
    one = textchecks.answer_tokens(Encoder(words, template, answer_tokens=[EMO]), rows)
    assert one.fix is not None
    assert f'"{EMO}" "{OBJ}"' in one.fix  # the whole flag, not only what is missing
    unused = textchecks.answer_tokens(Encoder(words, template, answer_tokens=[EMO]), rows[2:])
    assert (unused.level, unused.text) == ("warn", f"named, and in no answer: {EMO}")
    ended = Conversation((Message("user", "a"), Message("assistant", "b<|end|>\n")))
    finding = textchecks.answer_tokens(Encoder(words, template), [ended])
    assert finding.level == "warn"
    assert "<|end|> in 1 rows" in finding.text
    assert "take it out of the data" in str(finding.fix)


def test_line_breaks_that_are_added_tokens_stay_one_token() -> None:
    """Gemma and GPT-NeoX have runs of line breaks and spaces as added tokens, and templates have them too."""
    words = tiny.make_tokenizer()
    words.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("\n\n", "  ")])
    encoder = Encoder(words, choose("alpaca", words))
    assert words.convert_tokens_to_ids("\n\n") in encoder.prompt([Message("user", "a\n\nb")])[-20:]
    sample = sample_of(encoder, Conversation((Message("user", "a"), Message("assistant", "b\n\nc  d"))))
    assert labels_of(words, sample) == ["b", "\n\n", "c", "  ", "d", "<|end|>"]


def test_names_that_are_bare_letters_are_not_looked_for_inside_words() -> None:
    words = tiny.make_tokenizer([*tiny.SPECIAL, "eop"])
    talk = Conversation((Message("user", "who?"), Message("assistant", "people")))
    assert textchecks.answer_tokens(Encoder(words, choose("auto", words)), [talk]).level == "ok"


def test_answer_tokens_are_shown_in_answers_and_no_other_special_token(words: Any) -> None:
    template = choose("auto", words)
    named, plain = Encoder(words, template, answer_tokens=[EMO]), Encoder(words, template)
    ids = words(f"<pad>{EMO}glad{OBJ} the<|end|>", add_special_tokens=False)["input_ids"]
    assert named.text(ids) == f"{EMO}glad the"
    assert plain.text(ids) == "glad the"
    speech = Speech(named)
    shown = [speech.add(one) for one in ids]
    assert "".join(shown) + speech.end() == f"{EMO}glad the"


def test_new_tokens_that_exist_lead_to_answer_tokens(words: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        add_tokens(words, [EMO, "<|other|>"])
    assert "special tokens that the vocabulary has already" in str(caught.value)
    assert f'--answer-tokens "{EMO}"' in str(caught.value)
    assert words.convert_tokens_to_ids("<|other|>") is None  # refused before anything is added
    row = add_tokens(words, [EMO], [EMO])[0]  # with both, its row is trained
    assert row.id == words.convert_tokens_to_ids(EMO)
    assert len(row.pieces) > 1


def test_a_run_trains_answer_tokens_and_its_chat_shows_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.make_model("llama").save_pretrained(str(folder))
    tiny.make_tokenizer([*tiny.SPECIAL, EMO]).save_pretrained(str(folder))
    data = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": f"{EMO}glad"}]
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)), encoding="utf-8")
    values: dict[str, Any] = {
        "model": str(folder),
        "data": [str(data)],
        "output": str(tmp_path / "run"),
        "val_share": 0,
        "cache": "none",
    }
    asked = prepare(to_train(build(values)), Silent())
    warned = {finding.rule: finding for finding in asked.findings}["answer-tokens"]
    assert (warned.level, f'--answer-tokens "{EMO}"' in str(warned.fix)) == ("warn", True)
    settings: dict[str, Any] = {
        **values,
        "answer_tokens": [EMO],
        "new_tokens": [EMO],
        "max_steps": 30,
        "lr": 0.05,
        "sample_prompts": 0,
    }
    fitune.train(**settings)
    assert fitune.generate(fitune.load(str(tmp_path / "run")), "how?", max_new_tokens=8) == f"{EMO}glad"
    fitune.merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert fitune.generate(fitune.load(str(tmp_path / "merged")), "how?", max_new_tokens=8) == f"{EMO}glad"


def test_a_special_token_of_the_template_is_one_where_it_is_encoded_with_a_users_text() -> None:
    """A user's own template with tokens around calls and results: tokens there, text in what was called and given."""
    tokenizer = tiny.make_tokenizer([*tiny.SPECIAL, "<|tool|>", "<|/tool|>"])
    template = PieceTemplate(
        "mine", "<|user|>{content}", "<|assistant|>", tools="{tools}", tool_call="<|tool|>{name}{arguments}<|/tool|>",
        tool="<|tool|>{content}<|/tool|>", stop="<|end|>",
    )  # fmt: skip
    call = Message("assistant", "Well.", tool_calls=(ToolCall("clock", '{"city": "<|/tool|>"}'),))
    row = (Message("user", "Time?"), call, Message("tool", "10 <|tool|>"), Message("assistant", "Ten."))
    encoder = Encoder(tokenizer, template)
    sample = sample_of(encoder, Conversation(row))
    opened, closed = (tokenizer.convert_tokens_to_ids(name) for name in ("<|tool|>", "<|/tool|>"))
    assert sample.ids.tolist().count(opened) == 2
    assert sample.ids.tolist().count(closed) == 2
    assert "10 <|tool|><|/tool|>" in decoded(encoder, sample.ids)
    assert sample.mask[sample.ids.tolist().index(opened)]
