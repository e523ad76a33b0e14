"""Rows and samples on disk: sequences that are read where they lie, so that a million of them take no memory.

In: conversations or samples, one after the other. Out: a folder, and a Sequence over it that can be cut down, reordered
and repeated by an index without touching the files.

    rows:     rows.jsonl                  a conversation a line
              columns.safetensors         of each row: where its line starts, file, line, format, source, slots,
                                          desirable
              meta.json                   names of files and formats, the report of the reading
    samples:  samples-00000.safetensors   ids and mask of many samples, one after the other
              columns.safetensors         of each sample: its row, shard, place, length, what was cut
                                          (weights in the loss lie beside the ids where any sample of a shard has them)

A file is opened for each access and read at its place: mapped files would count as memory of the process.
"""

from __future__ import annotations

import json
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fitune.core.errors import DataError, RunFolderError
from fitune.core.options import Wanted
from fitune.core.records import Conversation, Message, Sample, Source, ToolCall, Units
from fitune.core.untrusted import reason
from fitune.data.conversations import slots
from fitune.data.pairs import Pairs, common

LINES, COLUMNS, META = "rows.jsonl", "columns.safetensors", "meta.json"
SHARD_TOKENS = 1 << 20  # tokens of a shard, about: ids and mask of it are held while it is written or read through
OPEN_SHARDS = 3
BLOCK = 4096  # samples that are looked at together


# ---- rows ----


def _as_json(row: Conversation) -> str:
    messages, rejected = (
        [
            [m.role, m.content, m.context, [astuple(c) for c in m.tool_calls], m.thought, m.weight, m.call_id, m.name]
            for m in some
        ]
        for some in (row.messages, row.rejected)
    )
    more = [rejected, row.fork, row.desirable] if rejected else []
    return json.dumps([messages, list(row.tools), *more], ensure_ascii=False, separators=(",", ":"))


def _messages(values: Sequence[Any]) -> tuple[Message, ...]:
    return tuple(
        Message(role, text, context, tuple(ToolCall(*call) for call in calls), *rest)
        for role, text, context, calls, *rest in values
    )


def write_rows(folder: Path, rows: Iterable[tuple[int, Conversation]], meta: Mapping[str, Any]) -> None:
    """Write rows, each with the number of its source.

    Args:
        folder: empty.
        rows: read once.
        meta: what else is kept; looked at when the rows are through.
    """
    files: dict[str, int] = {}
    formats: dict[str, int] = {}
    columns = {"start": array("q"), "file": array("i"), "line": array("i"), "format": array("i"), "source": array("i")}
    waits, marks = array("b"), array("b")
    at = 0
    with (folder / LINES).open("wb") as out:
        for number, row in rows:
            line = _as_json(row).encode() + b"\n"
            where = row.source or Source("?", 0)
            place = (
                at,
                files.setdefault(where.file, len(files)),
                where.line,
                formats.setdefault(row.format, len(formats)),
                number,
            )
            for column, value in zip(columns.values(), place, strict=True):
                column.append(value)
            waits.append(bool(slots(row)))
            marks.append(bool(row.desirable))
            out.write(line)
            at += len(line)
    columns["start"].append(at)
    arrays = {name: np.asarray(values) for name, values in columns.items()}  # 4 or 8 bytes a number
    flags = {"slots": np.array(waits, np.bool_), "desirable": np.array(marks, np.bool_)}
    save_file({**arrays, **flags}, folder / COLUMNS)
    text = json.dumps({"files": list(files), "formats": list(formats), **meta}, ensure_ascii=False)
    (folder / META).write_text(text, encoding="utf-8")


