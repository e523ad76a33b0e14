"""Checks of what a tokenizer makes of the texts: each rule a function of its own, named as in the report.

In: an encoder, rows, samples. Out: Findings. Only so many rows are looked at, evenly over the data.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from fitune.core.errors import FituneError
from fitune.core.records import Conversation, Finding, Message, Sample, Segment
from fitune.data.encode import Encoder
from fitune.data.tokenizer import coverage, special
from fitune.data.tokenizer.interface import Tokenizer

MOST_ROWS = 20_000  # that are searched for special tokens
MOST_TEXTS = 500  # rows that are encoded and decoded again, and
MOST_CHARACTERS = 10_000  # of each text so much
MOST_SAMPLES = 5_000  # whose tokens are counted
MOST_BYTES = 0.5  # share of bytes among the trained tokens above which a model does not know the language
SHOWN = 6  # tokens or characters that a finding names

T = TypeVar("T")


def spread(rows: Sequence[T], most: int) -> Sequence[T]:
    """Up to so many rows, evenly over the data."""
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows


def answer_tokens(encoder: Encoder, rows: Sequence[Conversation]) -> Finding:
    """Special tokens in answers: produced where the run names them, else split into pieces of text.

    Args:
        encoder: of the run.
        rows: what is trained.
    """
    # ChatGLM calls some `sop` and `eop`: bare letters, which words have too ("people")
    names = [name for name, special_ in special.added(encoder.tokenizer).items() if special_ and not name.isalnum()]
    named = encoder.marks.answers
    names = sorted({*names, *named}, key=len, reverse=True)
    if not names:
        return Finding("answer-tokens", "ok", "the vocabulary has no special tokens")
    pattern = re.compile("|".join(map(re.escape, names)))
    times, in_rows, at_end = Counter[str](), Counter[str](), Counter[str]()
    looked_at = spread(rows, MOST_ROWS)
    for row in looked_at:
        texts = [text for message in row.messages if message.role == "assistant" for text in _texts(message)]
        found = Counter(token for text in texts for token in pattern.findall(text))
        times += found
        in_rows.update(found.keys())
        at_end.update({name for text in texts for name in encoder.control if text.rstrip().endswith(name)})
    return _finding_of(
        encoder, times, in_rows, at_end, "" if len(looked_at) == len(rows) else f" of {len(looked_at):,} rows"
    )


def _texts(message: Message) -> list[str]:
    return [message.content, message.context, message.thought, *(call.arguments for call in message.tool_calls)]


def _finding_of(
    encoder: Encoder, times: Mapping[str, int], in_rows: Mapping[str, int], at_end: Mapping[str, int], of: str
) -> Finding:
    def counts(names: Sequence[str]) -> str:
        counted = [f"{name} {times[name]:,} times in {in_rows[name]:,} rows" for name in names[:SHOWN]]
        return ", ".join(counted) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") + of

    by_count = sorted(times, key=lambda name: (-times[name], name))
    asked = [name for name in by_count if name not in encoder.control and name not in encoder.marks.answers]
    made = [name for name in by_count if name in encoder.marks.answers]
    missing = [name for name in encoder.marks.answers if name not in times]
    parts = [f"one id each in answers: {counts(made)}"] if made else []
    parts += [f"named, and in no answer: {', '.join(missing)}"] if missing else []
    if asked:
        flags = " ".join(f'"{name}"' for name in (*encoder.marks.answers, *asked))
        parts.append(f"special tokens of the vocabulary in answers are split into pieces of text: {counts(asked)}")
        fix = f"--answer-tokens {flags} makes each one id that answers produce; without, they stay text"
        return Finding("answer-tokens", "warn", "; ".join(parts), fix)
    if at_end:
        ends = sorted(at_end, key=lambda name: (-at_end[name], name))
        counted = ", ".join(f"{name} in {at_end[name]:,} rows" for name in ends[:SHOWN])
        parts.append(f"answers end with what marks a turn, as text that the model would write: {counted}{of}")
        return Finding("answer-tokens", "warn", "; ".join(parts), "take it out of the data: fitune adds the stop token")
    stay = [name for name in by_count if name in encoder.control]
    parts += [f"what marks turns stays text in answers: {counts(stay)}"] if stay else []
    return Finding("answer-tokens", "warn" if missing else "ok", "; ".join(parts) or "no answer holds special tokens")


def lost_characters(encoder: Encoder, rows: Sequence[Conversation]) -> Finding:
    """Texts come back from their ids: a vocabulary without byte pieces drops what it does not have, in silence.

    Args:
        encoder: of the run.
        rows: what is trained.
    """
    known: dict[tuple[str, bool], Counter[str]] = {}
    times, in_rows, of_template = Counter[str](), Counter[str](), Counter[str]()
    affected, looked_at = 0, spread(rows, MOST_TEXTS)
    for row in looked_at:
        found = Counter[str]()
        for text, literal in {(s.text[:MOST_CHARACTERS], s.literal): None for s in _segments(encoder, row) if s.text}:
            if (text, literal) not in known:
                known[text, literal] = coverage.lost(encoder.tokenizer, text, literal=literal)
            found += known[text, literal]
            of_template += known[text, literal] if literal else Counter()
        times += found
        in_rows.update(found.keys())
        affected += bool(found)
    if not times:
        text = f"the texts of {len(looked_at):,} rows come back whole from their tokens"
        return Finding("lost-characters", "ok", text)
    counted = [f"{coverage.named(c)} {n:,} times in {in_rows[c]:,} rows" for c, n in times.most_common(SHOWN)]
    more = f" and {len(times) - SHOWN} other characters" if len(times) > SHOWN else ""
    own = ", ".join(coverage.named(c) for c, _ in of_template.most_common(SHOWN))
    text = f"this tokenizer drops characters in {affected:,} of {len(looked_at):,} rows: {', '.join(counted)}{more}"
    return Finding(
        "lost-characters",
        "warn",
        f"{text}; in the template's own text: {own}" if own else text,
        "a base model whose vocabulary has them (byte pieces have all)"
        + ("; another --template writes other marks" if own else ""),
    )


def _segments(encoder: Encoder, row: Conversation) -> list[Segment]:
    if row.format != "text":
        try:
            return encoder.template.render(row.messages, row.tools)
        except FituneError:
            pass  # reported elsewhere
    return [Segment(message.content, literal=False) for message in row.messages]


def byte_fallback(tokenizer: Tokenizer, samples: Sequence[Sample]) -> Finding:
    """How many trained tokens are bytes of characters that the vocabulary does not have.

    Args:
        tokenizer: of the model.
        samples: what is trained.
    """
    ids = np.concatenate(
        [sample.ids[sample.mask] for sample in spread(samples, MOST_SAMPLES)] or [np.zeros(0, np.int32)]
    )
    distinct, counts = np.unique(ids, return_counts=True)
    count = int(counts[coverage.byte_tokens(tokenizer, distinct)].sum())
    share = count / max(1, len(ids))
    text = f"{share:.1%} of the trained tokens are bytes of characters that the vocabulary does not have"
    if share <= MOST_BYTES:
        return Finding("byte-fallback", "ok", text)
    return Finding(
        "byte-fallback",
        "warn",
        f"{text}: this model does not know this language",
        "a base model that was trained on it; `fitune inspect --compare` compares vocabularies on this data",
    )


def base_loss(loss: float, vocabulary: int) -> Finding:
    """A base model that does worse than guessing does not know this language, or this is not its tokenizer.

    Args:
        loss: of the base model on held-out rows, per target token.
        vocabulary: tokens that there are to guess among.
    """
    guessing = math.log(vocabulary)
    text = f"the base model's held-out loss is {loss:.2f}; guessing among {vocabulary:,} tokens has {guessing:.2f}"
    if not loss > guessing:
        return Finding("base-loss", "ok", text)
    return Finding(
        "base-loss",
        "warn",
        f"{text}: this model does not know this language",
        "a base model that was trained on it, with the tokenizer of its own folder",
    )
