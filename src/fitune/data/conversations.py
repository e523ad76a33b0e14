"""One row as a conversation: its columns renamed, its format found, its flags and tools read, its slots filled.

In: a parsed row and where it stands. Out: a Conversation, or a DataError that names file, line and field; what of the
row was not used, and how the rest was understood.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fitune.core.errors import DataError, shorten
from fitune.core.options import Wanted
from fitune.core.records import Conversation, Message, Source
from fitune.data import preferences
from fitune.data.columns import IGNORE, REJECTED, refuse, sizes, taken, used, weighted
from fitune.data.fields import FieldError, Row, missing, text_of
from fitune.data.formats import (
    NAMES,
    SYSTEMS,
    TURNS,
    UNKNOWN,
    Format,
    by_known_names,
    described,
    find,
    tools_of,
    understood,
    what_they_are,
)
from fitune.data.turns import LEAVE_OUT, ONE_SYSTEM, thought_of, turns_of, unused_keys

SLOT = re.compile(r"\{\{(\w+)\}\}")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can write it, UTF-8 cannot


def framed(row: object) -> Any:
    """A row, which may be a conversation without a frame: a list of turns."""
    turns = isinstance(row, list) and bool(row) and isinstance(row[0], (str, list, dict))
    return {"messages": row} if turns else row


def to_conversation(
    row: object,
    source: Source,
    *,
    name: str = "auto",
    columns: Mapping[str, str] | None = None,
    wanted: Wanted = "answers",
) -> Conversation:
    """One parsed row as a conversation.

    Args:
        row: a JSON value; anything but an object is refused.
        source: where it stands.
        name: a format of FORMATS, or auto.
        columns: what columns of other names mean: {"content": "prompt", "summary": "completion"}.
        wanted: answers; pairs, a chosen and a rejected one; or labels, answers marked as good or bad, for which a pair
            is taken too.

    Raises:
        DataError: the row is of no known format, a field of it is wrong, or it is not what is wanted.
    """
    columns = columns or {}
    try:
        row = framed(row)
        if not isinstance(row, dict):
            raise FieldError("", "not a row", received=shorten(row), expected="an object")
        columns = understood(row, name, columns)
        return _convert(row, source, name, columns, wanted)
    except FieldError as error:
        # the user knows his own column's name, not the one it stands for
        own = {field: column for column, field in columns.items()}
        root = re.split(r"[.\[]", error.field)[0]
        field = own.get(root, root) + error.field[len(root) :]
        fix = error.fix
        if error.what == UNKNOWN and isinstance(row, dict):
            fix = fix or what_they_are(sizes(row))
        raise DataError(
            error.what,
            file=source.file,
            line=source.line,
            field=field or None,
            received=error.received,
            expected=error.expected,
            fix=fix,
        ) from None
    except RecursionError:
        raise DataError("nested too deeply", file=source.file, line=source.line) from None


def asked_of(turns: Sequence[Mapping[str, Any]], tools: Sequence[object] = ()) -> Conversation:
    """Messages that are to be answered, as OpenAI's API has them, as a conversation.

    Args:
        turns: {role, content, ...}; the last one need not be an answer.
        tools: function descriptions.

    Raises:
        FieldError: a turn or a tool is wrong.
    """
    try:
        messages, known = turns_of(list(turns), "messages"), described(list(tools), "tools")
    except RecursionError:
        raise FieldError("messages", "nested too deeply") from None
    _refuse_half([*_texts(messages), json.dumps(known, ensure_ascii=False, default=str)])
    return Conversation(tuple(messages), tools=known)


def _refuse_half(texts: Iterable[str]) -> None:
    for text in texts:
        if half := SURROGATE.search(text):
            raise FieldError(
                "",
                "half a character (a lone surrogate)",
                received=shorten(half[0]),
                expected="text",
                fix=f"write the whole character, or {LEAVE_OUT}",
            )


def _convert(row: Row, source: Source, name: str, columns: Mapping[str, str], wanted: Wanted) -> Conversation:
    row, mapped = by_known_names(row, columns)
    fmt = find(row, name, mapped)
    refuse(row, marked=wanted == "labels")
    messages = _whole(fmt.convert(row), row, fmt)
    tools = tools_of(row, fmt) if "tools" in fmt.uses else ()
    found = Conversation(tuple(messages), source=source, format=fmt.name, tools=tools)
    if wanted != "answers":
        found = _preferred(found, row, fmt, wanted)
    all_texts = _texts(preferences.texts(found))
    _refuse_half([*all_texts, json.dumps(tools, ensure_ascii=False, default=str) if tools else ""])
    return found


def _whole(messages: list[Message], row: Row, fmt: Format) -> list[Message]:
    """A row's messages with its weights, its thought and its system text."""
    messages = _weighted(messages, row, flat=_is_flat(fmt))
    named = next((field for field in SYSTEMS if field in fmt.uses and not missing(row.get(field))), "")
    system = text_of(row, named) if named else ""
    if system and messages[0].role == "system":
        raise FieldError(named, "a second system message", received=shorten(system), expected="one", fix=ONE_SYSTEM)
    return [Message("system", system), *messages] if system else messages


