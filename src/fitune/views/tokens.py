"""What a tokenizer makes of texts: a sample token by token, and counts over many texts.

In: a tokenizer, a sample or texts. Out: views that `inspection` prints and puts on its page.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from fitune.core.letters import ALL_HAN
from fitune.core.records import Sample
from fitune.data.tokenizer import coverage
from fitune.views.screen import visible

CHINESE = re.compile(f"[{ALL_HAN}]")
MOST_PIECES = 8  # a character needs at most this many tokens
MOST_DROPPED = 1_000  # texts that are decoded again, to see what is lost
SHOWN = 8  # characters and tokens that are shown


@dataclass(frozen=True)
class TokenView:
    """One or several tokens that together show a text: a character may need two tokens."""

    ids: list[int]
    text: str
    trained: bool
    border: bool = False  # the first trained token after an untrained one


@dataclass(frozen=True)
class TokenizerView:
    """What a tokenizer makes of the data."""

    name: str
    kind: str
    vocabulary: int
    tokens: int
    characters: int
    characters_per_token: float
    tokens_per_chinese_character: float | None
    byte_fallback_tokens: int
    unknown_tokens: int
    several_characters: list[str] = field(default_factory=list)  # single tokens of several Chinese characters
    several_tokens: list[str] = field(default_factory=list)  # single characters that need several tokens
    dropped: list[str] = field(default_factory=list)  # characters that are lost, with how often


def token_views(tokenizer: Any, sample: Sample) -> list[TokenView]:
    """The sample token by token; tokens that only together make a character are shown together."""
    ids, mask = sample.ids.tolist(), sample.mask.tolist()
    views: list[TokenView] = []
    at = 0
    while at < len(ids):
        end = at + 1
        before = views[-1].ids if views else []
        text = _text_behind(tokenizer, before, ids[at:end])
        while "\ufffd" in text and end < min(len(ids), at + MOST_PIECES) and mask[end] == mask[at]:
            end += 1
            text = _text_behind(tokenizer, before, ids[at:end])
        if "\ufffd" in text:
            end, text = at + 1, _text_behind(tokenizer, before, ids[at : at + 1])
        views.append(TokenView(ids[at:end], text, mask[at], border=mask[at] and at > 0 and not mask[at - 1]))
        at = end
    return views


def coloured(tokens: Sequence[TokenView], *, ids: bool) -> Text:
    """The tokens in two shades in turn, green where they are trained, with a mark before an answer.

    ids: with their numbers.
    """
    text = Text()
    for number, token in enumerate(tokens):
        if token.border:
            text.append("▶", style="bold yellow")
        shade = ("black on green", "black on bright_green") if token.trained else ("", "on grey23")
        text.append(visible(token.text), style=shade[number % 2])
        if ids:
            text.append(f"{token.ids}", style="dim")
    return text


def _text_behind(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """Text of ids that stand behind others: SentencePiece drops the space of a word that begins a text."""

    def text(some: list[int]) -> str:
        return str(tokenizer.decode(some, clean_up_tokenization_spaces=False)) if some else ""

    front, whole = text(before), text([*before, *ids])
    return whole[len(front) :] if whole.startswith(front) else text(ids)


def vocabulary_kind(tokenizer: object) -> str:
    """BPE, byte-level BPE, SentencePiece unigram, ... from what the tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "SentencePiece" if getattr(tokenizer, "family", None) else type(tokenizer).__name__
    parts = json.loads(backend.to_str())
    model = parts["model"]
    text = json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
    kind = str(model.get("type", "?"))
    if '"ByteLevel"' in text:
        return f"byte-level {kind}"
    return f"{kind} with byte fallback" if model.get("byte_fallback") else kind


def tokenizer_view(name: str, tokenizer: Any, texts: Sequence[str]) -> TokenizerView:
    """Counts over texts, and examples of tokens that hold several characters, and of characters that need several.

    Args:
        name: what to call it.
        tokenizer: any.
        texts: the data's texts.
    """
    tokens = characters = unknown = 0
    dropped: Counter[str] = Counter()
    chinese: Counter[str] = Counter()
    long_tokens: Counter[int] = Counter()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens, characters = tokens + len(ids), characters + len(text)
        unknown += sum(i == tokenizer.unk_token_id for i in ids) if tokenizer.unk_token_id is not None else 0
        chinese.update(CHINESE.findall(text))
        long_tokens.update(i for i in ids)
    for text in texts[:: max(1, len(texts) // MOST_DROPPED)]:
        dropped += coverage.lost(tokenizer, text)
    are_bytes = coverage.byte_tokens(tokenizer, list(long_tokens))
    fallback = sum(n for n, is_byte in zip(long_tokens.values(), are_bytes, strict=True) if is_byte)
    cost = {c: _cost(tokenizer, c) for c in chinese}
    several = [c for c, _ in chinese.most_common() if cost[c] > 1]
    held = [tokenizer.decode([i]).strip() for i, _ in long_tokens.most_common(4000)]
    return TokenizerView(
        name=name,
        kind=vocabulary_kind(tokenizer),
        vocabulary=len(tokenizer),
        tokens=tokens,
        characters=characters,
        characters_per_token=characters / max(1, tokens),
        tokens_per_chinese_character=_per_chinese(tokenizer, texts),
        byte_fallback_tokens=fallback,
        unknown_tokens=unknown,
        several_characters=[text for text in held if len(CHINESE.findall(text)) > 1 and len(text) < 12][:8],
        several_tokens=[f"{c} ({cost[c]})" for c in several[:SHOWN]],
        dropped=[f"{coverage.named(c)} ({n:,})" for c, n in dropped.most_common(SHOWN)],
    )


def _cost(tokenizer: Any, character: str) -> int:
    """Tokens of a character; the mark that sentencepiece puts before a text is no part of it."""
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(character, add_special_tokens=False)["input_ids"])
    return len(pieces) - (len(pieces) > 1 and pieces[0] == "▁")


def _per_chinese(tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Tokens per character over the runs of Chinese characters alone."""
    runs = [run for text in texts for run in re.findall(rf"(?:{CHINESE.pattern})+", text)][:20_000]
    characters = sum(map(len, runs))
    if not characters:
        return None
    return sum(len(tokenizer(run, add_special_tokens=False)["input_ids"]) for run in runs) / characters
