"""Data to conversations.

In: sources (files, folders, hub ids), each with what is said of it. Out: one Conversation per row, each knowing its
file and line, on disk: read as a stream, and found again in the cache. `readers` parses files, `formats` understands
rows; here is what becomes of them: `take` draws some, `weight` repeats them, bad ones are reported with
file:line:field, all at once, or skipped and listed if so wished. Nothing is dropped silently; columns that no format
uses are counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fitune.core.errors import Collector, DataError
from fitune.core.files import sha256
from fitune.core.options import DataSource, Wanted
from fitune.core.records import Conversation, DataReport, Source
from fitune.core.untrusted import DEEPEST, check_depth
from fitune.data import conversations, formats, preferences
from fitune.data.cache import Cache, code_version, key
from fitune.data.columns import sizes
from fitune.data.readers import documents_beside, files, locate, read
from fitune.data.store import META, Rows, write_rows
from fitune.data.tables import check_columns

MOST_PROBLEMS = 20  # bad rows reported in one message, or listed where they are skipped; the rest are counted
TAKE, WEIGH = 1, 2  # streams of random numbers, apart from each other and from that of the held-out split


@dataclass(frozen=True)
class Loaded:
    """Rows on disk, and the report of reading them: rows, formats, files, unused columns, slots, what was bad."""

    rows: Rows
    report: DataReport


def load(
    sources: Sequence[str | DataSource],
    *,
    seed: int = 0,
    fill: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    cache: Cache | None = None,
    on_row: Callable[[int], None] = lambda done: None,
    wanted: Wanted = "answers",
) -> Loaded:
    """The rows of all sources, in order, on disk; `take` is done, `weight` is left to `weigh`.

    Args:
        sources: paths, or sources as `RunConfig.sources` gives them.
        seed: decides which rows `take` draws.
        fill: texts for the slots {{name}}.
        skip_bad: leave out bad rows, count and list them in the report.
        cache: where the rows are kept, and found again; None: a temporary folder.
        on_row: receives how many rows were read.
        wanted: what is needed of a row, as for `conversations.to_conversation`.

    Raises:
        ConfigError: an unknown format, or a column map that fits none.
        DataError, Problems: every bad file and row (at most MOST_PROBLEMS, the rest counted).
    """
    asked = [DataSource(path=given) if isinstance(given, str) else given for given in sources]
    cache = cache or Cache()
    name = _key(asked, fill or {}, wanted)

    def read_all(meta: dict[str, Any]) -> Iterator[tuple[int, Conversation]]:
        return _all(asked, _State(DataReport(), fill or {}, skip_bad, wanted), meta)

    def write(folder: Path) -> None:
        meta: dict[str, Any] = {}
        write_rows(folder, _counting(read_all(meta), on_row), meta)
        if _key(asked, fill or {}, wanted) != name:
            raise DataError("the data changed while it was read", received=", ".join(s.path for s in asked))

    rows = Rows(cache.entry("rows", name, write), name, keep=cache)
    read = _report(rows.folder)
    if read.skipped_bad and not skip_bad:  # kept by a run that skipped them; now they are to be reported
        list(read_all({}))
    rows, notes = _take(rows, asked, seed)
    slots: Counter[str] = Counter()
    for row in rows.view(np.flatnonzero(rows.column("slots"))):
        slots.update(conversations.slots(row))
    understood = [f"{count:,} row{'s' * (count > 1)} {what}" for what, count in read.taken.items()]
    report = replace(
        read,
        rows=len(rows),
        files=rows.base().files(),
        formats=rows.formats(),
        notes=[*read.notes, *understood, *notes],
        unfilled_slots=dict(slots),
    )
    return Loaded(rows, report)


def _key(sources: Sequence[DataSource], fill: Mapping[str, str], wanted: Wanted) -> str:
    """All that decides what is read: the files' content, and what is said of them. A file that is missing has none."""
    content = []
    for source in sources:
        with suppress(DataError, OSError):
            found = [[str(file), sha256(file)] for file in files(locate(source.path))]
            content.append([source.format, source.map, found])
    return key(content, dict(fill), wanted, code_version())


def _report(folder: Path) -> DataReport:
    """What was counted when the rows were read."""
    return DataReport(**json.loads((folder / META).read_text(encoding="utf-8"))["report"])