def _preferred(found: Conversation, row: Row, fmt: Format, wanted: Wanted) -> Conversation:
    """The conversation with its rejected answer, or with its label."""
    label = preferences.label_of(row) if wanted == "labels" else None
    if label is not None:
        return replace(found, desirable=label)
    other = preferences.rejected_of(row, fmt)
    if other is None:
        raise preferences.needs_label(row) if wanted == "labels" else preferences.needs_pair(row)
    return preferences.paired(found, _whole(other, row, fmt))


def _is_flat(fmt: Format) -> bool:
    """A prompt and an answer in columns: a column with a thought belongs to the answer."""
    return fmt.name != "text" and not fmt.keys & set(TURNS)


def _weighted(messages: list[Message], row: Row, *, flat: bool) -> list[Message]:
    """The messages with the weight of their row, and the thought that stands in a column of its own."""
    messages = weighted(row, messages)
    if flat and not messages[-1].thought and (thought := thought_of(row)):
        messages = [*messages[:-1], replace(messages[-1], thought=thought)]
    return messages


def _texts(messages: Iterable[Message]) -> list[str]:
    return [
        text
        for message in messages
        for text in (
            message.content,
            message.context,
            message.thought,
            message.call_id,
            message.name,
            *(part for c in message.tool_calls for part in (c.name, c.arguments, c.id)),
        )
    ]


def unused(row: Row, name: str, columns: Mapping[str, str], wanted: Wanted = "answers") -> list[str]:
    """The columns of a row, and the keys of its turns, that its format makes nothing of."""
    columns = understood(row, "auto", columns)
    uses = (
        NAMES[name].uses
        | {IGNORE}
        | (set() if wanted == "answers" else set(REJECTED))
        | set(used(by_known_names(row, columns)[0], flat=_is_flat(NAMES[name])))
    )
    renamed = {column for column, field in columns.items() if field in uses}
    taken = {field for column, field in columns.items() if column in row}
    found = [key for key in row if key not in renamed and (key not in uses or key in taken)]
    turns: list[Any] = next((row[key] for key in TURNS if isinstance(row.get(key), list)), [])
    keys = {key for turn in turns if isinstance(turn, dict) for key in unused_keys(turn)}
    return [*map(str, found), *sorted(f"turn.{key}" for key in keys)]


def notes(row: Row, conversation: Conversation, columns: Mapping[str, str], wanted: Wanted = "answers") -> list[str]:
    """What a user should know of how a row was understood, as notes that are counted."""
    weights = [m.weight for m in conversation.messages if m.role == "assistant"]
    by_name = by_known_names(row, understood(row, "auto", columns))[0]
    found = taken(by_name, flat=_is_flat(NAMES[conversation.format]), marked=wanted == "labels")
    if conversation.format == "preference" and wanted == "answers":
        found = [*found, "of preference: the chosen answer alone is trained, as plain tuning"]
    if not any(weights):
        return [*found, "without an answer of weight above 0: left out"]
    if not all(weights):
        found.append("with answers of weight 0: context only")
    if any(value not in (0, 1) for value in weights):
        found.append("with weights: the loss is divided by their sum")
    return found


def fill(conversation: Conversation, values: Mapping[str, str]) -> Conversation:
    """The conversation with `{{name}}` replaced wherever `values` has the name."""

    def filled(text: str) -> str:
        return SLOT.sub(lambda slot: values.get(slot[1], slot[0]), text) if "{{" in text else text

    messages, rejected = (
        tuple(
            replace(
                message,
                content=filled(message.content),
                context=filled(message.context),
                thought=filled(message.thought),
            )
            for message in some
        )
        for some in (conversation.messages, conversation.rejected)
    )
    return replace(conversation, messages=messages, rejected=rejected)


def slots(conversation: Conversation) -> set[str]:
    """The names of the slots `{{name}}` that stand in a conversation's texts."""
    messages = preferences.texts(conversation)
    texts = [text for message in messages for text in (message.content, message.context, message.thought)]
    return {slot for text in texts if "{{" in text for slot in SLOT.findall(text)}
