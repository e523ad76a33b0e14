"""From the settings to samples: data read, split, encoded, cut and checked.

In: a RunConfig, a tokenizer, what the model can hold. Out: Data. No model is loaded, so `inspect` works with a
tokenizer folder alone. Rows and samples lie on disk (store.py), in a cache that the next run finds; what is held in
memory is a few numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.core.config import LengthPolicy, RunConfig, size_bytes
from fitune.core.errors import Collector, ConfigError, DataError, RunFolderError
from fitune.core.events import Silent, Ticker, Watcher
from fitune.core.records import Conversation, DataReport, Finding
from fitune.data import documents, labels, lengths, rows, templates
from fitune.data.cache import Cache, code_version, default_folder, folder_digest, key
from fitune.data.encode import Encoder, encode_rows
from fitune.data.prepared import PROBE_CHARACTERS, PROBES, Cached, Prepared
from fitune.data.store import Rows, Samples, write_samples

NO_LIMIT = 1 << 30  # tokens, where nothing names a longest row


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


@dataclass
class _Desk:
    """What every stage of the preparation needs."""

    config: RunConfig
    folder: Path  # of the tokenizer
    words: Any
    cache: Cache
    watch: Watcher
    check: Callable[[Prepared], list[Finding]]
    date: str | None  # that the template writes; None: today's
    every_label: bool = False  # rows whose labels are not the answers' own are left out as bad ones

    def encoded(self, some: Rows, encoder: Encoder) -> Samples:
        """The samples of these rows."""
        return encode(some, encoder, self.cache, self.digest, self.watch)

    @cached_property
    def digest(self) -> str:
        """Of the tokenizer's files, and of the tokens that it got."""
        return folder_digest(self.folder) + key(self.config.new_tokens)

    def cached(self, whole: Samples, encoder: Encoder) -> Cached | None:
        """What the stale-cache rule looks at, where anything came from the cache."""
        if not self.cache.found:
            return None
        now = rows.first(self.config.sources(), PROBES, self.config.fill)
        return Cached(whole.rows.base(), now, whole, encoder.with_max_length(None))


def _nothing(prepared: Prepared) -> list[Finding]:
    return []


def read(
    config: RunConfig,
    folder: Path,
    words: Any,
    *,
    limit: int,
    vocabulary: int,
    watch: Watcher | None = None,
    check: Callable[[Prepared], list[Finding]] = _nothing,
    date: str | None = None,
) -> Data:
    """Read the data, and have it checked.

    Args:
        config: the settings.
        folder: where the tokenizer's files are.
        words: the tokenizer.
        limit: longest row, in tokens, that the model can hold.
        vocabulary: rows of the model's embedding.
        watch: is told how far it is.
        check: looks at what was prepared; a finding that a cache is stale, or labels wrong, has the data read again.
        date: that the template writes; None: today's.

    Raises:
        FituneError: data that cannot be used. What the rules refuse is only found, not raised.
    """
    watch = watch or Silent()
    desk = _Desk(config, folder, words, _cache(config, watch), watch, check, date)
    data = _read(desk, limit, vocabulary)
    stale = next((finding for finding in data.findings if finding.rule == "stale-cache"), None)
    if stale is not None and stale.level == "refuse":
        desk.cache.forget()
        data = _read(desk, limit, vocabulary)
        anew = replace(stale, level="fixed", text=f"{stale.text}; it was made anew")
        data.findings = [anew if finding.rule == stale.rule else finding for finding in data.findings]
    border = next((finding for finding in data.findings if finding.rule == "label-border"), None)
    if border is not None and border.level == "refuse" and config.skip_bad:  # a few rows were looked at: now all are
        desk.every_label = True
        data = _read(desk, limit, vocabulary)
    return data


def _cache(config: RunConfig, watch: Watcher) -> Cache:
    if config.cache == "none":
        return Cache()
    most = size_bytes(config.cache_size)
    if config.cache != "auto":
        return Cache(Path(config.cache), most=most, say=watch.say)
    try:
        return Cache(default_folder(), most=most, say=watch.say)
    except RunFolderError as error:
        watch.say(f"prepared data is not kept for the next run: {error.what}")
        return Cache()


