"""fitune eval: loss and perplexity, exact match, BLEU-4 and ROUGE-L, of the base model beside the tuned one.

In: a run or a model, data. Out: an Evaluation. Losses go through the head a chunk of rows at a time, answers are greedy
and generated a few side by side, so nothing of the whole set is held but texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fitune.checks import leak
from fitune.checks.findings import raise_refused
from fitune.commands.scores import Judged, exact_match, scores_of
from fitune.core.errors import DataError
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.options import DataSource
from fitune.core.records import Batch, Conversation, Layout
from fitune.core.results import Answered, Evaluation, Scores
from fitune.data import fitting, rows
from fitune.data.batches import in_order
from fitune.data.cache import Cache
from fitune.data.encode import Encoder
from fitune.data.store import Rows, Samples
from fitune.data.templates.base import kept_date
from fitune.engine.generation import SIDE_BY_SIDE
from fitune.engine.held_out import held_out_loss, losses
from fitune.engine.loading import load
from fitune.models import attached
from fitune.models.adapters import disabled
from fitune.models.attached import compute_dtype
from fitune.models.configs import longest_row
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import wide
from fitune.models.load import Tuned
from fitune.models.precision import imitated

TOGETHER = 8  # rows of a batch whose loss is measured
ROOM = 8  # tokens that an answer needs at least


@dataclass(frozen=True)
class Request:
    """What is measured.

    name: of the run or model. sources: the data. answer: generate answers too. max_new_tokens: longest answer, in
    tokens. samples: rows that are shown. skip_bad: leave out rows that cannot be used.
    """

    name: str
    sources: Sequence[DataSource]
    answer: bool = True
    max_new_tokens: int = 256
    samples: int = 5
    skip_bad: bool = False


def evaluate(
    run_or_model: str | Path,
    data: Sequence[str | DataSource],
    *,
    model: str | Path | None = None,
    take: int | None = None,
    answer: bool = True,
    max_new_tokens: int = 256,
    samples: int = 5,
    skip_bad: bool = False,
    template: str = "auto",
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    precision: str | None = None,
    quant: str | None = None,
    watch: Watcher | None = None,
) -> Evaluation:
    """Measure a run, beside its base model, or a model.

    Args:
        run_or_model: a run folder, a model folder or a hub id.
        data: files, folders or hub ids; each row ends in the expected answer.
        model: where the base model of a run is now, if it was moved.
        take: so many rows of each source, drawn with a fixed seed.
        answer: generate answers too; without, only losses.
        max_new_tokens: longest answer.
        samples: rows that are shown.
        skip_bad: leave out rows that cannot be used, and count them; without, they end the evaluation.
        template: of a model folder; a run brings its own.
        columns: what columns of other names mean.
        device: auto, cpu, cuda, ...
        precision, quant: as for `load`; a run has its own.
        watch: progress is reported to it.

    Raises:
        FituneError: the run, the model or the data cannot be used.
    """
    tuned = load(run_or_model, model=model, device=device, template=template, precision=precision, quant=quant)
    sources = [DataSource(path=one) if isinstance(one, str) else one for one in data]
    sources = [
        one.model_copy(update={"take": take or one.take, "map": {**(columns or {}), **one.map}}) for one in sources
    ]
    request = Request(str(run_or_model), sources, answer, max_new_tokens, samples, skip_bad)
    return measure(tuned, request, watch or Silent())


def measure(tuned: Tuned, request: Request, watch: Watcher) -> Evaluation:
    """What a model that is loaded reaches, beside its base model where it was tuned.

    Args:
        tuned: the model.
        request: what is measured.
        watch: progress is reported to it.

    Raises:
        FituneError: the data cannot be used.
    """
    ready = prepared(tuned, request, watch)
    model = ready.measuring
    mine, judged = model.scores()
    base, of_base = model.scores_of_base() if is_tuned(tuned) else (None, judged)
    shown = list(zip(judged, of_base, strict=True))[: request.samples]
    return Evaluation(
        model=request.name,
        rows=len(ready.rows),
        asked=len(ready.numbers),
        too_long=ready.too_long,
        target_tokens=int(model.held_out.column("trained").sum()),
        scores=mine,
        base=base,
        samples=[Answered(after.prompt, after.expected, before.answer, after.answer) for after, before in shown],
        left_out=ready.left_out,
    )


@dataclass(frozen=True)
class Ready:
    """Rows that are read, encoded and checked.

    rows: those that are measured. numbers: of them, those whose prompts are answered. too_long: how many have a prompt
    that leaves no room for an answer. left_out: bad rows. measuring: measures them.
    """

    rows: Rows
    numbers: Sequence[int]
    too_long: int
    left_out: int
    measuring: Measuring


def prepared(tuned: Tuned, request: Request, watch: Watcher, loaded: rows.Loaded | None = None) -> Ready:
    """The rows of a request, ready to be measured.

    Args:
        tuned: the model.
        request: what is measured.
        watch: progress is reported to it.
        loaded: the rows, where they are read already.

    Raises:
        DataError, Problems: the data cannot be used.
        TrainingError: documents leak into one another.
    """
    note = kept_date(tuned.template)
    if note:
        watch.message(note)
    loaded = loaded or rows.load(request.sources, skip_bad=request.skip_bad)
    limit = longest_row(causal_lm(tuned.model).config)
    encoder = tuned.encoder.with_max_length(limit, split=True)
    cache = Cache()  # keeps its files until the evaluation is over
    there, held_out = _encoded(loaded.rows, encoder, cache, request, watch)
    if not len(held_out):
        raise DataError("no row has a token to measure", file=request.sources[0].path, received=f"{len(there)} rows")
    asked, too_long = _askable(there, tuned, limit) if request.answer else ([], 0)
    layout, found = leak.packing_leak(tuned.model, held_out)
    raise_refused([found])
    model = Measuring(tuned, held_out, layout, [there[n] for n in asked], request.max_new_tokens, watch)
    return Ready(there, asked, too_long, loaded.report.skipped_bad + len(loaded.rows) - len(there), model)


def _encoded(given: Rows, encoder: Encoder, cache: Cache, request: Request, watch: Watcher) -> tuple[Rows, Samples]:
    """The rows that are measured, and their samples.

    Raises:
        DataError, Problems: the template cannot write some, which are not to be left out; or none.
    """
    samples = fitting.encode(given, encoder, cache, "", watch)
    if not request.skip_bad or len(samples.bad) == len(given):
        fitting.refuse_unwritten(samples, "change such rows, or leave them out with --skip-bad")
    if not samples.bad:
        return given, samples
    good = given.view(np.setdiff1d(np.arange(len(given)), list(samples.bad)))
    return good, fitting.encode(good, encoder, cache, "", watch)


@dataclass(frozen=True)
class Measuring:
    """A model, the samples that it is measured on, and the rows whose prompts it answers."""

    tuned: Tuned
    held_out: Samples
    layout: Layout
    asked: Sequence[Conversation]
    max_new_tokens: int
    watch: Watcher

    def scores(self) -> tuple[Scores, list[Judged]]:
        """Its figures, and its answers."""
        loss = self._loss("loss")
        judged = self.answers()
        return scores_of(loss, judged), judged

    def scores_of_base(self) -> tuple[Scores, list[Judged]]:
        """Figures and answers of the base model, without what was tuned."""
        with disabled(self.tuned.model):
            loss = self._loss("loss (base)")
        judged = self.answers(base=True)
        return scores_of(loss, judged), judged

    def answers(self, *, base: bool = False) -> list[Judged]:
        """The greedy answers to the prompts of `asked`, by the base model or with what was tuned."""
        ticker = Ticker(self.watch, "answering (base)" if base else "answering", len(self.asked))
        judged: list[Judged] = []
        for start in range(0, len(self.asked), SIDE_BY_SIDE):
            some = self.asked[start : start + SIDE_BY_SIDE]
            judged += exact_match(self.tuned, some, max_new_tokens=self.max_new_tokens, base=base)
            ticker(len(judged))
        ticker.end()
        return judged

    def losses(self, *, base: bool = False) -> NDArray[np.float64]:
        """(samples,): the summed loss of each sample, by the base model or with what was tuned."""
        what = "losses (base)" if base else "losses"
        with disabled(self.tuned.model) if base else nullcontext(), self._computing():
            return losses(self.tuned.model, self._batches(what), self.layout, len(self.held_out))

    def _loss(self, what: str) -> float:
        """Loss per target token."""
        with self._computing():
            return held_out_loss(self.tuned.model, self._batches(what), self.layout)

    def _batches(self, what: str) -> Iterator[Batch]:
        ticker = Ticker(self.watch, what, len(self.held_out))
        for batch in in_order(self.held_out, TOGETHER, by_length=self.layout == "padded"):
            yield batch
            ticker(ticker.done + len(batch.rows))
        ticker.end()

    def _computing(self) -> AbstractContextManager[None]:
        """Inside, a processor that only imitates bfloat16 multiplies in float32 what bfloat16 holds."""
        model = self.tuned.model
        slow = imitated(self.tuned.device, compute_dtype(model))
        return wide.in_float32(model) if slow else nullcontext()


def _askable(there: Rows, tuned: Tuned, limit: int) -> tuple[list[int], int]:
    """Numbers of the rows that have a prompt, and room for an answer behind it; how many have no room."""
    asked, too_long = list[int](), 0
    for number, row in enumerate(there):
        answer = next((m for m in reversed(row.messages) if m.role == "assistant"), None)
        if not row.prompt() or answer is None or not (answer.content or answer.tool_calls):
            continue
        if len(tuned.encoder.prompt(row.prompt(), row.tools)) < limit - ROOM:
            asked.append(number)
        else:
            too_long += 1
    return asked, too_long


def is_tuned(tuned: Tuned) -> bool:
    """Has it anything that was tuned?"""
    return hasattr(tuned.model, "peft_config") or attached.of(tuned.model).method is not None
