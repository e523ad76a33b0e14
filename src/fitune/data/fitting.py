"""Rows to samples that fit: encoded, found again in the cache, cut or split to max_length, counted.

In: rows, an encoder, a policy for what is too long. Out: Samples, of each the number of its row, and the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.core.config import LengthPolicy
from fitune.core.errors import Collector, DataError
from fitune.core.events import Ticker, Watcher
from fitune.core.records import Conversation, DataReport, Sample
from fitune.data.cache import Cache, code_version, key
from fitune.data.encode import Encoder
from fitune.data.rows import MOST_PROBLEMS
from fitune.data.store import Rows, Samples, write_samples

NO_LIMIT = 1 << 30  # tokens, where nothing names a longest row
CHUNK = 1024  # rows whose texts go to the tokenizer in one call


def encode_rows(
    rows: Iterable[Conversation],
    encoder: Encoder,
    on_row: Callable[[int], None] = lambda done: None,
    on_bad: Callable[[int, DataError], None] | None = None,
) -> Iterator[list[Sample]]:
    """The samples of each row, CHUNK rows at a time.

    Args:
        rows: read once.
        encoder: with or without a max_length.
        on_row: receives how many rows are done.
        on_bad: see Encoder.samples_of.
    """
    remaining, done = iter(rows), 0
    while chunk := list(islice(remaining, CHUNK)):
        report_bad = None if on_bad is None else partial(_numbered, on_bad, done)
        yield from encoder.samples_of(chunk, report_bad)
        done += len(chunk)
        on_row(done)


def _numbered(on_bad: Callable[[int, DataError], None], first: int, number: int, error: DataError) -> None:
    on_bad(first + number, error)


def encode(rows_: Rows, encoder: Encoder, cache: Cache, tokenizer_digest: str, watch: Watcher) -> Samples:
    """The samples of all rows, from the cache where they are there."""

    def write(folder: Path) -> None:
        progress = Ticker(watch, "encoding rows", len(rows_))
        bad: dict[int, DataError] = {}
        write_samples(folder, encode_rows(rows_, encoder, progress, bad.__setitem__), bad)
        progress.end()

    template = encoder.template.as_dict()
    settings = (encoder.train_on, encoder.max_length, encoder.split, sorted(encoder.marks.answers), encoder.both)
    name = key(rows_.key, rows_.numbers.tobytes(), tokenizer_digest, template, *settings, code_version())
    return Samples(cache.entry("samples", name, write), rows_, keep=cache)


def of_rows(samples: Samples, numbers: NDArray[Any]) -> tuple[Samples, NDArray[Any]]:
    """The samples of these rows, in their order, and of each sample which of `numbers` it belongs to."""
    row_of = samples.column("row")  # ascending
    starts, ends = (np.searchsorted(row_of, numbers, side) for side in ("left", "right"))
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
        encoded: gives the samples of given rows, cut.

    Raises:
        DataError, Problems: too long rows, under the policy `refuse`.
    """
    wanted, row_of = of_rows(whole, numbers)
    lengths_, rows_ = wanted.column("length"), wanted.column("row")
    too_long = np.unique(rows_[lengths_ > (encoder.max_length or NO_LIMIT)])
    if not len(too_long):
        return wanted, row_of
    if policy == "refuse":
        _refuse_long(whole, too_long, encoder.max_length)
    fitted = whole.without(too_long)
    if policy in ("cut", "split"):
        encoder = encoder.with_max_length(encoder.max_length, split=policy == "split")
        fitted = fitted.joined(encoded(whole.rows.view(too_long), encoder), too_long)
    return of_rows(fitted, numbers)


def _refuse_long(whole: Samples, too_long: NDArray[np.int32], limit: int | None) -> None:
    problems = Collector()
    for row in too_long[:MOST_PROBLEMS]:
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
    if len(too_long) > MOST_PROBLEMS:
        problems.problems.append(DataError(f"and {len(too_long) - MOST_PROBLEMS} more rows are too long"))
    problems.raise_any()


def counted(
    report: DataReport, samples: Samples, row_of: NDArray[Any], total: int, *, pairs: bool = False
) -> DataReport:
    """The report with what was kept, cut and dropped.

    Args:
        report: of the reading.
        samples: what is trained.
        row_of: of each sample, the number of its row.
        total: how many rows there were.
        pairs: two samples are a row.
    """

    def rows_where(name: str) -> int:
        return len(np.unique(row_of[samples.column(name) > 0]))

    lengths_ = samples.column("length")
    kept, tokens = len(np.unique(row_of)), int(lengths_.sum())
    if pairs:
        report = replace(report, pairs=kept, shared=int(samples.column("shared")[::2].sum()))
    _, firsts = np.unique(row_of, return_index=True)  # one pass over a conversation is as long as its longest sample
    return replace(
        report,
        kept=kept,
        dropped=total - kept,
        cut_prompt=rows_where("cut_prompt"),
        cut_answer=rows_where("cut_answer"),
        cut_text=rows_where("cut_text"),
        samples=len(samples),
        tokens=tokens,
        repeated=tokens - int(np.maximum.reduceat(lengths_, firsts).sum()) if len(row_of) and not pairs else 0,
        trained_tokens=int(samples.column("trained").sum()),
    )


def refuse_unwritten(samples: Samples, fix: str) -> None:
    """Raise where the template cannot write given of the rows: they have no samples, and would be missing silently.

    Args:
        samples: of all rows.
        fix: what a user does about it, where a reason has no fix of its own.

    Raises:
        DataError, Problems: each reason with its first row.
    """
    if samples.bad:
        raise_unwritten(by_reason(samples.bad, samples.rows), fix)


def by_reason(bad: Mapping[int, DataError], given: Rows) -> dict[str, list[DataError]]:
    """What is wrong with rows, by its text without the place of the row."""
    reasons: dict[str, list[DataError]] = {}
    for row, error in sorted(bad.items()):
        reasons.setdefault(error.what.removeprefix(f"{given.source(row)}: "), []).append(error)
    return reasons


def raise_unwritten(reasons: Mapping[str, list[DataError]], fix: str) -> None:
    """Raise each reason with its first row and the number of the others."""
    problems = Collector()
    for errors in reasons.values():
        first, more = errors[0], len(errors) - 1
        first.what += f" (and {more:,} more row{'s' if more > 1 else ''})" if more else ""
        first.fix = first.fix or fix
        problems.problems.append(first)
    problems.raise_any()