def _read(desk: _Desk, limit: int, vocabulary: int) -> Data:
    config, report = desk.config, DataReport()
    all_rows = _load(desk, config, report)
    how: dict[str, Any] = {"system_role": config.system_role, "options": config.template_options}
    shape = templates.choose(_template(config, report), desk.words, date=desk.date, **how)
    encoder = Encoder(desk.words, shape, train_on=config.train_on, answer_tokens=config.answer_tokens)
    whole = _written(desk, all_rows, encoder, report)
    all_rows = whole.rows
    train, held_out, held_out_whole = _split(desk, whole, encoder, report)
    train = train[rows.weigh(all_rows.column("source")[train], config.sources(), config.seed, report)]
    before, of = of_rows(whole, train)
    encoder = encoder.with_max_length(_length(config, before, of, limit, report))
    samples, of = fit(whole, train, encoder, config.length_policy, desk.encoded)
    count(samples, of, len(train), report)
    if config.length_policy == "split":
        _note_splits(before, samples, report)
    held_out_policy: LengthPolicy = "split" if config.length_policy == "split" else "cut"
    held_out_samples, _ = fit(held_out_whole, held_out, encoder, held_out_policy, desk.encoded)
    conversations = all_rows.view(train)
    prepared = Prepared(
        config, conversations, samples, report, encoder, vocabulary, limit, desk.folder, of,
        desk.cached(whole, encoder), held_out_samples,
    )  # fmt: skip
    asked = (row for row in held_out_whole.rows.view(held_out) if _can_be_asked(row, encoder))
    return Data(
        conversations=conversations,
        samples=samples,
        whole_lengths=before.column("length"),
        held_out=held_out_samples,
        held_out_rows=list(islice(asked, config.sample_prompts)),
        encoder=encoder,
        report=report,
        findings=desk.check(prepared),
    )


def _can_be_asked(row: Conversation, encoder: Encoder) -> bool:
    """Has the row a prompt (text has none), and is that short enough to be answered?"""
    short = 0 < row.question().characters() <= PROBE_CHARACTERS
    return short and len(encoder.prompt(row.prompt(), row.tools)) < (encoder.max_length or 0)


def _load(desk: _Desk, config: RunConfig, report: DataReport) -> Rows:
    told = Ticker(desk.watch, "reading rows", None)
    found = rows.load(
        config.sources(),
        report,
        seed=config.seed,
        fill=config.fill,
        skip_bad=config.skip_bad,
        cache=desk.cache,
        on_row=told,
    )
    told.end()
    return found


def encode(rows_: Rows, encoder: Encoder, cache: Cache, tokenizer_digest: str, watch: Watcher) -> Samples:
    """The samples of all rows, from the cache where they are there."""

    def write(folder: Path) -> None:
        told = Ticker(watch, "encoding rows", len(rows_))
        bad: dict[int, DataError] = {}
        write_samples(folder, encode_rows(rows_, encoder, told, bad.__setitem__), bad)
        told.end()

    template = encoder.template.as_dict()
    how = (encoder.train_on, encoder.max_length, encoder.split, sorted(encoder.marks.answers))
    decides = (rows_.key, rows_.numbers.tobytes(), tokenizer_digest, template, *how)
    return Samples(cache.entry("samples", key(*decides, code_version()), write), rows_, keep=cache)


def of_rows(samples: Samples, numbers: NDArray[Any]) -> tuple[Samples, NDArray[Any]]:
    """The samples of these rows, in their order, and of each sample which of `numbers` it belongs to."""
    of = samples.column("row")  # ascending
    starts, ends = (np.searchsorted(of, numbers, side) for side in ("left", "right"))
    counts = ends - starts
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) if len(numbers) else counts
    at = np.arange(int(counts.sum())) + shift
    return samples.view(at), np.repeat(np.arange(len(numbers)), counts)


