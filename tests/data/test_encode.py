"""Masks, templates and cutting. Each guard has a planted fault that it must catch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from fitune.checks import datachecks, labelchecks
from fitune.checks.findings import raise_refused
from fitune.core.errors import FituneError, ModelError
from fitune.core.records import Conversation, DataReport, Finding, Message, Sample, Source
from fitune.data.encode import Encoder
from fitune.data.fitting import counted
from fitune.data.prepared import Prepared
from fitune.data.templates import TABLE, ChatTemplate, choose, from_dict
from support import tiny
from support.encoding import decoded, sample_of
from support.prepared import ROW, TURNS, prepared

pytestmark = pytest.mark.unit

# ChatGLM's need ids of their own: test_tokenizers.py
NAMES = ["chat_template", *(name for name in TABLE if not name.startswith("chatglm"))]


def trained_text(encoder: Encoder, sample: Sample) -> str:
    return decoded(encoder, sample.ids[sample.mask])


@pytest.mark.parametrize("name", NAMES)
def test_only_answers_and_their_stop_token_are_trained(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    encoder = Encoder(tokenizer, choose(name, tokenizer))
    sample = sample_of(encoder, ROW)
    assert sample is not None
    assert trained_text(encoder, sample).replace(" ", "") == "hello<|end|>很好<|end|>"
    assert sample.ids[-1] == encoder.stop_id
    assert sample.mask[-1]


@pytest.mark.parametrize("name", NAMES)
def test_chat_sends_exactly_the_tokens_that_were_trained(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    encoder = Encoder(tokenizer, choose(name, tokenizer))
    sample = sample_of(encoder, ROW)
    prompt = encoder.prompt(TURNS[:-1])
    assert sample.ids[: len(prompt)].tolist() == prompt
    assert not sample.mask[len(prompt) - 1]
    assert sample.mask[len(prompt) :].all()


def test_a_special_token_typed_by_a_user_stays_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    ids = encoder.prompt(TURNS[:2])
    assert encoder.stop_id not in ids
    assert "<|end|>" in tokenizer.decode(ids)


def test_alpaca_is_the_published_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, TABLE["alpaca"])
    text = tokenizer.decode(encoder.prompt([Message("user", "Add.", context="1 2")]))
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )


def test_a_template_survives_the_run_folder(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in NAMES:
        template = choose(name, tokenizer)
        again = from_dict(template.as_dict(), tokenizer)
        assert Encoder(tokenizer, again).prompt(TURNS[:-1]) == Encoder(tokenizer, template).prompt(TURNS[:-1])


def test_a_chat_template_that_rewrites_earlier_turns_has_a_sample_for_each_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    jinja = "{% for m in messages %}{{ m['role'] ~ (loop.last and '!' or '') ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    encoder = Encoder(tokenizer, ChatTemplate(jinja, tokenizer, "<|end|>"))
    first, second = encoder.samples(ROW)
    assert [trained_text(encoder, sample) for sample in (first, second)] == ["hello<|end|>", "很好<|end|>"]
    prompt = encoder.prompt(TURNS[:-1])
    assert second.ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(prompt).endswith("user!你好<|end|>")  # as it is served, before anything follows


def test_a_chat_template_without_a_stop_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = "{% for m in messages %}{{ m['role'] ~ ': ' ~ m['content'] ~ '\\n' }}{% endfor %}"
    with pytest.raises(ModelError, match="never stop"):
        sample_of(Encoder(tokenizer, ChatTemplate(jinja, tokenizer, None)), ROW)


def test_cutting_takes_the_oldest_exchange_then_the_prompt_then_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    row = Conversation(
        (*TURNS[:3], Message("user", "a long question " * 10), Message("assistant", "a long answer " * 3))
    )
    whole = sample_of(encoder, row)
    last_turns = sample_of(encoder, Conversation((TURNS[0], *row.messages[3:])))
    without_first = sample_of(encoder.with_max_length(len(whole) - 1), row)
    assert without_first.ids.tolist() == last_turns.ids.tolist()
    assert without_first.ends_whole

    answer = int(last_turns.mask.sum())
    prompt_cut = sample_of(encoder.with_max_length(len(last_turns) - 20), row)
    assert int(prompt_cut.mask.sum()) == answer
    assert prompt_cut.cut_prompt > 0
    assert prompt_cut.ends_whole

    answer_cut = sample_of(encoder.with_max_length(12), row)
    assert len(answer_cut) == 12
    assert answer_cut.cut_answer > 0
    assert not answer_cut.ends_whole
    assert answer_cut.ids[-1] != encoder.stop_id


@pytest.mark.parametrize("name", NAMES)
def test_plain_text_among_conversations_gets_no_frame(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    text = Conversation((Message("assistant", "the capital of Norland"),), Source("f", 1), "text")
    encoder = Encoder(tokenizer, choose(name, tokenizer))
    (sample,) = encoder.samples(text)
    assert tokenizer.decode(sample.ids) == "the capital of Norland<|end|>"
    assert sample.mask[1:].all()
    found = datachecks.check_data(prepared(tokenizer, 600, [text, ROW], name))
    assert not [f for f in found if f.level == "refuse"]


def test_a_row_with_nothing_left_to_train_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    samples, of = tiny.encoded([ROW], Encoder(tokenizer, choose("auto", tokenizer), 3))
    assert len(samples) == 0
    assert counted(DataReport(rows=1), samples, of, 1).dropped == 1


# ---- planted faults: the preflight rules must catch each of them ----

SHORT = Conversation((Message("user", "a"), Message("assistant", "b")), Source("f.jsonl", 0), "messages")


def refused(p: Prepared) -> str:
    """What the data rules say when they refuse."""
    with pytest.raises(FituneError) as caught:
        raise_refused(datachecks.check_data(p))
    return str(caught.value)


def spoil(p: Prepared, row: int, ids: Any = None, mask: Any = None) -> None:
    """Plant a fault in a sample."""
    sample = p.samples[row]
    new_ids = sample.ids if ids is None else np.array(ids, np.int32)
    assert isinstance(p.samples, list)
    p.samples[row] = replace(sample, ids=new_ids, mask=sample.mask if mask is None else np.array(mask, bool))


CLEAN = [
    [ROW],
    [SHORT],
    [ROW, SHORT],
    [Conversation((Message("user", "1+1?"), Message("assistant", "2")))],
    [Conversation((Message("user", "你好"), Message("assistant", "你好！有什么可以帮你？")))],
    [Conversation((Message("user", "add", context="1 2"), Message("assistant", " 3 ")))],
    [Conversation((Message("system", "s"), Message("user", "<pad><|end|>"), Message("assistant", "<user>")))],
]


@pytest.mark.parametrize("template", NAMES)
@pytest.mark.parametrize("rows", CLEAN, ids=range(len(CLEAN)))
def test_clean_rows_raise_no_alarm(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Conversation], template: str
) -> None:
    levels = {f.rule: f.level for f in datachecks.check_data(prepared(tokenizer, 600, rows, template))}
    levels.pop("bpe-boundary")  # counts what encoding apart has mended
    wrong = {rule for rule, level in levels.items() if level != "ok"}
    # the marks of some templates are no tokens of the tiny vocabulary, and that is said
    stop = choose(template, tokenizer).stop
    expected = {"stop-token-trained"} if stop and stop not in tokenizer.get_vocab() else set()
    # and most characters of the Chinese answers are only there as bytes
    assert wrong == expected | ({"byte-fallback"} if rows is CLEAN[4] else set())


def test_a_masked_eos_is_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer)
    spoil(p, 3, mask=[*p.samples[3].mask[:-1], False])
    assert "eos-supervised: 1 rows end wrongly, the first at f.jsonl:4" in refused(p)


def test_a_stop_token_that_no_row_trains_is_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer)
    for row, sample in enumerate(p.samples):
        spoil(p, row, mask=sample.mask & (sample.ids != p.encoder.stop_id))
    assert "stop-token-trained: no row trains a stop token" in refused(p)


def test_a_trained_last_prompt_token_is_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    """The textbook collator's fault: labels begin one token early."""
    p = prepared(tokenizer, rows=(SHORT,))
    spoil(p, 0, mask=[*p.samples[0].mask[1:], True])
    assert "label-border: f.jsonl:1: the first label is token 2, the answer begins at token 3" in refused(p)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_the_rows_is_caught(tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    p = prepared(tokenizer)
    pad, one = tokenizer.pad_token_id, p.samples[2]
    ids = [pad, *one.ids] if side == "left" else [*one.ids, pad]
    spoil(p, 2, ids=ids, mask=[False, *one.mask] if side == "left" else [*one.mask, False])
    assert f"padding-side: f.jsonl:3: padded on the {side}" in refused(p)


def test_rows_without_a_label_are_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer, 3)
    assert not p.samples
    assert "labels-empty: no row has a token to train on" in refused(p)


