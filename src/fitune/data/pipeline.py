"""From the settings to samples: data read, split, encoded, cut and checked.

In: a RunConfig, a tokenizer, what the model can hold. Out: Data. No model is loaded, so `inspect` works with a
tokenizer folder alone. Rows and samples lie on disk (store.py), in a cache that the next run finds; what is held in
memory is a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.core.config import LengthPolicy, RunConfig
from fitune.core.errors import ConfigError, RunFolderError
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.records import Conversation, DataReport, Finding
from fitune.core.units import size_bytes
from fitune.data import documents, labels, lengths, rows, templates
from fitune.data.cache import Cache, default_folder, folder_digest, key
from fitune.data.encode import Encoder
from fitune.data.fitting import by_reason, counted, encode, fit, of_rows, raise_unwritten
from fitune.data.prepared import PROBE_CHARACTERS, PROBES, Cached, Prepared
from fitune.data.store import Rows, Samples
from fitune.data.tokenizer.interface import Tokenizer


@dataclass
class Data:
    """What a run trains on, and what the rules found."""

    conversations: Rows  # training rows, each as often as it is trained
    samples: Samples
    whole_lengths: NDArray[Any]  # of the samples before anything was cut
    held_out: Samples
    held_out_rows: list[Conversation]  # some that can be asked, for the answers before and after
    encoder: Encoder  # with the run's max_length
    report: DataReport
    findings: list[Finding]


@dataclass(frozen=True)
class Target:
    """What the data is prepared for.

    Args:
        folder: where the tokenizer's files are.
        tokenizer: read from there.
        limit: longest row, in tokens, that the model can hold.
        vocabulary: rows of the model's embedding.
    """

    folder: Path
    tokenizer: Tokenizer
    limit: int
    vocabulary: int


@dataclass
class _Desk:
    """What every stage of the preparation needs."""

    config: RunConfig
    target: Target
    cache: Cache
    watch: Watcher
    check: Callable[[Prepared], list[Finding]]
    date: str | None  # that the template writes; None: today's
    every_label: bool = False  # rows whose labels are not the answers' own are left out as bad ones

    def encoded(self, given: Rows, encoder: Encoder) -> Samples:
        """The samples of these rows."""
        return encode(given, encoder, self.cache, self.digest, self.watch)

    @cached_property
    def digest(self) -> str:
        """Of the tokenizer's files, and of the tokens that it got."""
        return folder_digest(self.target.folder) + key(self.config.new_tokens)

    def cached(self, whole: Samples, encoder: Encoder) -> Cached | None:
        """What the stale-cache rule looks at, where anything came from the cache."""
        if not self.cache.found:
            return None
        now = rows.first(self.config.sources(), PROBES, self.config.fill, self.config.wanted)
        return Cached(whole.rows.base(), now, whole, encoder.with_max_length(None))


def _nothing(prepared: Prepared) -> list[Finding]:
    return []


def read(
    config: RunConfig,
    target: Target,
    *,
    watch: Watcher | None = None,
    check: Callable[[Prepared], list[Finding]] = _nothing,
    date: str | None = None,
) -> Data:
    """Read the data, and have it checked.

    Args:
        config: the settings.
        target: the tokenizer, and what the model can hold.
        watch: progress is reported to it.
        check: looks at what was prepared; a finding that a cache is stale, or labels wrong, has the data read again.
        date: that the template writes; None: today's.

    Raises:
        FituneError: data that cannot be used. What the rules refuse is only found, not raised.
    """
    watch = watch or Silent()
    desk = _Desk(config, target, cache_of(config, watch), watch, check, date)
    data = _read(desk)
    stale = next((finding for finding in data.findings if finding.rule == "stale-cache"), None)
    if stale is not None and stale.level == "refuse":
        desk.cache.forget()
        data = _read(desk)
        anew = replace(stale, level="fixed", text=f"{stale.text}; it was made anew")
        data.findings = [anew if finding.rule == stale.rule else finding for finding in data.findings]
    border = next((finding for finding in data.findings if finding.rule == "label-border"), None)
    if border is not None and border.level == "refuse" and config.skip_bad:  # a few rows were looked at: now all are
        desk.every_label = True
        data = _read(desk)
    return data


def cache_of(config: RunConfig, watch: Watcher) -> Cache:
    """Where a run keeps what it prepares; a temporary folder where nothing is to be kept, or where it cannot."""
    if config.cache == "none":
        return Cache()
    most = size_bytes(config.cache_size)
    if config.cache != "auto":
        return Cache(Path(config.cache), most=most, report=watch.message)
    try:
        return Cache(default_folder(), most=most, report=watch.message)
    except RunFolderError as error:
        watch.message(f"prepared data is not kept for the next run: {error.what}")
        return Cache()