def fit(
    whole: Samples,
    numbers: NDArray[Any],
    encoder: Encoder,
    policy: LengthPolicy,
    encoded: Callable[[Rows, Encoder], Samples],
) -> tuple[Samples, NDArray[Any]]:
    """The samples of these rows, none longer than the encoder's max_length; see `of_rows`.

    Args:
        whole: of all rows, uncut.
        numbers: which rows.
        encoder: with the max_length.
        policy: what becomes of rows that are longer.
        encoded: gives the samples of some rows, cut.

    Raises:
        DataError, Problems: too long rows, under the policy `refuse`.
    """
    wanted, of = of_rows(whole, numbers)
    lengths_, rows_ = wanted.column("length"), wanted.column("row")
    too_long = np.unique(rows_[lengths_ > (encoder.max_length or NO_LIMIT)])
    if not len(too_long):
        return wanted, of
    if policy == "refuse":
        _refuse(whole, too_long, encoder.max_length)
    fitted = whole.without(too_long)
    if policy in ("cut", "split"):
        encoder = encoder.with_max_length(encoder.max_length, split=policy == "split")
        fitted = fitted.joined(encoded(whole.rows.view(too_long), encoder), too_long)
    return of_rows(fitted, numbers)


def _refuse(whole: Samples, too_long: NDArray[Any], limit: int | None) -> None:
    problems = Collector()
    for row in too_long[: rows.MOST_PROBLEMS]:
        where = whole.rows.source(int(row))
        length = int(whole.column("length")[whole.column("row") == row].max())
        error = DataError(
            "the row is too long",
            file=where.file,
            line=where.line,
            received=f"{length} tokens",
            expected=f"at most {limit} (max_length)",
            fix="a larger --max-length, or --length-policy cut",
        )
        problems.problems.append(error)
    if len(too_long) > rows.MOST_PROBLEMS:
        problems.problems.append(DataError(f"and {len(too_long) - rows.MOST_PROBLEMS} more rows are too long"))
    problems.raise_any()


def count(samples: Samples, of: NDArray[Any], total: int, report: DataReport) -> None:
    """What was kept, cut and dropped of `total` rows, by rows."""

    def rows_where(name: str) -> int:
        return len(np.unique(of[samples.column(name) > 0]))

    report.kept = len(np.unique(of))
    report.dropped = total - report.kept
    report.cut_prompt, report.cut_answer = rows_where("cut_prompt"), rows_where("cut_answer")
    report.cut_text = rows_where("cut_text")
    report.samples = len(samples)
    lengths_ = samples.column("length")
    report.tokens = int(lengths_.sum())
    _, firsts = np.unique(of, return_index=True)  # one pass over a conversation is as long as its longest sample
    report.repeated = report.tokens - int(np.maximum.reduceat(lengths_, firsts).sum()) if len(of) else 0
    report.trained_tokens = int(samples.column("trained").sum())