class Rows(Sequence[Conversation]):
    """Conversations on disk.

    Args:
        folder: what `write_rows` wrote.
        key: names the content.
        keep: something that must live as long, such as a temporary folder.
    """

    def __init__(self, folder: Path, key: str, keep: object = None) -> None:
        self.folder, self.key, self._keep = folder, key, keep
        self.meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self._columns = load_file(folder / COLUMNS)
        self.numbers: NDArray[np.int64] = np.arange(len(self._columns["start"]) - 1)

    def view(self, index: NDArray[Any]) -> Rows:
        """These of the rows, in this order; a number may come several times."""
        return self._with(self.numbers[index])

    def base(self) -> Rows:
        """All of them, in the order in which they were written."""
        return self._with(np.arange(len(self._columns["start"]) - 1))

    def _with(self, numbers: NDArray[np.int64]) -> Rows:
        other = object.__new__(Rows)
        other.__dict__.update({**self.__dict__, "numbers": numbers})
        return other

    def column(self, name: str) -> NDArray[Any]:
        """file, line, format, source (numbers), slots or desirable (bool), of each row."""
        return self._columns[name][self.numbers]

    def formats(self) -> dict[str, int]:
        """Rows by format."""
        return self._counts("format", "formats")

    def files(self) -> dict[str, int]:
        """Rows by file."""
        return self._counts("file", "files")

    def _counts(self, column: str, names: str) -> dict[str, int]:
        counts = np.bincount(self.column(column), minlength=len(self.meta[names]))
        return {name: int(count) for name, count in zip(self.meta[names], counts, strict=True) if count}

    def source(self, number: int) -> Source:
        """Where a row stands in the user's files."""
        at = self.numbers[number]
        return Source(self.meta["files"][self._columns["file"][at]], int(self._columns["line"][at]))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Conversation]: ...
    def __getitem__(self, at: int | slice) -> Conversation | list[Conversation]:
        if isinstance(at, slice):
            return list(self._read(self.numbers[at]))
        return next(self._read(self.numbers[[at]]))

    def __iter__(self) -> Iterator[Conversation]:
        return self._read(self.numbers)

    def _read(self, index: NDArray[Any]) -> Iterator[Conversation]:
        with _kept(self.folder), (self.folder / LINES).open("rb") as file:
            for at in index:
                yield self._row(file, int(at))

    def _row(self, file: IO[bytes], at: int) -> Conversation:
        columns = self._columns
        start, end = int(columns["start"][at]), int(columns["start"][at + 1])
        if file.tell() != start:
            file.seek(start)
        messages, tools, *more = json.loads(file.read(end - start))
        rejected, fork, desirable = more or ((), 0, None)
        return Conversation(
            _messages(messages),
            source=Source(self.meta["files"][columns["file"][at]], int(columns["line"][at])),
            format=self.meta["formats"][columns["format"][at]],
            tools=tuple(tools),
            rejected=_messages(rejected),
            fork=fork,
            desirable=desirable,
        )


# ---- samples ----

# of a Sample, kept as they are
FACTS = ("cut_prompt", "cut_answer", "ends_whole", "prompt_length", "needed", "intact", "cut_text", "shared")