def _counting(rows: Iterable[object], on_row: Callable[[int], None]) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        yield row
        on_row(number)


def _all(sources: Sequence[DataSource], state: _State, meta: dict[str, object]) -> Iterator[tuple[int, Conversation]]:
    """Every good row of every source; what is wrong is reported when all have been read."""
    rows = _each(sources, state, meta)
    return preferences.mismatched(rows) if state.wanted == "labels" else rows


def _each(sources: Sequence[DataSource], state: _State, meta: dict[str, object]) -> Iterator[tuple[int, Conversation]]:
    for number, source in enumerate(sources):
        with state.problems.gather():
            formats.check(source.format or "auto", source.map)
            for row in _rows(source, state):
                yield number, row
    if state.bad > state.reported and not state.skip_bad:
        state.problems.problems.append(DataError(f"and {state.bad - state.reported} more bad rows"))
    state.problems.raise_any()
    meta["report"] = state.report.as_dict()


@dataclass
class _State:
    """What is gathered while rows are read."""

    report: DataReport
    fill: Mapping[str, str]
    skip_bad: bool
    wanted: Wanted
    problems: Collector = field(default_factory=Collector)
    bad: int = 0
    reported: int = 0
    shapes: set[tuple[str, str]] = field(default_factory=set)
    unknown: dict[tuple[str, str], tuple[DataError, dict[str, int]]] = field(default_factory=dict)
    left_out: list[DataError] = field(default_factory=list)  # the first bad rows of a source, where they are skipped

    def refuse(self, error: DataError, row: object = None) -> None:
        """Keep what is wrong with a row."""
        self.bad += 1
        self._weigh(error, row)
        if self.skip_bad:
            self.report.skipped_bad += 1
            where, _, reason = error.what.rpartition(": ")
            self.report.bad_reasons[reason] = self.report.bad_reasons.get(reason, 0) + 1
            self.report.bad_first.setdefault(reason, where)
            if len(self.report.skipped) < MOST_PROBLEMS:
                self.report.skipped.append(error.what)
            if len(self.left_out) < MOST_PROBLEMS and not self._known(error):
                self.left_out.append(error)
        elif self.reported < MOST_PROBLEMS and not self._known(error):
            if not self.reported:
                error.fix = error.fix or "fix the row, or leave bad rows out with --skip-bad"
            self.reported += 1
            self.problems.problems.append(error)

    def _weigh(self, error: DataError, row: object) -> None:
        """How long the texts of columns of unknown names are, over all rows that have them: the first row of them says
        what they may mean."""
        if error.field is not None or not error.what.endswith(formats.UNKNOWN) or not isinstance(row, dict):
            return
        first, lengths = self.unknown.setdefault((str(error.file), str(error.received)), (error, {}))
        for column, size in sizes(row).items():
            lengths[column] = lengths.get(column, 0) + size
        first.fix = formats.what_they_are(lengths)

    def _known(self, error: DataError) -> bool:
        """A row with the same wrong columns was reported before: a file of them needs no list."""
        shape = (str(error.file), str(error.received))
        known = error.field is None and shape in self.shapes
        self.shapes.add(shape)
        return known


def _rows(source: DataSource, state: _State) -> Iterator[Conversation]:
    """The good rows of a source. A file that breaks off does not hide what is wrong in the next one."""
    good, bad, broken = 0, state.bad, len(state.problems.problems)
    state.left_out.clear()
    place = locate(source.path)
    if beside := documents_beside(place):
        state.report.notes.append(
            f"{source.path}: {beside} text files beside the rows are left alone; name them to read"
        )
    for path in files(place):
        with state.problems.gather():
            for conversation in _file(path, source, state):
                good += 1
                yield conversation
    if not good and len(state.problems.problems) == broken:
        received = f"{state.bad - bad} bad rows" if state.bad > bad else "an empty list"
        if state.bad == bad and state.report.taken:
            received = "rows without an answer of weight above 0"
        state.problems.problems.extend(state.left_out)
        raise DataError("no rows", file=source.path, received=received, expected="rows to train on")


