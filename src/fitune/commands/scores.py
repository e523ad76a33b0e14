"""The figures of an evaluation: exact match, BLEU-4 and ROUGE-L of answers beside the expected ones.

In: held-out rows and the answers to their prompts. Out: Scores. BLEU is sacrebleu's, ROUGE-L rouge-score's; Chinese
counts by character, so neither needs a list of words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fitune.core.letters import HAN
from fitune.core.records import Conversation
from fitune.core.results import Scores
from fitune.engine.drawing import Sampling
from fitune.engine.generation import SIDE_BY_SIDE, answers, expected, read
from fitune.models.load import Tuned

UNITS = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")  # a Chinese character, or a word of anything else


@dataclass(frozen=True)
class Judged:
    """An answer beside the expected one."""

    prompt: str
    expected: str
    answer: str
    expected_thought: str = ""
    thought: str = ""
    calls: bool = False  # a call of a tool is expected

    @property
    def right(self) -> bool:
        """The same text; white space at the ends does not count, in calls nowhere."""
        if self.calls:
            return "".join(self.answer.split()) == "".join(self.expected.split())
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
        judged += [_judged(tuned, row, text) for row, text in zip(some, texts, strict=True)]
    return judged


def _judged(tuned: Tuned, row: Conversation, text: str) -> Judged:
    wanted, got = expected(tuned, row), read(tuned, row.question(), text)
    prompt = row.prompt()[-1].content
    return Judged(prompt, wanted.content, got.content, wanted.thought, got.thought, bool(wanted.tool_calls))


def accuracy(judged: Sequence[Judged]) -> float:
    """Share of right answers, 0 to 1."""
    return sum(one.right for one in judged) / len(judged)


def scores_of(loss: float, judged: Sequence[Judged]) -> Scores:
    """All figures of a model.

    Args:
        loss: its held-out loss, per target token.
        judged: its answers; none: only the loss was measured.
    """
    perplexity = math.exp(min(loss, 700))
    if not judged:
        return Scores(loss, perplexity)
    apart = {
        "thoughts": _share([bool(one.thought) for one in judged])
        if any(one.thought or one.expected_thought for one in judged)
        else None,
        "thought_match": _share([one.thought == one.expected_thought for one in judged if one.expected_thought]),
        "call_match": _share([one.right for one in judged if one.calls]),
    }
    texts = [one for one in judged if not one.calls]
    if not texts:
        return Scores(loss, perplexity, **apart)
    got, wanted = [one.answer for one in texts], [one.expected for one in texts]
    return Scores(loss, perplexity, accuracy(texts), bleu4(got, wanted), rouge_l(got, wanted), **apart)


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def bleu4(got: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus BLEU up to 4-grams, 0 to 100 (Papineni et al. 2002; sacrebleu). Chinese by character where most is."""
    import sacrebleu

    chinese = sum(len(re.findall(f"[{HAN}]", text)) for text in expected)
    units = sum(len(UNITS.findall(text)) for text in expected)
    kind = "zh" if chinese * 2 > units else "13a"
    return float(sacrebleu.corpus_bleu(list(got), [list(expected)], tokenize=kind).score)


class _Units:
    """rouge-score's tokenizer: Chinese characters and words."""

    def tokenize(self, text: str) -> list[str]:
        return UNITS.findall(text.lower())


def rouge_l(got: Sequence[str], expected: Sequence[str]) -> float:
    """Mean F-measure of the longest common subsequence, 0 to 1 (Lin 2004; rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Units())
    return float(np.mean([scorer.score(e, g)["rougeL"].fmeasure for g, e in zip(got, expected, strict=True)]))