def _read(desk: _Desk) -> Data:
    """One reading, from the files to samples that were checked."""
    config = desk.config
    loaded = _load(desk, config)
    encoder = _encoder(desk, loaded.report)
    split = _split(desk, _written(desk, loaded, encoder), encoder)
    whole = split.whole
    train, report = _weighed(split, config)
    before, row_of = of_rows(whole, train)
    report = _with_lengths(report, config, before, row_of, desk.target.limit)
    encoder = encoder.with_max_length(report.max_length)
    samples, row_of = fit(whole, train, encoder, config.length_policy, desk.encoded)
    report = counted(report, samples, row_of, len(train), pairs=encoder.both)
    if config.length_policy == "split" and (note := _note_of_splits(before, samples, report.max_length)):
        report = replace(report, notes=[*report.notes, note])
    held_out_policy: LengthPolicy = "split" if config.length_policy == "split" else "cut"
    held_out, _ = fit(split.held_out_whole, split.held_out, encoder, held_out_policy, desk.encoded)
    conversations = whole.rows.view(train)
    prepared = Prepared(
        config=config,
        conversations=conversations,
        samples=samples,
        report=report,
        encoder=encoder,
        vocabulary=desk.target.vocabulary,
        limit=desk.target.limit,
        folder=desk.target.folder,
        rows_of=row_of,
        cached=desk.cached(whole, encoder),
        held_out=held_out,
    )
    asked = (row for row in split.held_out_whole.rows.view(split.held_out) if _can_be_asked(row, encoder))
    return Data(
        conversations=conversations,
        samples=samples,
        whole_lengths=before.column("length"),
        held_out=held_out,
        held_out_rows=list(islice(asked, config.sample_prompts)),
        encoder=encoder,
        report=report,
        findings=desk.check(prepared),
    )


def _encoder(desk: _Desk, report: DataReport) -> Encoder:
    """The encoder of the run, which does not cut yet."""
    config = desk.config
    template = templates.choose(
        _template(config, report),
        desk.target.tokenizer,
        date=desk.date,
        system_role=config.system_role,
        options=config.template_options,
    )
    return Encoder(
        desk.target.tokenizer,
        template,
        train_on=config.train_on,
        answer_tokens=config.answer_tokens,
        both=config.wanted != "answers",
    )


def _weighed(split: _Split, config: RunConfig) -> tuple[NDArray[Any], DataReport]:
    """The training rows as often as their sources say, and the report with their number."""
    report, source_of = split.report, split.whole.rows.column("source")[split.train]
    drawn, note = rows.weigh(source_of, config.sources(), config.seed)
    if note:
        more = len(drawn) - len(split.train)
        report = replace(report, rows=report.rows + more, notes=[*report.notes, note])
    return split.train[drawn], report


def _can_be_asked(row: Conversation, encoder: Encoder) -> bool:
    """Has the row a prompt (text has none), and is that short enough to be answered?"""
    short = 0 < row.question().characters() <= PROBE_CHARACTERS
    return short and len(encoder.prompt(row.prompt(), row.tools)) < (encoder.max_length or 0)


def _load(desk: _Desk, config: RunConfig) -> rows.Loaded:
    progress = Ticker(desk.watch, "reading rows", None)
    found = rows.load(
        config.sources(),
        seed=config.seed,
        fill=config.fill,
        skip_bad=config.skip_bad,
        cache=desk.cache,
        on_row=progress,
        wanted=config.wanted,
    )
    progress.end()
    return found


def _with_lengths(
    report: DataReport, config: RunConfig, whole: Samples, row_of: NDArray[np.int64], limit: int
) -> DataReport:
    """The report with the run's max_length, and with what this and other lengths would cut.

    Raises:
        ConfigError: a max_length above the model's own limit.
    """
    if config.max_length != "auto" and config.max_length > limit:
        raise ConfigError("max_length is above what the model can hold", received=config.max_length, expected=limit)
    names = ("length", "needed", "intact")
    all_lengths, needed, intact = (whole.column(name) if len(whole) else np.ones(1) for name in names)
    seen = (all_lengths, intact)
    if len(whole) and config.length_policy == "split" and (texts := _texts(whole)).any():
        seen = documents.for_auto(all_lengths, intact, texts)
        needed, intact = (np.where(texts, 1, values) for values in (needed, intact))  # they lose nothing at any length
    auto = lengths.automatic(*seen, limit, batch_size=config.batch_size, batch_tokens=config.batch_tokens)
    max_length = auto if config.max_length == "auto" else config.max_length
    return replace(
        report,
        max_length=max_length,
        lengths=lengths.summary(all_lengths),
        length_choices=lengths.choices(all_lengths, needed, intact, chosen=max_length, auto=auto),
        lost_at_limit=len(np.unique(row_of[needed > limit])) if len(whole) else 0,
    )


