"""Held-out rows to figures: loss and perplexity, exact match, BLEU-4 and ROUGE-L, the base beside the tuned model.

In: a run or a model, data. Out: an Evaluation. Losses go through the head a chunk of rows at a time, answers are greedy
and generated a few side by side, so nothing of the whole set is held but texts. BLEU is sacrebleu's, ROUGE-L
rouge-score's; Chinese counts by character, so neither needs a word list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fitune.checks import leak
from fitune.checks.findings import raise_refused
from fitune.core.config import DataSource
from fitune.core.errors import DataError
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.letters import HAN
from fitune.core.records import Batch, Conversation, DataReport, Layout, Sample
from fitune.core.results import Answered, Evaluation, Scores
from fitune.data import pipeline, rows
from fitune.data.batches import in_order
from fitune.data.cache import Cache
from fitune.data.pipeline import NO_LIMIT
from fitune.data.store import Rows
from fitune.data.templates.base import kept_date
from fitune.engine.generation import SIDE_BY_SIDE, Sampling, answers, expected, read
from fitune.engine.loading import load
from fitune.engine.step import held_out_loss
from fitune.models.adapters import disabled
from fitune.models.kernels import wide
from fitune.models.model import Tuned, causal_lm, compute_dtype
from fitune.models.precision import imitated

TOGETHER = 8  # rows of a batch whose loss is measured
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


# ---- whole data sets ----


def evaluate(
    run_or_model: str | Path,
    data: Sequence[str | DataSource],
    *,
    model: str | Path | None = None,
    take: int | None = None,
    answer: bool = True,
    max_new_tokens: int = 256,
    samples: int = 5,
    template: str = "auto",
    columns: dict[str, str] | None = None,
    device: str = "auto",
    precision: str | None = None,
    quant: str | None = None,
    watch: Watcher | None = None,
) -> Evaluation:
    """Measure a run, beside its base, or a model.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        data: files, folders or hub ids; each row ends in the expected answer.
        model: where the base of a run lies now, if it was moved.
        take: so many rows of each source, drawn with a fixed seed.
        answer: generate answers too; without, only losses.
        max_new_tokens: longest answer.
        samples: rows that are shown.
        template: of a model folder; a run brings its own.
        columns: what columns of other names mean.
        device: auto, cpu, cuda, ...
        precision, quant: as for `load`; a run has its own.
        watch: is told how far it is.

    Raises:
        FituneError: the run, the model or the data cannot be used.
    """
    watch = watch or Silent()
    tuned = load(run_or_model, model=model, device=device, template=template, precision=precision, quant=quant)
    if told := kept_date(tuned.template):
        watch.say(told)
    report = DataReport()
    sources = [DataSource(path=one) if isinstance(one, str) else one for one in data]
    sources = [
        one.model_copy(update={"take": take or one.take, "map": {**(columns or {}), **one.map}}) for one in sources
    ]
    there = rows.load(sources, report, skip_bad=False)
    limit = getattr(causal_lm(tuned.model).config, "max_position_embeddings", None) or NO_LIMIT
    encoder = tuned.encoder.with_max_length(limit, split=True)
    cache = Cache()
    held_out = pipeline.encode(there, encoder, cache, "", watch)
    pipeline.refuse_unwritten(held_out, "change such rows, or leave them out of the file")
    if not len(held_out):
        raise DataError("no row has a token to measure", file=sources[0].path, received=f"{len(there)} rows")
    asked, too_long = _askable(there, tuned, limit) if answer else ([], 0)
    layout, found = leak.packing_leak(tuned.model, held_out)
    raise_refused([found])
    has_base = _is_tuned(tuned)

    def scores(*, base: bool) -> tuple[Scores, list[Judged]]:
        with disabled(tuned.model) if base else nullcontext():
            loss = _loss(tuned, held_out, layout, Ticker(watch, "loss (base)" if base else "loss", len(held_out)))
        told = Ticker(watch, "answering (base)" if base else "answering", len(asked))
        judged: list[Judged] = []
        for start in range(0, len(asked), SIDE_BY_SIDE):
            some = asked[start : start + SIDE_BY_SIDE]
            judged += exact_match(tuned, some, max_new_tokens=max_new_tokens, base=base)
            told(len(judged))
        told.end()
        return _scores(loss, judged), judged

    mine, judged = scores(base=False)
    base, of_base = scores(base=True) if has_base else (None, judged)
    shown = [
        Answered(a.prompt, a.expected, before=b.answer, after=a.answer)
        for a, b in list(zip(judged, of_base, strict=True))[:samples]
    ]
    targets = int(held_out.column("trained").sum())
    return Evaluation(str(run_or_model), len(there), len(asked), too_long, targets, mine, base, shown)


def _loss(tuned: Tuned, held_out: Sequence[Sample], layout: Layout, told: Ticker) -> float:
    """Loss per target token. A processor that only imitates bfloat16 multiplies in float32 what bfloat16 holds."""

    def batches() -> Iterator[Batch]:
        for batch in in_order(held_out, TOGETHER, by_length=layout == "padded"):
            yield batch
            told(told.done + len(batch.rows))
        told.end()

    slow = imitated(tuned.device, compute_dtype(tuned.model))
    with wide.in_float32(tuned.model) if slow else nullcontext():
        return held_out_loss(tuned.model, batches(), layout)


def _askable(there: Rows, tuned: Tuned, limit: int) -> tuple[list[Conversation], int]:
    """Rows that have a prompt, and room behind it; how many have none."""
    asked, too_long = [], 0
    for row in there:
        answer = next((m for m in reversed(row.messages) if m.role == "assistant"), None)
        if not row.prompt() or answer is None or not (answer.content or answer.tool_calls):
            continue
        if len(tuned.encoder.prompt(row.prompt(), row.tools)) < limit - 8:
            asked.append(row)
        else:
            too_long += 1
    return asked, too_long


def _is_tuned(tuned: Tuned) -> bool:
    return hasattr(tuned.model, "peft_config") or hasattr(tuned.model, "fitune_method")


def _scores(loss: float, judged: Sequence[Judged]) -> Scores:
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
    words = sum(len(UNITS.findall(text)) for text in expected)
    kind = "zh" if chinese * 2 > words else "13a"
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
