"""Tokenizers in a GGUF: each kind of cuts, sentencepiece's, plain BPE; and what llama.cpp has no tokenizer for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fitune.commands.export_gguf import drafted
from fitune.commands.same_answers import Sizes, compare
from fitune.core.errors import ModelError
from fitune.engine.loading import load
from fitune.models.handover.gguf import llamacpp, vocabulary
from fitune.models.handover.gguf.pretokenizers import DIGITS, GPT2, KINDS, WITHOUT_MARKS, kind
from fitune.models.handover.gguf.strings import strings
from support import tiny

needs_llama_cpp = pytest.mark.skipif(
    not llamacpp.installed(), reason="llama-cpp-python (the extra `verify`) is not installed"
)
ROWS = 2000
CASES = [(cuts, whole) for cuts, names in KINDS.items() for whole, name in enumerate(names) if name]


def byte_level(cuts: tuple[str, ...], *, whole_words: bool) -> Any:
    """A tokenizer that cuts so, trained on the very texts that are compared: its tokens are words of them."""
    steps: list[Any] = []
    for cut in cuts:
        if cut == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif cut != GPT2:
            steps.append(pre_tokenizers.Split(Regex(cut), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in cuts))
    core = Tokenizer(models.BPE(ignore_merges=whole_words))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS, special_tokens=tiny.SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    # not </s>: llama.cpp takes a token of that text for the end of an answer, whatever it is
    core.train_from_iterator([text.replace("</s>", "") for text in strings(4000, [])], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<pad>", additional_special_tokens=tiny.SPECIAL[2:]
    )
    made.chat_template = tiny.CHAT
    return made


def folder_of(tokenizer: Any, folder: Path) -> Path:
    tiny.make_model("llama", vocabulary=ROWS).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def compared(folder: Path, tmp_path: Path, count: int = 3000) -> Any:
    plan = drafted(folder, "demo")
    plan.write(tmp_path / "a.gguf", "f32")
    tuned = load(folder, device="cpu", precision="fp32")
    return compare(tmp_path / "a.gguf", plan, tuned, Sizes(prompts=5, tokens=4, strings=count))


@needs_llama_cpp
@pytest.mark.parametrize(("cuts", "whole"), CASES, ids=[str(KINDS[cuts][whole]) for cuts, whole in CASES])
def test_each_kind_of_cuts_gives_the_ids_of_transformers(cuts: tuple[str, ...], whole: int, tmp_path: Path) -> None:
    folder = folder_of(byte_level(cuts, whole_words=bool(whole)), tmp_path / "model")
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert kind(values) == KINDS[cuts][whole]
    found = compared(folder, tmp_path)
    assert found.problems == []
    assert found.strings_same == 3000


@needs_llama_cpp
@pytest.mark.parametrize("name", sorted(WITHOUT_MARKS))
def test_the_exception_of_a_kind_is_one(name: str, tmp_path: Path) -> None:
    cuts = next(cuts for cuts, names in KINDS.items() if name in names)
    folder = folder_of(byte_level(cuts, whole_words=KINDS[cuts][1] == name), tmp_path / "model")
    plan = drafted(folder, "demo")
    assert plan.vocabulary.exceptions == [vocabulary.MARKS]
    plan.write(tmp_path / "a.gguf", "f32")
    words = load(folder, device="cpu", precision="fp32").tokenizer
    with llamacpp.LlamaCpp(tmp_path / "a.gguf", 64) as other:
        text = "नमस्ते"
        assert other.ids(text) != words(text, add_special_tokens=False)["input_ids"]


def test_what_is_cut_otherwise_is_named() -> None:
    words = byte_level((r"\p{N}{1,2}", GPT2), whole_words=False)
    with pytest.raises(ModelError) as error:
        vocabulary.of(words, ROWS)
    assert r"\p{N}{1,2} then gpt2" in str(error.value)
    assert "deepseek-v3" in str(error.value)


def test_a_normalizer_that_changes_text_is_refused() -> None:
    from tokenizers import normalizers

    words = byte_level((GPT2,), whole_words=False)
    words.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="changes text before it cuts it"):
        vocabulary.of(words, ROWS)


def test_a_unigram_vocabulary_is_refused() -> None:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0, False))
    with pytest.raises(ModelError, match="its model is Unigram"):
        vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=core), ROWS)


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(ModelError, match="more tokens than the model's embedding has rows"):
        vocabulary.of(byte_level((GPT2,), whole_words=False), 100)


def test_rows_that_no_token_has_are_unused() -> None:
    made = vocabulary.of(tiny.make_tokenizer(), 1000)
    assert made.tokens[-1] == "[PAD999]"
    assert made.types[-1] == 5
    assert made.types[:5] == [3] * 5
    assert len(set(made.tokens)) == 1000
