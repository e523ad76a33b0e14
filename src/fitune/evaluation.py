"""Held-out questions to a score: exact match of greedy answers.

In: a model, conversations with expected answers. Out: one Judged per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fitune.generation import Sampling, answers
from fitune.model import Tuned
from fitune.records import Conversation

SIDE_BY_SIDE = 16  # prompts that are answered together


@dataclass(frozen=True)
class Judged:
    """An answer beside the expected one."""

    prompt: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        """The same text; white space at the ends does not count."""
        return self.answer.strip() == self.expected.strip()


def exact_match(
    tuned: Tuned, rows: Sequence[Conversation], *, max_new_tokens: int = 64, base: bool = False
) -> list[Judged]:
    """The greedy answer to every row's prompt.

    Args:
        tuned: the model.
        rows: each ends in the expected answer.
        max_new_tokens: longest answer.
        base: ask the base model, without what was tuned.
    """
    judged = []
    for start in range(0, len(rows), SIDE_BY_SIDE):
        some = rows[start : start + SIDE_BY_SIDE]
        texts = answers(tuned, [row.question() for row in some], Sampling(max_new_tokens=max_new_tokens), base=base)
        judged += [Judged(row.prompt()[-1].content, row.answer(), text) for row, text in zip(some, texts, strict=True)]
    return judged


def accuracy(judged: Sequence[Judged]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(one.right for one in judged) / len(judged)