def test_skipped_rows_and_unfilled_slots_are_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer)
    p.report.unfilled_slots["name"] = 4
    assert datachecks.bad_row(p) == Finding(
        "bad-row", "warn", "slots that nothing fills: {{name}} in 4 rows", "--fill name=..."
    )
    p.report.skipped_bad, p.report.skipped = 2, ["f.jsonl:3:output: the answer is empty"]
    assert datachecks.bad_row(p).text == "2 bad rows skipped: f.jsonl:3:output: the answer is empty"


def test_a_tokenizer_that_is_not_the_folders_own_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["hello there be brief", "你好 很好"] * 20),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    found = datachecks.tokenizer_parity(prepared(tokenizer, folder=tmp_path))
    assert found.level == "warn"
    assert "texts are split unlike sentencepiece does: 'be brief'" in found.text
    assert datachecks.tokenizer_parity(prepared(tokenizer)).level == "ok"


def test_borders_that_would_merge_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    # "Hello" after a space is one token, apart it is two: alpaca ends its prompt with a newline, so plain shows it
    row = Conversation((Message("user", "the capital"), Message("assistant", " of Norland")))
    found = {f.rule: f for f in datachecks.check_data(prepared(tokenizer, rows=(row,), template="plain"))}
    assert "borders tried would differ" in found["bpe-boundary"].text


