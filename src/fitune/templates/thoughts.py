"""Thoughts: the text that a model writes for itself before its answer, between tags of its family.

In: an answer as text. Out: its thought and the answer proper; and what must stand behind a prompt that has opened a
thought already (R1 kinds end theirs in `<think>` and a line break).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tags:
    """What stands around a thought."""

    open: str
    close: str


# Qwen3, QwQ, DeepSeek-R1, GLM-4.5 and most others; Seed-OSS; Magistral; older ones
KINDS = (
    Tags("<think>", "</think>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),
    Tags("<thinking>", "</thinking>"),
)
_TAGS = re.compile("|".join(re.escape(tag) for kind in KINDS for tag in (kind.open, kind.close)))


def tags_in(text: str) -> Tags | None:
    """The kind whose tags a text holds; the closing one is enough, where the prompt holds the other."""
    return next((kind for kind in KINDS if kind.close in text), None)


def pieces(text: str) -> list[str]:
    """A text cut at the tags of thoughts: every second piece is a tag."""
    found: list[str] = []
    at = 0
    for tag in _TAGS.finditer(text):
        found += [text[at : tag.start()], tag[0]]
        at = tag.end()
    return [*found, text[at:]]


def split(text: str) -> tuple[str, str]:
    """(thought, answer) of what a model wrote; the opening tag may be missing, because the prompt had it."""
    kind = tags_in(text)
    if kind is None:
        return "", text
    before, _, after = text.partition(kind.close)
    return before.rpartition(kind.open)[2].strip(), after.strip()


def written(thought: str, answer: str, kind: Tags) -> str:
    """A thought before its answer, as the models of this family write it."""
    return f"{kind.open}\n{thought}\n{kind.close}\n\n{answer}"


def opened(prompt: str) -> tuple[Tags, bool] | None:
    """The tags of the thought that a prompt ends in the middle of, and whether a line break follows the opening."""
    for kind in KINDS:
        _, found, after = prompt.rpartition(kind.open)
        if found and not after.strip():
            return kind, "\n" in after
    return None


def closed(prompt: str) -> bool:
    """Does a prompt end in a closed thought: the answer is to be without one?"""
    return any(prompt.rstrip().endswith(kind.close) for kind in KINDS)


def behind(prompt: str, answer: str, thought: str) -> str:
    """What stands behind a prompt that has opened a thought.

    A row without a thought closes it at once, as an empty one is written by its family: a model whose answer stood in
    the open thought would be read, by whoever serves it, as thinking and never answering.

    Args:
        prompt: ends in an opening tag.
        answer: the template's rendering of the answer.
        thought: the row's, empty where it has none.
    """
    found = opened(prompt)
    if found is None:
        return answer
    kind, line = found
    answer = answer.lstrip()
    if answer.startswith(kind.open):
        answer = answer[len(kind.open) :].lstrip("\n")
    if answer.startswith(kind.close):
        return f"{thought}{answer}"
    if kind.close in answer:
        return answer  # the template wrote the thought itself
    # behind "<think>\n" the block ends in a line of its own; behind a bare "<think>" right after the text
    return f"{thought}\n{kind.close}\n\n{answer}" if line else f"{thought}{kind.close}\n\n{answer}"
