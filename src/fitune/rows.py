"""Data to conversations.

In: sources (files, folders, hub ids), each with what is said of it. Out: one Conversation per row, each knowing its
file and line. `readers` parses files, `formats` understands rows; here is what becomes of them: `take` draws some,
`weight` repeats them, bad ones are told with file:line:field, all at once, or skipped and listed if so wished. Nothing
is dropped silently, and columns that no format uses are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from fitune import formats
from fitune.config import DataSource
from fitune.errors import Collector, DataError
from fitune.readers import files, locate, read
from fitune.records import Conversation, DataReport

MOST_PROBLEMS = 20  # bad rows told in one message, or listed where they are skipped; the rest are counted
TAKE, WEIGH = 1, 2  # streams of random numbers, apart from each other and from that of the held-out split


def load(
    sources: Sequence[str | DataSource],
    report: DataReport,
    *,
    seed: int = 0,
    fill: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> list[Conversation]:
    """The rows of all sources, in order; `take` is done, `weight` is noted in each row for `weigh`.

    Args:
        sources: paths, or sources as `RunConfig.sources` gives them.
        report: rows, formats, files, unused columns and unfilled slots are counted here.
        seed: decides which rows `take` draws.
        fill: texts for the slots {{name}}.
        skip_bad: leave out bad rows, count and list them in the report.

    Raises:
        ConfigError: an unknown format, or a column map that fits none.
        DataError, Problems: every bad file and row (at most MOST_PROBLEMS, the rest counted).
    """
    state = _State(report, fill or {}, skip_bad)
    conversations: list[Conversation] = []
    for number, given in enumerate(sources):
        source = DataSource(path=given) if isinstance(given, str) else given
        with state.problems.gather():
            formats.check(source.format or "auto", source.map)
            rows = _rows(source, state)
            drawn = _take(rows, source, [seed, TAKE, number], report) if source.take else list(rows)
            weight = source.weight or 1.0
            conversations += drawn if weight == 1 else [replace(row, weight=weight) for row in drawn]
    if state.bad > state.told and not skip_bad:
        state.problems.problems.append(DataError(f"and {state.bad - state.told} more bad rows"))
    state.problems.raise_any()
    _count(conversations, report)
    return conversations


@dataclass
class _State:
    """What is gathered while rows are read."""

    report: DataReport
    fill: Mapping[str, str]
    skip_bad: bool
    problems: Collector = field(default_factory=Collector)
    bad: int = 0
    told: int = 0
    shapes: set[tuple[str, str]] = field(default_factory=set)

    def refuse(self, error: DataError) -> None:
        """Keep what is wrong with a row."""
        self.bad += 1
        if self.skip_bad:
            self.report.skipped_bad += 1
            reason = error.what.rpartition(": ")[2]
            self.report.bad_reasons[reason] = self.report.bad_reasons.get(reason, 0) + 1
            if len(self.report.skipped) < MOST_PROBLEMS:
                self.report.skipped.append(error.what)
        elif self.told < MOST_PROBLEMS and not self._known(error):
            if not self.told:
                error.fix = error.fix or "mend the row, or leave bad rows out with --skip-bad"
            self.told += 1
            self.problems.problems.append(error)

    def _known(self, error: DataError) -> bool:
        """A row with the same wrong columns was told of before: a file of them needs no list."""
        shape = (str(error.file), str(error.received))
        known = error.field is None and shape in self.shapes
        self.shapes.add(shape)
        return known


def _rows(source: DataSource, state: _State) -> Iterator[Conversation]:
    """The good rows of a source. A file that breaks off does not hide what is wrong in the next one."""
    good, bad, broken = 0, state.bad, len(state.problems.problems)
    for path in files(locate(source.path)):
        with state.problems.gather():
            for conversation in _file(path, source, state):
                good += 1
                state.report.files[str(path)] = state.report.files.get(str(path), 0) + 1
                yield conversation
    if not good and len(state.problems.problems) == broken:
        received = f"{state.bad - bad} bad rows" if state.bad > bad else "an empty list"
        raise DataError("no rows", file=source.path, received=received, expected="rows to train on")


def _file(path: Path, source: DataSource, state: _State) -> Iterator[Conversation]:
    """The good rows of a file; the bad ones are kept in `state`."""
    unused = state.report.unused_columns
    for item in read(path):
        try:
            if isinstance(item, DataError):
                raise item
            row, where = item
            conversation = formats.to_conversation(row, where, name=source.format or "auto", columns=source.map)
        except DataError as error:
            state.refuse(error)
            continue
        for column in formats.unused(row, conversation.format, source.map):
            unused[column] = unused.get(column, 0) + 1
        yield formats.fill(conversation, state.fill) if state.fill else conversation


def _take(rows: Iterable[Conversation], source: DataSource, seed: list[int], report: DataReport) -> list[Conversation]:
    """`take` rows, each set of them as likely as any other, in their order (reservoir sampling: no more are held)."""
    wanted, random = source.take or 0, np.random.default_rng(seed)
    kept: list[tuple[int, Conversation]] = []
    for number, row in enumerate(rows):
        if number < wanted:
            kept.append((number, row))
        elif (slot := int(random.integers(number + 1))) < wanted:
            kept[slot] = (number, row)
    if len(kept) < wanted:
        report.notes.append(f"{source.path}: take {wanted}, but it has {len(kept)} rows: all are taken")
    return [row for _, row in sorted(kept, key=lambda pair: pair[0])]


def _count(conversations: Iterable[Conversation], report: DataReport) -> None:
    for conversation in conversations:
        report.rows += 1
        report.formats[conversation.format] = report.formats.get(conversation.format, 0) + 1
        for slot in formats.slots(conversation):
            report.unfilled_slots[slot] = report.unfilled_slots.get(slot, 0) + 1


def weigh(conversations: list[Conversation], seed: int, report: DataReport) -> list[Conversation]:
    """The rows as often as their weights say: n rows of weight w become w x n, each floor(w) times, or once more.

    Done after rows are held out, so that no copy of a held-out row is trained. The same list where all weights are 1.
    """
    if all(row.weight == 1 for row in conversations):
        return conversations
    random = np.random.default_rng([seed, WEIGH])
    drawn: list[Conversation] = []
    for weight, group in groupby(conversations, key=lambda row: row.weight):  # a source's rows stand together
        rows = list(group)
        times = np.full(len(rows), int(weight))
        more = max(1, round(weight * len(rows))) - int(times.sum())
        times[random.permutation(len(rows))[:more]] += 1
        drawn += [row for row, count in zip(rows, times.tolist(), strict=True) for _ in range(count)]
    before, after = len(conversations), len(drawn)
    report.rows += after - before
    report.notes.append(f"weights: {before:,} rows to train on become {after:,}")
    return drawn
