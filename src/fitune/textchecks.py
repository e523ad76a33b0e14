"""Checks of what a tokenizer makes of the texts: each rule a function of its own, named as in the report.

In: an encoder, rows, samples. Out: Findings. Only so many rows are looked at, evenly over the data.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from fitune.encode import Encoder
from fitune.records import Conversation, Finding, Message
from fitune.tokenizer import special

MOST_ROWS = 20_000  # that are searched for special tokens
SHOWN = 6  # tokens or characters that a finding names


def some(rows: Sequence[Conversation], most: int) -> Sequence[Conversation]:
    """Up to so many rows, evenly over the data."""
    return rows[:: -(-len(rows) // most)] if len(rows) > most else rows


def answer_tokens(encoder: Encoder, rows: Sequence[Conversation]) -> Finding:
    """Special tokens in answers: produced where the run names them, else split into pieces of text.

    Args:
        encoder: of the run.
        rows: what is trained.
    """
    names = [name for name, special_ in special.added(encoder.tokenizer).items() if special_]
    named = encoder.marks.answers
    names = sorted({*names, *named}, key=len, reverse=True)
    if not names:
        return Finding("answer-tokens", "ok", "the vocabulary has no special tokens")
    pattern = re.compile("|".join(map(re.escape, names)))
    times, in_rows, at_end = Counter[str](), Counter[str](), Counter[str]()
    looked_at = some(rows, MOST_ROWS)
    for row in looked_at:
        texts = [text for message in row.messages if message.role == "assistant" for text in _texts(message)]
        found = Counter(token for text in texts for token in pattern.findall(text))
        times += found
        in_rows.update(found.keys())
        at_end.update({name for text in texts for name in encoder.control if text.rstrip().endswith(name)})
    return _told(encoder, times, in_rows, at_end, "" if len(looked_at) == len(rows) else f" of {len(looked_at):,} rows")


def _texts(message: Message) -> list[str]:
    return [message.content, message.context, message.thought, *(call.arguments for call in message.tool_calls)]


def _told(
    encoder: Encoder, times: Mapping[str, int], in_rows: Mapping[str, int], at_end: Mapping[str, int], of: str
) -> Finding:
    def counts(names: Sequence[str]) -> str:
        told = [f"{name} {times[name]:,} times in {in_rows[name]:,} rows" for name in names[:SHOWN]]
        return ", ".join(told) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") + of

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
        told = ", ".join(f"{name} in {at_end[name]:,} rows" for name in ends[:SHOWN])
        parts.append(f"answers end with what marks a turn, as text that the model would write: {told}{of}")
        return Finding("answer-tokens", "warn", "; ".join(parts), "take it out of the data: fitune adds the stop token")
    stay = [name for name in by_count if name in encoder.control]
    parts += [f"what marks turns stays text in answers: {counts(stay)}"] if stay else []
    return Finding("answer-tokens", "warn" if missing else "ok", "; ".join(parts) or "no answer holds special tokens")
