"""Every kind of chat template is handed over as it was trained: transformers makes the same ids from the folder."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fitune.core.records import Message
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from fitune.data.templates.jinja import of_tokenizer
from fitune.models.handover import hand_over
from fitune.models.handover.proof import prove
from support import chat_templates as jinja
from support import served, tiny
from support.served_kinds import KINDS

RULES, ASKED = Message("system", "Be brief."), Message("user", "Name a fruit.")
MUSED = Message("assistant", "A cherry.", thought="Fruits are sweet.")


IN_PIECES = "`--template bloom`"  # on the vocabulary of the table, where a full stop and line breaks make one token
AS_TEXT = [name for name, kind in KINDS.items() if name != IN_PIECES and not kind.named.startswith("chatglm")]


def test_a_kind_that_no_text_writes_has_the_ids_of_its_prompts_by_pieces(tmp_path: Path) -> None:
    encoder = served.encoder_of(IN_PIECES, "")
    done = hand_over(tmp_path, encoder.tokenizer, encoder.template)
    assert (done.written, done.pieces) == (False, True)


@pytest.mark.parametrize("name", AS_TEXT)
def test_each_kind_is_proved(name: str, tmp_path: Path) -> None:
    encoder = served.encoder_of(name, datetime.now().date().isoformat())
    done = hand_over(tmp_path, encoder.tokenizer, encoder.template)
    assert done.written
    assert done.proof.holds, done.proof.differing
    plain = AutoTokenizer.from_pretrained(tmp_path)
    found = plain.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert found == encoder.prompt([Message("user", "Hi")])


def test_a_system_text_that_the_run_moved_is_moved_elsewhere_too(tmp_path: Path) -> None:
    encoder = served.encoder_of("Gemma 2", "2026-01-05")
    done = hand_over(tmp_path, encoder.tokenizer, encoder.template)
    assert {"a system text", "a system text between turns"} <= set(done.proof.same)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": one.role, "content": one.content} for one in (RULES, ASKED)]
    found = plain.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert found == encoder.prompt([RULES, ASKED])
    assert not prove(jinja.GEMMA2, plain, encoder).holds  # the published one refuses it: the proof would say so


def tags(known: bool) -> Any:
    tokenizer = tiny.make_tokenizer([*tiny.SPECIAL, "<|im_start|>", "<|im_end|>"])
    if known:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def test_a_named_template_has_a_place_for_thoughts_where_the_vocabulary_has_tags(tmp_path: Path) -> None:
    encoder = Encoder(tags(True), TABLE["chatml"])
    done = hand_over(tmp_path, encoder.tokenizer, encoder.template)
    assert {"an answer with a thought", "thoughts in the history"} <= set(done.proof.same)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    history: list[dict[str, str]] = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": "A cherry.", "reasoning_content": "Fruits are sweet."},
        {"role": "user", "content": "Another?"},
    ]
    found = plain.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    assert found == encoder.prompt([ASKED, MUSED, replace(ASKED, content="Another?")])


def test_a_named_template_without_tags_refuses_thoughts_elsewhere_as_here(tmp_path: Path) -> None:
    encoder = Encoder(tags(False), TABLE["chatml"])
    done = hand_over(tmp_path, encoder.tokenizer, encoder.template)
    assert not [name for name in done.proof.same if "thought" in name]
    plain = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(Exception, match="no place for a thought"):
        plain.apply_chat_template([{"role": "assistant", "content": "A.", "reasoning_content": "B."}])


def test_a_date_and_options_stay_those_of_the_run(tmp_path: Path) -> None:
    kind = KINDS["Qwen3.5, enable_thinking=false"]
    tokenizer = jinja.make_tokenizer(kind.jinja, kind.eos)
    hand_over(tmp_path, tokenizer, of_tokenizer(tokenizer, options=kind.options))
    plain = AutoTokenizer.from_pretrained(tmp_path)
    text = plain.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert str(text).endswith("<think>\n\n</think>\n\n")