def write_samples(folder: Path, made: Iterable[Sequence[Sample]], bad: Mapping[int, DataError] | None = None) -> None:
    """Write the samples of each row, row after row.

    Args:
        folder: empty.
        made: the samples of row 0, of row 1, ...; read once.
        bad: rows that have none because the template cannot write them, and why; looked at when all are made.
    """
    columns = {name: array("i") for name in ("row", "shard", "start", "length", "trained", "weighted", *FACTS)}
    shard: list[Sample] = []
    number = at = 0

    def flush() -> None:
        nonlocal number, at
        tensors = {
            "ids": np.concatenate([s.ids for s in shard] or [np.zeros(0, np.int32)]).astype(np.int32, copy=False),
            "mask": np.concatenate([s.mask for s in shard] or [np.zeros(0, np.bool_)]),
        }
        if any(s.weights is not None for s in shard):
            each = [np.ones(len(s), np.float32) if s.weights is None else s.weights for s in shard]
            tensors["weights"] = np.concatenate(each)
        save_file(tensors, _shard(folder, number))
        shard.clear()
        number, at = number + 1, 0

    for row, samples in enumerate(made):
        for sample in samples:
            facts = (getattr(sample, name) for name in FACTS)
            place = (row, number, at, len(sample), int(sample.mask.sum()), sample.weights is not None, *facts)
            for column, value in zip(columns.values(), place, strict=True):
                column.append(int(value))
            shard.append(sample)
            at += len(sample)
        if at >= SHARD_TOKENS:
            flush()
    flush()
    save_file({name: np.asarray(values) for name, values in columns.items()}, folder / COLUMNS)
    described = {
        row: [e.what, *(str(v) if v else None for v in (e.received, e.expected, e.fix))]
        for row, e in (bad or {}).items()
    }
    (folder / META).write_text(json.dumps({"bad": described}, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Prepared data that somebody removed or damaged while it is used."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"{path}: the prepared data is gone or cannot be read",
            received=reason(error),
            fix="leave the cache alone while a run goes on; --resume prepares the data again and goes on",
        ) from None


def _shard(folder: Path, number: int) -> Path:
    return folder / f"samples-{number:05d}.safetensors"


@lru_cache(maxsize=4096)
def _places(path: Path) -> dict[str, int]:
    """Where each tensor of a safetensors file begins (its format: 8 bytes of length, a JSON header, the data)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


class Samples(Sequence[Sample]):
    """Samples on disk.

    Args:
        folder: what `write_samples` wrote.
        rows: the rows that were encoded; a sample's row is a number of these.
        keep: something that must live as long.
    """

    def __init__(self, folder: Path, rows: Rows, keep: object = None) -> None:
        self.rows, self._keep = rows, [keep]
        self._columns: dict[str, NDArray[np.int32]] = load_file(folder / COLUMNS)
        self._shards = [_shard(folder, n) for n in range(int(self._columns["shard"].max(initial=-1)) + 1)]
        described = json.loads((folder / META).read_text(encoding="utf-8"))["bad"]
        # rows that the template cannot write, and why
        self.bad = {
            int(row): DataError(what, received=received, expected=expected, fix=fix)
            for row, (what, received, expected, fix) in described.items()
        }

    def view(self, index: NDArray[Any] | slice) -> Samples:
        """These of the samples, in this order; a number may come several times."""
        other = object.__new__(Samples)
        other.__dict__.update(self.__dict__)
        other._columns = {name: column[index] for name, column in self._columns.items()}
        return other

    def without(self, gone: NDArray[Any]) -> Samples:
        """Without the samples of some rows."""
        return self.view(~np.isin(self.column("row"), gone))

    def joined(self, other: Samples, of: NDArray[np.generic]) -> Samples:
        """With samples from elsewhere, all in the order of the rows; row n of `other` is row of[n] here."""
        theirs = {
            **other._columns,
            "row": of[other.column("row")].astype(np.int32),
            "shard": other.column("shard") + len(self._shards),
        }
        order = np.argsort(np.concatenate([self.column("row"), theirs["row"]]), kind="stable")
        both = object.__new__(Samples)
        both.rows, both._keep = self.rows, [*self._keep, *other._keep]
        both._columns = {name: np.concatenate([self._columns[name], theirs[name]])[order] for name in theirs}
        both._shards = [*self._shards, *other._shards]
        return both

    def column(self, name: str) -> NDArray[np.int32]:
        """row, length, trained, weighted, or one of FACTS, of each sample."""
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._columns["row"])

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return list(self._through(range(*at.indices(len(self)))))
        path = self._shards[self._columns["shard"][at]]
        start, length = int(self._columns["start"][at]), int(self._columns["length"][at])
        with _kept(path):
            ids = np.fromfile(path, np.int32, length, offset=_places(path)["ids"] + 4 * start)
            mask = np.fromfile(path, np.bool_, length, offset=_places(path)["mask"] + start)
        return self._sample(at, ids, mask)

    def __iter__(self) -> Iterator[Sample]:
        return self._through(range(len(self)))

    def _through(self, numbers: Iterable[int]) -> Iterator[Sample]:
        """Many samples, each shard read at once."""
        for at, ids, mask in self.pieces(numbers):
            yield self._sample(at, ids, mask)

    def pieces(self, numbers: Iterable[int]) -> Iterator[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]:
        """Number, ids and mask of many samples."""
        held: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()  # rows that were cut lie in shards of their own
        starts, lengths, shards = (self._columns[name].tolist() for name in ("start", "length", "shard"))
        for at in numbers:
            shard = shards[at]
            if shard not in held:
                with _kept(self._shards[shard]):
                    held[shard] = load_file(self._shards[shard])
                if len(held) > OPEN_SHARDS:
                    held.popitem(last=False)
            held.move_to_end(shard)
            piece = slice(starts[at], starts[at] + lengths[at])
            yield at, held[shard]["ids"][piece].copy(), held[shard]["mask"][piece].copy()  # a view would keep it all

    def _sample(self, at: int, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> Sample:
        facts = {name: int(self._columns[name][at]) for name in FACTS}
        whole = bool(facts.pop("ends_whole"))
        weights = self._weights(at) if self._columns["weighted"][at] else None
        source = self.rows.source(int(self._columns["row"][at]))
        return Sample(ids, mask, source=source, weights=weights, ends_whole=whole, **facts)

    def _weights(self, at: int) -> NDArray[np.float32]:
        path = self._shards[self._columns["shard"][at]]
        start, length = int(self._columns["start"][at]), int(self._columns["length"][at])
        return np.fromfile(path, np.float32, length, offset=_places(path)["weights"] + 4 * start)


def lengths_of(samples: Units) -> NDArray[np.int32]:
    """The lengths of samples, or of pairs of them, wherever they are."""
    if isinstance(samples, Pairs):
        return samples.lengths(lengths_of(samples.samples))
    return samples.column("length") if isinstance(samples, Samples) else np.array([len(s) for s in samples], np.int32)


def trained_of(samples: Sequence[Sample]) -> NDArray[np.int32]:
    """Of each sample how many tokens are trained."""
    if isinstance(samples, Samples):
        return samples.column("trained")
    return np.array([int(s.mask.sum()) for s in samples], np.int32)


def ends_whole(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Of each sample: was its last answer not cut?"""
    if isinstance(samples, Samples):
        return samples.column("ends_whole").astype(np.bool_)
    return np.array([s.ends_whole for s in samples], np.bool_)


def cut_answers(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """Of each sample: did its answers lose tokens?"""
    if isinstance(samples, Samples):
        return samples.column("cut_answer") > 0
    return np.array([s.cut_answer > 0 for s in samples], np.bool_)


@dataclass(frozen=True)
class Block:
    """Some samples side by side. ids, mask: (T,). starts: (S,), where each begins; ends: (S,), where it ends."""

    first: int  # the number of the first sample
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]


def blocks(samples: Sequence[Sample]) -> Iterator[Block]:
    """All samples in order, many at a time, for rules that look at each of them."""
    numbers = range(len(samples))
    pieces = (
        samples.pieces(numbers)
        if isinstance(samples, Samples)
        else ((n, samples[n].ids, samples[n].mask) for n in numbers)
    )
    while block := list(islice(pieces, BLOCK)):
        ends = np.cumsum([len(ids) for _, ids, _ in block])
        ids, mask = np.concatenate([ids for _, ids, _ in block]), np.concatenate([mask for _, _, mask in block])
        yield Block(block[0][0], ids, mask, np.concatenate([[0], ends[:-1]]), ends)


def in_pairs(samples: Sequence[Sample], wanted: Wanted) -> Units:
    """The rows that a run trains: samples, or pairs of them.

    Args:
        samples: of pairs both, one after the other.
        wanted: what the objective needs of a row.
    """
    if wanted == "answers":
        return samples
    if wanted == "pairs":
        return Pairs(samples, common=common(*(_facts(samples, name) for name in ("shared", "prompt_length"))))
    if isinstance(samples, Samples):
        return Pairs(samples, desirable=samples.rows.column("desirable")[samples.column("row")[::2]])
    return Pairs(samples, desirable=np.ones(len(samples) // 2, np.bool_))  # made up


def _facts(samples: Sequence[Sample], name: str) -> NDArray[np.int32]:
    if isinstance(samples, Samples):
        return samples.column(name)
    return np.array([getattr(sample, name) for sample in samples], np.int32)


def documents_of(units: Units) -> Sequence[Sample]:
    """The samples of rows: of pairs both."""
    return units.samples if isinstance(units, Pairs) else cast(Sequence[Sample], units)