def _texts(samples: Samples) -> NDArray[np.bool_]:
    """Which samples are documents of plain text."""
    formats = samples.rows.meta["formats"]
    if "text" not in formats:
        return np.zeros(len(samples), np.bool_)
    are_texts: NDArray[np.bool_] = samples.rows.column("format")[samples.column("row")] == formats.index("text")
    return are_texts


def _note_of_splits(before: Samples, samples: Samples, max_length: int) -> str:
    """How many documents became several samples; "" where none did."""
    long = _texts(before) & (before.column("length") > max_length)
    if not long.any():
        return ""
    whole = int(long.sum())
    pieces = int(np.isin(samples.column("row"), before.column("row")[long]).sum())
    what = "document" if whole == 1 else "documents"
    return f"{whole:,} {what} of more than {max_length} tokens split into {pieces:,} samples"


@dataclass(frozen=True)
class _Written:
    """The samples of the rows that the template can write, uncut, and the report of them."""

    samples: Samples
    report: DataReport


@dataclass(frozen=True)
class _Split:
    """What is trained and what is held out: numbers of rows, and the uncut samples that they are numbers of."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    whole: Samples
    held_out_whole: Samples
    report: DataReport


def _split(desk: _Desk, written: _Written, encoder: Encoder) -> _Split:
    """Hold out the rows of `eval_data`, or a share of the rows that the seed alone decides."""
    config, whole, report = desk.config, written.samples, written.report
    count = len(whole.rows)
    if config.eval_data:
        given = config.model_copy(update={"data": config.eval_data, "take": [], "weight": []})
        others = _written(desk, _load(desk, given), encoder)
        report = replace(  # the counts are of training rows, but bad rows of either are reported
            report,
            skipped_bad=report.skipped_bad + others.report.skipped_bad,
            skipped=[*report.skipped, *others.report.skipped][: rows.MOST_PROBLEMS],
            held_out=len(others.samples.rows),
        )
        return _Split(np.arange(count), np.arange(len(others.samples.rows)), whole, others.samples, report)
    chosen = held_out_of(config, count)
    report = replace(report, held_out=int(chosen.sum()))
    return _Split(np.flatnonzero(~chosen), np.flatnonzero(chosen), whole, whole, report)


def held_out_of(config: RunConfig, count: int) -> NDArray[np.bool_]:
    """(count,): which rows of the training data a run without eval_data holds out; the seed alone decides."""
    wanted = min(config.val_rows, round(config.val_share * count))
    if config.val_share and count > 1:
        wanted = max(1, wanted)
    chosen = np.zeros(count, np.bool_)
    chosen[np.random.default_rng([config.seed, 2**31]).permutation(count)[:wanted]] = True
    return chosen


def _written(desk: _Desk, loaded: rows.Loaded, encoder: Encoder) -> _Written:
    """The samples of the rows that the template can write.

    Raises:
        DataError, Problems: the others, each reason with its first row; where bad rows are skipped, they are only
            counted and listed.
    """
    given, report = loaded.rows, loaded.report
    whole = desk.encoded(given, encoder)
    bad = dict(whole.bad)
    if desk.every_label:
        bad |= labels.wrong_rows(encoder, whole, [n for n in range(len(given)) if n not in bad])
    if not bad:
        return _Written(whole, report)
    reasons = by_reason(bad, given)
    if not desk.config.skip_bad or len(bad) == len(given):
        raise_unwritten(reasons, "change such rows, or leave them out with --skip-bad")
    counts = {reason: report.bad_reasons.get(reason, 0) + len(errors) for reason, errors in reasons.items()}
    good = given.view(np.setdiff1d(np.arange(len(given)), list(bad)))
    report = replace(
        report,
        rows=report.rows - len(bad),
        formats=good.formats(),
        bad_reasons={**report.bad_reasons, **counts},
        skipped_bad=report.skipped_bad + len(bad),
        skipped=[*report.skipped, *(e.what for _, e in sorted(bad.items()))][: rows.MOST_PROBLEMS],
    )
    return _Written(desk.encoded(good, encoder), report)


def _template(config: RunConfig, report: DataReport) -> str:
    """The template's name; where nothing but plain text is trained, auto adds nothing to it."""
    only_text = set(report.formats) == {"text"}
    return "plain" if config.template == "auto" and only_text else config.template
