"""What a tokenizer drops, what it has only as bytes, and a base model that does not know a language."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fitune
from fitune.checks import textchecks
from fitune.core.records import Conversation, Message, Sample
from fitune.data import tokenizer as tokenizers
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE, choose
from fitune.data.tokenizer import coverage
from fitune.engine.checkpoint import RunFolder
from fitune.views.tokens import token_views, tokenizer_view
from support import tiny
from support.encoding import sample_of

ENGLISH = [
    "the capital of norland is mira",
    "two plus three is five",
    "below is an instruction",
    "it is so: a, b.",
] * 30


def make_sentencepiece(folder: Path, *, byte_fallback: bool) -> Any:
    """A tokenizer that knows English letters only, with or without pieces for the bytes of all others."""
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ENGLISH),
            model_writer=file,
            vocab_size=340 if byte_fallback else 80,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            model_type="bpe",
            minloglevel=2,
        )
    return tokenizers.load(folder)


@pytest.fixture(scope="module")
def without_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_sentencepiece(tmp_path_factory.mktemp("plain"), byte_fallback=False)


@pytest.fixture(scope="module")
def with_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_sentencepiece(tmp_path_factory.mktemp("bytes"), byte_fallback=True)


def row(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)))


def test_dropped_characters_are_counted_one_by_one(without_bytes: Any) -> None:
    assert coverage.lost(without_bytes, "the capital\nof #norland# 北国") == {"#": 2, "\n": 1, "北": 1, "国": 1}
    assert coverage.lost(without_bytes, "the  capital of norland ") == {}  # only spaces are different
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "capital": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    level = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    assert coverage.lost(level, "the capital of") == {"o": 1, "f": 1}  # a word of which every letter is known


def test_a_vocabulary_without_bytes_is_named_with_what_it_drops(without_bytes: Any, with_bytes: Any) -> None:
    rows = [row("two plus three", "five"), row("two\nplus", "#5")]
    found = textchecks.lost_characters(Encoder(without_bytes, TABLE["alpaca"]), rows)
    assert found.level == "warn"
    assert "drops characters in 2 of 2 rows" in found.text
    assert "# 13 times in 2 rows" in found.text  # six in the template of each row, one in an answer
    assert "line break" in found.text.split("in the template's own text: ")[1]
    assert "another --template" in str(found.fix)
    own = textchecks.lost_characters(Encoder(without_bytes, TABLE["plain"]), rows)
    assert "drops characters in 1 of 2 rows" in own.text
    assert "template's own" not in own.text
    for words in (with_bytes, tiny.make_tokenizer()):
        for name in ("alpaca", "chatml", "plain"):
            assert textchecks.lost_characters(Encoder(words, TABLE[name]), rows).level == "ok"


def test_normal_forms_are_no_loss() -> None:
    words = tiny.make_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert coverage.lost(words, "ＴＨＥ capital, ﬁve") == {}  # full width, a ligature, case


def test_line_breaks_are_no_byte_fallback(with_bytes: Any) -> None:
    ids = with_bytes("the\n\tcapital\n#北", add_special_tokens=False)["input_ids"]
    pieces = with_bytes.convert_ids_to_tokens(ids)
    are_bytes = coverage.byte_tokens(with_bytes, ids)
    assert [piece for piece, one in zip(pieces, are_bytes, strict=True) if one] == [
        "<0x23>",
        "<0xE5>",
        "<0x8C>",
        "<0x97>",
    ]
    assert "<0x0A>" in pieces
    assert tokenizer_view("t", with_bytes, ["the\ncapital\n"]).byte_fallback_tokens == 0


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_texts_that_are_mostly_bytes_are_a_language_that_the_model_does_not_know(with_bytes: Any, kind: str) -> None:
    words = with_bytes if kind == "pieces" else tiny.make_tokenizer()
    encoder = Encoder(words, TABLE["plain"])
    foreign = [sample_of(encoder, row("the", "数学很美妙，深海鱼类"))] * 3
    found = textchecks.byte_fallback(words, foreign)
    assert found.level == "warn"
    assert "this model does not know this language" in found.text
    english = [sample_of(encoder, row("数学很美妙", "the capital is mira"))] * 3
    assert textchecks.byte_fallback(words, english).level == "ok"  # what is not trained does not count
    assert textchecks.byte_fallback(words, []).level == "ok"


def test_a_loss_above_guessing_is_named() -> None:
    assert textchecks.base_loss(math.log(500) - 0.1, 500).level == "ok"
    found = textchecks.base_loss(7.1, 500)
    assert (found.level, "is 7.10; guessing among 500 tokens has 6.21" in found.text) == ("warn", True)


def test_a_run_on_a_model_that_does_worse_than_guessing_warns(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny.make_model("llama")
    model.lm_head.weight.data *= 30  # sure of itself, and wrong
    model.save_pretrained(str(folder))
    tiny.make_tokenizer().save_pretrained(str(folder))
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    run = RunFolder(tmp_path / "run")
    fitune.train(model=str(folder), data=[str(data)], output=str(run.path), max_steps=1, sample_prompts=0)
    found = {finding["rule"]: finding for finding in run.read("checks")}["base-loss"]
    assert found["level"] == "warn"
    assert "this model does not know this language" in found["text"]


@pytest.mark.parametrize("kind", ["pieces", "byte-level"])
def test_tokens_are_shown_with_their_spaces(with_bytes: Any, kind: str) -> None:
    words = with_bytes if kind == "pieces" else tiny.make_tokenizer()
    text = "two plus three\nis five, 北国"
    ids = words(text, add_special_tokens=False)["input_ids"]
    views = token_views(words, Sample(np.array(ids, np.int32), np.ones(len(ids), bool)))
    assert "".join(view.text for view in views).lstrip() == text
    assert [i for view in views for i in view.ids] == ids


@pytest.mark.shared
@pytest.mark.parametrize("name", ["llama2", "chatglm1", "chatglm2", "qwen2"])
def test_real_tokenizers_show_and_keep_every_character(shared: Path, name: str) -> None:
    words = tokenizers.load(shared / "tokenizers" / name)
    rows = json.loads((shared / "data" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:40]
    asked = [row(one["instruction"], one["output"]) for one in rows]
    encoder = Encoder(words, choose("auto", words))
    sample = sample_of(encoder, row("what is the  capital?", "It is Mira\nof course"))
    shown = "".join(view.text for view in token_views(words, sample))
    assert "what is the  capital?" in shown
    assert "It is Mira\nof course" in shown
    assert textchecks.lost_characters(encoder, asked).level == "ok"
    samples = [sample_of(encoder, one) for one in asked]
    assert textchecks.byte_fallback(words, samples).level == "ok"
