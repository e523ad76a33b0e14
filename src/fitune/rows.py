"""Files to conversations.

In: JSON or JSONL files. Out: one Conversation per row, each knowing its file and line. Formats are found by looking at
the keys of a row; FORMATS is the whole list, a new one is a row of that table. Nothing is dropped silently: a bad row
is an error with file:line:field, columns that no format uses are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fitune.errors import Collector, DataError, shorten
from fitune.records import Conversation, DataReport, Message, Role, Source

Row = Mapping[str, Any]

MOST_PROBLEMS = 20  # bad rows told in one message; the rest are counted


class _FieldError(Exception):
    """A field of a row is wrong; the reader adds file and line."""

    def __init__(self, field: str, what: str, received: object = None, expected: object = None) -> None:
        self.field, self.what, self.received, self.expected = field, what, received, expected
        super().__init__(what)


def _text(row: Row, field: str, *, required: bool = True) -> str:
    value = row.get(field)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise _FieldError(field, "not a text", received=shorten(value), expected="a string")
    return value


def _answer(row: Row, field: str) -> str:
    text = _text(row, field)
    if not text.strip():
        raise _FieldError(field, "the answer is empty", received=shorten(text), expected="some text to train on")
    return text


def _alpaca(row: Row) -> list[Message]:
    messages = [Message("system", system)] if (system := _text(row, "system", required=False)) else []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise _FieldError("history", "not a list", received=shorten(history), expected="[[question, answer], ...]")
    for n, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _FieldError(f"history[{n}]", "not a pair", received=shorten(pair), expected="[question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages.append(Message("user", _text(row, "instruction"), context=_text(row, "input", required=False)))
    messages.append(Message("assistant", _answer(row, "output")))
    return messages


def _prompt_completion(row: Row) -> list[Message]:
    return [Message("user", _text(row, "prompt")), Message("assistant", _answer(row, "completion"))]


def _messages(row: Row) -> list[Message]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise _FieldError("messages", "no list of turns", received=shorten(turns), expected="[{role, content}, ...]")
    messages = []
    for n, turn in enumerate(turns):
        where = f"messages[{n}]"
        if not isinstance(turn, dict):
            raise _FieldError(where, "not a turn", received=shorten(turn), expected="{role, content}")
        if turn.get("role") not in get_args(Role):
            expected = ", ".join(get_args(Role))
            raise _FieldError(f"{where}.role", "unknown role", received=shorten(turn.get("role")), expected=expected)
        content = turn.get("content")
        if not isinstance(content, str):
            raise _FieldError(f"{where}.content", "not a text", received=shorten(content), expected="a string")
        messages.append(Message(turn["role"], content))
    _check_turns(messages)
    return messages


def _check_turns(messages: list[Message]) -> None:
    """A system message comes first, an answer comes last and is not empty."""
    for n, message in enumerate(messages):
        if message.role == "system" and n > 0:
            raise _FieldError(f"messages[{n}].role", "a system message after the first turn", received="system")
        if message.role == "assistant" and not message.content.strip():
            raise _FieldError(f"messages[{n}].content", "the answer is empty", expected="some text to train on")
    if messages[-1].role != "assistant":
        raise _FieldError("messages", "no answer at the end", received=messages[-1].role, expected="assistant")


@dataclass(frozen=True)
class Format:
    """A row format: the keys that show it, the keys it can use, and how a row becomes messages."""

    name: str
    keys: frozenset[str]
    uses: frozenset[str]
    convert: Callable[[Row], list[Message]]


FORMATS = (
    Format("messages", frozenset({"messages"}), frozenset({"messages"}), _messages),
    Format(
        "alpaca",
        frozenset({"instruction", "output"}),
        frozenset({"instruction", "input", "output", "system", "history"}),
        _alpaca,
    ),
    Format(
        "prompt/completion",
        frozenset({"prompt", "completion"}),
        frozenset({"prompt", "completion"}),
        _prompt_completion,
    ),
)


def _find_format(row: Row) -> Format:
    for fmt in FORMATS:
        if fmt.keys <= row.keys():
            return fmt
    near = max(FORMATS, key=lambda fmt: len(fmt.keys & row.keys()))
    missing = sorted(near.keys - row.keys())
    known = "; ".join(f"{fmt.name}: {', '.join(sorted(fmt.keys))}" for fmt in FORMATS)
    if near.keys & row.keys():
        raise _FieldError(missing[0], f"missing (a row of {near.name})", received=sorted(row), expected=known)
    raise _FieldError("", "no known format", received=sorted(row), expected=known)


def to_conversation(row: object, source: Source) -> Conversation:
    """One parsed row as a conversation.

    Raises:
        DataError: the row is of no known format, or a field of it is wrong.
    """
    if not isinstance(row, dict):
        raise DataError("not a row", file=source.file, line=source.line, received=shorten(row), expected="an object")
    try:
        fmt = _find_format(row)
        return Conversation(tuple(fmt.convert(row)), source=source, format=fmt.name)
    except _FieldError as error:
        raise DataError(
            error.what,
            file=source.file,
            line=source.line,
            field=error.field or None,
            received=error.received,
            expected=error.expected,
        ) from None


def _parse_lines(text: str, file: str) -> Iterator[tuple[object, Source] | DataError]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), Source(file, number)
            except ValueError as error:
                what = f"not JSON ({error.args[0].split(':')[0].lower()})"
                yield DataError(
                    what, file=file, line=number, received=shorten(line.strip()), expected="one object a line"
                )


def _parse_array(text: str, file: str) -> Iterator[tuple[object, Source] | DataError]:
    """The elements of a JSON list, each with the line it starts on."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line, counted = 1, 0

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        return at

    while (at := skip(at)) < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:
            bad = getattr(error, "lineno", line)
            yield DataError(
                f"broken JSON ({error.args[0].split(':')[0].lower()})",
                file=file,
                line=bad,
                received=shorten(text[at : at + 60]),
                expected="a list of objects, separated by commas",
                fix="nothing after this place can be read; mend the file there",
            )
            return
        yield row, Source(file, line)
    if at >= len(text):
        yield DataError(
            "the list is not closed: the file is cut off", file=file, line=text.count("\n") + 1, expected="]"
        )