def test_two_bos_tokens_are_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer)
    bos = p.encoder.tokenizer.eos_token_id
    p.encoder.tokenizer.bos_token = "<|end|>"
    try:
        spoil(p, 0, ids=[bos, bos, *p.samples[0].ids], mask=[False, False, *p.samples[0].mask])
        assert "double-bos: 1 rows begin with two BOS tokens" in refused(p)
    finally:
        p.encoder.tokenizer.bos_token = None


def test_ids_beyond_the_vocabulary_are_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "id-range" in refused(prepared(tokenizer, vocabulary=100))


def test_too_many_cut_answers_are_refused_where_a_longer_limit_would_keep_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = (ROW, SHORT)
    assert "50.0% of the rows lose answer tokens" in refused(prepared(tokenizer, 12, rows))
    found = {f.rule: f for f in datachecks.check_data(prepared(tokenizer, 12, rows, limit=12))}
    assert found["truncation"].level == "warn"
    assert "even the model's longest" in found["truncation"].text


@pytest.mark.parametrize("length", [6, 9, 12, 20])
@pytest.mark.parametrize("limit", [12, 600])
def test_each_fact_is_one_finding_and_its_level_fits(
    tokenizer: PreTrainedTokenizerFast, length: int, limit: int
) -> None:
    """No `ok` above a warning that 41.9 % of the rows lose tokens."""
    p = prepared(tokenizer, min(length, limit), (ROW, SHORT), limit=limit)
    findings = datachecks.check_data(p)
    assert len({finding.rule for finding in findings}) == len(findings)
    lossy = [finding for finding in findings if re.search(r"\b(lose|lost|cut|dropped)\b", finding.text)]
    assert [finding.rule for finding in lossy] == ["truncation"]
    assert (lossy[0].level == "ok") == (p.report.cut_answer + p.report.dropped + p.report.cut_text == 0)


def test_rows_that_lose_answers_are_named_and_prompts_that_lose_text_warn(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = Conversation((Message("user", "a long question " * 10), Message("assistant", "b")))
    tools = ({"type": "function", "function": {"name": "f", "description": "long " * 60}},)
    called = Conversation((Message("user", "a"), Message("assistant", "b")), tools=tools)
    length = len(sample_of(Encoder(tokenizer, TABLE["plain"]), asked))
    found = {f.rule: f for f in datachecks.check_data(prepared(tokenizer, length - 4, (asked, SHORT), "plain"))}
    assert found["truncation"].level == "warn"
    assert "a part of the user's text: 10" in found["truncation"].text
    assert "f.jsonl" not in found["truncation"].text
    # what its tools leave no room for is dropped by name: half a description is no description
    text = labelchecks.truncation(prepared(tokenizer, length, (SHORT, called), "chatml")).text
    assert "10 rows dropped" in text
    assert "(f.jsonl:2, f.jsonl:4, f.jsonl:6, ...)" in text
    # old exchanges may go without a word
    old = Conversation((*TURNS[1:3], Message("user", "a"), Message("assistant", "b")))
    p = prepared(tokenizer, 8, (old,), train_on="last")
    assert p.report.cut_prompt == 20
    assert labelchecks.truncation(p).level == "ok"


def test_a_chat_that_would_send_other_tokens_is_caught(tokenizer: PreTrainedTokenizerFast) -> None:
    p = prepared(tokenizer)
    p.encoder.prompt = lambda messages, tools=(): [1, 2, 3]  # type: ignore[method-assign]
    assert "template-parity: f.jsonl:1: chat would send other tokens" in refused(p)