def _check_shape(row: object, where: Source) -> None:
    """Raises DataError for a row of more columns than any data has, or one nested deeper than anybody writes."""
    if isinstance(row, dict):
        check_columns(len(row), where.file, where.line)
    try:
        check_depth(row)
    except RecursionError:
        field = next((name for name, value in row.items() if _is_deep(value)), None) if isinstance(row, dict) else None
        expected = f"lists and objects {DEEPEST} deep at most"
        raise DataError("nested too deeply", file=where.file, line=where.line, field=field, expected=expected) from None


def _is_deep(value: object) -> bool:
    try:
        check_depth(value, DEEPEST - 1)
    except RecursionError:
        return True
    return False


def _file(path: Path, source: DataSource, state: _State) -> Iterator[Conversation]:
    """The good rows of a file; the bad ones are kept in `state`."""
    unused = state.report.unused_columns
    for item in read(path, state.report.notes.append):
        row = None
        try:
            if isinstance(item, DataError):
                raise item
            row, where = conversations.framed(item[0]), item[1]
            _check_shape(row, where)
            conversation = conversations.to_conversation(
                row, where, name=source.format or "auto", columns=source.map, wanted=state.wanted
            )
        except DataError as error:
            state.refuse(error, row)
            continue
        for column in conversations.unused(row, conversation.format, source.map, state.wanted):
            unused[column] = unused.get(column, 0) + 1
        for note in conversations.notes(row, conversation, source.map, state.wanted):
            state.report.taken[note] = state.report.taken.get(note, 0) + 1
        if not any(m.weight for m in conversation.messages if m.role == "assistant"):
            continue  # nothing of it would be trained
        conversation = conversations.fill(conversation, state.fill) if state.fill else conversation
        labelled = state.wanted == "labels" and conversation.desirable is None
        yield from preferences.unpaired(conversation) if labelled else [conversation]


def _take(rows: Rows, sources: Sequence[DataSource], seed: int) -> tuple[Rows, list[str]]:
    """So many rows of each source as it says, each set of them as likely as any other, in their order; and notes."""
    if not any(source.take for source in sources):
        return rows, []
    source_of, notes = rows.column("source"), []
    kept = []
    for number, source in enumerate(sources):
        numbers = np.flatnonzero(source_of == number)
        if source.take and source.take < len(numbers):
            random = np.random.default_rng([seed, TAKE, number])
            numbers = np.sort(random.choice(numbers, source.take, replace=False))
        elif source.take and source.take > len(numbers):
            notes.append(f"{source.path}: take {source.take}, but it has {len(numbers)} rows: all are taken")
        kept.append(numbers)
    return rows.view(np.concatenate(kept)), notes


def weigh(source_of: NDArray[np.int64], sources: Sequence[DataSource], seed: int) -> tuple[NDArray[np.int64], str]:
    """The rows as often as their sources say: n rows of weight w become w x n, each floor(w) times, or once more.

    Done after rows are held out, so that no copy of a held-out row is trained.

    Args:
        source_of: the number of each row's source.
        sources: with their weights.
        seed: decides which rows come once more.

    Returns:
        Numbers of rows, ascending, each as often as it is trained; and a note, "" where all weights are 1.
    """
    weights = [source.weight or 1.0 for source in sources]
    times = np.ones(len(source_of), np.int64)
    random = np.random.default_rng([seed, WEIGH])
    for number, weight in enumerate(weights):
        numbers = np.flatnonzero(source_of == number)
        if weight != 1 and len(numbers):
            times[numbers] = int(weight)
            more = max(1, round(weight * len(numbers))) - int(weight) * len(numbers)
            times[random.permutation(numbers)[:more]] += 1
    drawn = np.repeat(np.arange(len(source_of)), times)
    changed = any(weight != 1 for weight in weights)
    return drawn, f"weights: {len(source_of):,} rows to train on become {len(drawn):,}" if changed else ""


def first(
    sources: Sequence[DataSource], count: int, fill: Mapping[str, str], wanted: Wanted = "answers"
) -> list[Conversation]:
    """The first good rows as they are read now: what kept rows must begin with. Bad rows are passed over."""
    state = _State(DataReport(), fill, skip_bad=True, wanted=wanted)
    return [row for _, row in islice(_all(sources, state, {}), count)]
