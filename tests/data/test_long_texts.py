"""Texts of millions of characters are encoded in parts, to the ids of the whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import demo
from fitune.data import tokenizer as tokenizers
from fitune.data.tokenizer import encode_many, long

PIECES = (
    "你好",
    ", ",
    "world",
    "! ",
    "  ",
    "\n",
    "\n\n",
    " a",
    "1 2",
    "don't ",
    "\t",
    "é",
    "🙂",
    "▁",
    " Ġ",
    ".",
    "aaaa ",
)


def some_text(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(PIECES) for _ in range(count))


def bundled() -> Any:
    return tokenizers.load(demo.bundled() / "model")


def in_parts(
    tokenizer: Any, text: str, monkeypatch: pytest.MonkeyPatch, *, continued: bool = False
) -> tuple[int, list[int]]:
    """How many parts, and the ids."""
    asked: list[str] = []
    alone = tokenizers._bare
    monkeypatch.setattr(tokenizers, "_bare", lambda backend, texts: (asked.extend(texts), alone(backend, texts))[1])
    monkeypatch.setattr(long, "LONG", 200)
    (ids,) = encode_many(tokenizer, [text], continued=continued)
    monkeypatch.undo()
    return max(len(one) for one in asked), ids


@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_parts_give_the_ids_of_the_whole(seed: int, continued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = bundled(), some_text(seed, 3000)
    longest, ids = in_parts(tokenizer, text, monkeypatch, continued=continued)
    assert longest < len(text) / 5
    assert ids == encode_many(tokenizer, [text], continued=continued)[0]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama2"])
@pytest.mark.parametrize("seed", range(3))
def test_parts_give_the_ids_of_the_whole_by_real_tokenizers(
    name: str, seed: int, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = tokenizers.load(shared / "tokenizers" / name), some_text(seed, 3000)
    longest, ids = in_parts(tokenizer, text, monkeypatch)
    assert longest < len(text) / 5
    assert ids == encode_many(tokenizer, [text])[0]


def test_a_text_without_a_place_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "7" * 4000
    longest, ids = in_parts(bundled(), text, monkeypatch)
    assert longest == len(text)
    assert ids == encode_many(bundled(), [text])[0]


@pytest.mark.parametrize("seed", range(2))
def test_texts_without_spaces_are_cut_too(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    chinese = "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(3000))
    code = "".join(f"def f{n}(x):\n\treturn x+{n}\n" for n in range(150))
    for text in (chinese, code):
        longest, ids = in_parts(bundled(), text, monkeypatch)
        assert longest < len(text) / 3
        assert ids == encode_many(bundled(), [text])[0]


def test_characters_that_a_token_joins_are_not_cut_apart() -> None:
    assert long.Joints(["▁a", "a", "▁▁", "ĠĊĠ"]).apart("a", " ")
    for token in ("a▁b", "a b", "aĠ"):
        assert not long.Joints(["▁a", token]).apart("a", " ")
    whole = long._as_bytes("好你")
    assert long.Joints(["x"]).apart("好", "你")
    for token in ("好你", whole, whole[:4], whole[2:4], whole[1:]):  # also one that begins within a character
        assert not long.Joints(["x", token]).apart("好", "你")


@pytest.mark.parametrize(("left", "right"), [("e", "\u0301"), ("ᄀ", "ᅡ"), ("1", "2"), (" ", "a"), ("a", "\n")])
def test_what_a_normalizer_or_a_rule_may_join_is_not_cut_apart(left: str, right: str) -> None:
    assert not long.Joints(["x"]).apart(left, right)


def test_a_cut_that_changes_the_ids_around_it_is_not_taken() -> None:
    """A tokenizer that looks across a space in its own way, as none of the vocabulary shows."""

    def ids(text: str) -> list[int]:
        return [ord(one) for one in text.replace("b c", "B")]

    text = "a b c" * 100
    whole = [one for part in long.parts(text, long.Joints([]), ids, ids) for one in part]
    assert whole == ids(text)
    short = pytest.MonkeyPatch()
    short.setattr(long, "LONG", 20)
    parts = list(long.parts(text, long.Joints([]), ids, ids))
    short.undo()
    assert len(parts) > 5
    assert [one for part in parts for one in part] == ids(text)