def _length(config: RunConfig, whole: Samples, of: NDArray[Any], limit: int, report: DataReport) -> int:
    """The run's max_length; what it and others would cut goes into the report.

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
    report.max_length = auto if config.max_length == "auto" else config.max_length
    report.lengths = lengths.summary(all_lengths)
    report.length_choices = lengths.choices(all_lengths, needed, intact, chosen=report.max_length, auto=auto)
    report.lost_at_limit = len(np.unique(of[needed > limit])) if len(whole) else 0
    return report.max_length


def _texts(samples: Samples) -> NDArray[np.bool_]:
    """Which samples are documents of plain text."""
    formats = samples.rows.meta["formats"]
    if "text" not in formats:
        return np.zeros(len(samples), np.bool_)
    return samples.rows.column("format")[samples.column("row")] == formats.index("text")  # type: ignore[no-any-return]


def _note_splits(before: Samples, samples: Samples, report: DataReport) -> None:
    """How many documents became several samples, for a note."""
    long = _texts(before) & (before.column("length") > report.max_length)
    if long.any():
        whole = int(long.sum())
        pieces = int(np.isin(samples.column("row"), before.column("row")[long]).sum())
        what = "document" if whole == 1 else "documents"
        report.notes.append(f"{whole:,} {what} of more than {report.max_length} tokens split into {pieces:,} samples")


def _split(
    desk: _Desk, whole: Samples, encoder: Encoder, report: DataReport
) -> tuple[NDArray[Any], NDArray[Any], Samples]:
    """Numbers of training rows, numbers of held-out rows, and the samples that the latter are numbers of.

    The split depends on the seed alone.
    """
    config, there = desk.config, len(whole.rows)
    if config.eval_data:
        given = config.model_copy(update={"data": config.eval_data, "take": [], "weight": []})
        held_out_report = DataReport()
        held_out = _written(desk, _load(desk, given, held_out_report), encoder, held_out_report)
        report.skipped_bad += held_out_report.skipped_bad  # the counts are of training rows, but what is bad is told
        report.skipped = [*report.skipped, *held_out_report.skipped][: rows.MOST_PROBLEMS]
        report.held_out = len(held_out.rows)
        return np.arange(there), np.arange(len(held_out.rows)), held_out
    wanted = min(config.val_rows, round(config.val_share * there))
    if config.val_share and there > 1:
        wanted = max(1, wanted)
    chosen = np.zeros(there, np.bool_)
    chosen[np.random.default_rng([config.seed, 2**31]).permutation(there)[:wanted]] = True
    report.held_out = wanted
    return np.flatnonzero(~chosen), np.flatnonzero(chosen), whole


def _written(desk: _Desk, some: Rows, encoder: Encoder, report: DataReport) -> Samples:
    """The samples of the rows that the template can write.

    Raises:
        DataError, Problems: the others, each reason with its first row; where bad rows are skipped, they are only
            counted and listed.
    """
    whole = desk.encoded(some, encoder)
    bad = dict(whole.bad)
    if desk.every_label:
        bad |= labels.wrong_rows(encoder, whole, [n for n in range(len(some)) if n not in bad])
    if not bad:
        return whole
    reasons = _by_reason(bad, some)
    if not desk.config.skip_bad or len(bad) == len(some):
        _refuse_unwritten(reasons, "change such rows, or leave them out with --skip-bad")
    for reason, errors in reasons.items():
        report.bad_reasons[reason] = report.bad_reasons.get(reason, 0) + len(errors)
    report.skipped_bad += len(bad)
    report.skipped = [*report.skipped, *(e.what for _, e in sorted(bad.items()))][: rows.MOST_PROBLEMS]
    good = some.view(np.setdiff1d(np.arange(len(some)), list(bad)))
    report.rows, report.formats = report.rows - len(bad), good.formats()
    return desk.encoded(good, encoder)


def refuse_unwritten(samples: Samples, fix: str) -> None:
    """Raise where the template cannot write some of the rows: they have no samples, and would be missing silently.

    Args:
        samples: of all rows.
        fix: what a user does about it, where a reason has no fix of its own.

    Raises:
        DataError, Problems: each reason with its first row.
    """
    if samples.bad:
        _refuse_unwritten(_by_reason(samples.bad, samples.rows), fix)


def _by_reason(bad: Mapping[int, DataError], some: Rows) -> dict[str, list[DataError]]:
    reasons: dict[str, list[DataError]] = {}
    for row, error in sorted(bad.items()):
        reasons.setdefault(error.what.removeprefix(f"{some.source(row)}: "), []).append(error)
    return reasons


def _refuse_unwritten(reasons: Mapping[str, list[DataError]], fix: str) -> None:
    problems = Collector()
    for errors in reasons.values():
        first = errors[0]
        first.what += f" (and {len(errors) - 1} rows more)" if len(errors) > 1 else ""
        first.fix = first.fix or fix
        problems.problems.append(first)
    problems.raise_any()


def _template(config: RunConfig, report: DataReport) -> str:
    """The template's name; where nothing but plain text is trained, auto adds nothing to it."""
    only_text = set(report.formats) == {"text"}
    return "plain" if config.template == "auto" and only_text else config.template
