"""What will be trained, seen before it is: rows, lengths, labels, tokens.

In: conversations and their samples, a tokenizer. Out: an Inspection, which prints, is JSON, and is a page.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fitune.records import Conversation, Sample

CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile(r"[\u3040-\u30ff]")
HANGUL = re.compile(r"[\uac00-\ud7af]")
LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
MOST_PIECES = 8  # a character needs at most this many tokens
BINS = 24


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


def language(text: str) -> str:
    """zh, ja, ko, en (Latin letters), mixed or other, by the letters of a text."""
    if KANA.search(text):
        return "ja"
    if HANGUL.search(text):
        return "ko"
    chinese, latin = len(CJK.findall(text)), len(LATIN.findall(text)) / 4  # a word has several letters
    if not chinese and not latin:
        return "other"
    share = chinese / (chinese + latin)
    return "zh" if share > 0.7 else "en" if share < 0.1 else "mixed"


def languages(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Rows by language of all their turns together."""
    counts = Counter(language(" ".join(m.content for m in c.messages)) for c in conversations)
    return dict(counts.most_common())


def duplicates(conversations: Sequence[Conversation]) -> dict[str, Any]:
    """Rows that are there more than once, whole or by their prompt alone."""
    whole: dict[bytes, list[str]] = {}
    prompts: Counter[bytes] = Counter()
    for c in conversations:
        whole.setdefault(_digest([[m.role, m.content, m.context] for m in c.messages]), []).append(str(c.source))
        prompts[_digest([[m.role, m.content, m.context] for m in c.prompt()])] += 1
    several = [places for places in whole.values() if len(places) > 1]
    return {
        "rows": sum(len(places) - 1 for places in several),
        "prompts": sum(n - 1 for n in prompts.values() if n > 1),
        "examples": [places[:4] for places in several[:5]],
    }


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=16).digest()


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) bins of a round width over the lengths; the last one takes what is longer than the 99.5 %."""
    values = np.asarray(lengths)
    top = int(np.percentile(values, 99.5, method="higher"))
    width = max(8, -(-top // BINS // 8) * 8)
    edges = [*range(0, top + 1, width), max(int(values.max()) + 1, top + 1)]
    counts, _ = np.histogram(values, edges)
    return [(edges[n], edges[n + 1] - 1, int(count)) for n, count in enumerate(counts)]


def padding_wasted(lengths: Sequence[int], batch_size: int) -> float:
    """Share of a padded batch's tokens that would be padding, with rows in random order."""
    order = np.random.default_rng(0).permutation(np.asarray(lengths))
    padded = sum(len(some) * int(some.max()) for some in np.split(order, range(batch_size, len(order), batch_size)))
    return 1 - float(order.sum()) / max(1, padded)


def token_views(tokenizer: Any, sample: Sample) -> list[TokenView]:
    """The sample token by token; tokens that only together make a character are shown together."""
    ids, mask = sample.ids.tolist(), sample.mask.tolist()
    views: list[TokenView] = []
    at = 0
    while at < len(ids):
        end = at + 1
        text = tokenizer.decode(ids[at:end])
        while "\ufffd" in text and end < min(len(ids), at + MOST_PIECES) and mask[end] == mask[at]:
            end += 1
            text = tokenizer.decode(ids[at:end])
        if "\ufffd" in text:
            end, text = at + 1, tokenizer.decode(ids[at : at + 1])
        views.append(TokenView(ids[at:end], text, mask[at], border=mask[at] and at > 0 and not mask[at - 1]))
        at = end
    return views


def vocabulary_kind(tokenizer: Any) -> str:
    """BPE, byte-level BPE, SentencePiece unigram, ... from what the tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "SentencePiece" if hasattr(tokenizer, "sp_model") else type(tokenizer).__name__
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
    tokens = characters = fallback = unknown = 0
    chinese: Counter[str] = Counter()
    long_tokens: Counter[str] = Counter()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        tokens, characters = tokens + len(ids), characters + len(text)
        fallback += sum(bool(re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", str(piece))) for piece in pieces)
        unknown += sum(i == tokenizer.unk_token_id for i in ids) if tokenizer.unk_token_id is not None else 0
        chinese.update(CJK.findall(text))
        long_tokens.update(i for i in ids)
    cost = {c: len(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in chinese}
    # sentencepiece puts a mark of its own before a lone character; it is no part of what the character costs
    extra = 1 if cost and min(cost.values()) == 2 and vocabulary_kind(tokenizer) != "byte-level BPE" else 0
    several = [c for c, _ in chinese.most_common() if cost[c] - extra > 1]
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
        several_characters=[text for text in held if len(CJK.findall(text)) > 1 and len(text) < 12][:8],
        several_tokens=[f"{c} ({cost[c] - extra})" for c in several[:8]],
    )


def _per_chinese(tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Tokens per character over the runs of Chinese characters alone."""
    runs = [run for text in texts for run in re.findall(rf"(?:{CJK.pattern})+", text)][:20_000]
    characters = sum(map(len, runs))
    if not characters:
        return None
    return sum(len(tokenizer(run, add_special_tokens=False)["input_ids"]) for run in runs) / characters


@dataclass
class Inspection:
    """All of it. `samples` are lists of TokenView."""

    data: list[str]
    tokenizer: str
    template: str
    rows: dict[str, Any]
    by_source: dict[str, int]
    lengths: dict[str, float]
    histogram: list[tuple[int, int, int]]
    label_share: float
    padding_wasted: dict[str, float]
    duplicates: dict[str, Any]
    languages: dict[str, int]
    findings: list[dict[str, Any]]
    tokenizers: list[TokenizerView]
    samples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def by_source(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Rows by the file they come from."""
    return dict(Counter(Path(c.source.file).name if c.source else "?" for c in conversations).most_common())