def read_rows(path: Path) -> Iterator[tuple[object, Source] | DataError]:
    """The rows of a file, in order; what cannot be parsed comes as a DataError in its place.

    Raises:
        DataError: the file cannot be read at all.
    """
    if not path.exists():
        raise DataError("no such file", file=path, fix="check the path given to --data")
    if path.is_dir():
        raise DataError("is a folder", file=path, expected="a .json or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            "not UTF-8", file=path, received=f"byte {error.object[error.start]:#04x} at {error.start}", expected="UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", file=path) from None
    if not text.strip():
        raise DataError("the file is empty", file=path, expected="rows to train on")
    is_array = text.lstrip().startswith("[")
    yield from (_parse_array if is_array else _parse_lines)(text, str(path))


def load(paths: list[str], report: DataReport) -> list[Conversation]:
    """All rows of all files, in the files' order. Counts formats and unused columns in `report`.

    Raises:
        DataError, Problems: every bad file and row (at most MOST_PROBLEMS, the rest counted).
    """
    problems, bad = Collector(), 0
    conversations: list[Conversation] = []
    for path in paths:
        before = len(conversations) + bad
        with problems.gather():
            for item in read_rows(Path(path)):
                try:
                    if isinstance(item, DataError):
                        raise item
                    row, source = item
                    conversation = to_conversation(row, source)
                    conversations.append(conversation)
                    _count(conversation, row, report)
                except DataError as error:
                    bad += 1
                    if bad <= MOST_PROBLEMS:
                        problems.problems.append(error)
            if len(conversations) + bad == before:
                raise DataError("no rows", file=path, received="an empty list", expected="rows to train on")
    if bad > MOST_PROBLEMS:
        problems.problems.append(DataError(f"and {bad - MOST_PROBLEMS} more bad rows"))
    problems.raise_any()
    return conversations


def _count(conversation: Conversation, row: object, report: DataReport) -> None:
    report.rows += 1
    report.formats[conversation.format] = report.formats.get(conversation.format, 0) + 1
    uses = next(fmt.uses for fmt in FORMATS if fmt.name == conversation.format)
    for column in row if isinstance(row, dict) else ():
        if column not in uses:
            report.unused_columns[column] = report.unused_columns.get(column, 0) + 1
