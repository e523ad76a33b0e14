"""Rows to conversations.

In: one parsed row. Out: a Conversation. FORMATS is the whole list of formats: a new one is a row of that table. Which
one a row has is found by its keys, or named; columns of other names are renamed first (`map`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fitune.errors import ConfigError, DataError, did_you_mean, shorten
from fitune.fields import FieldError, Row, listed, text_of
from fitune.records import SPAN, Conversation, Message, Source
from fitune.turns import TURN_IDS, TURN_KEYS, ending_in_answer, turns_of

SLOT = re.compile(r"\{\{(\w+)\}\}")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can write it, UTF-8 cannot


def _answer(row: Row, field: str, prompt: str = "") -> Message:
    """The answer; a list of texts is one for each gap in the prompt."""
    if isinstance(row.get(field), list):
        return Message("assistant", SPAN.join(_spans(row[field], field, prompt)))
    text = text_of(row, field)
    if not text.strip():
        raise FieldError(field, "the answer is empty", received=shorten(text), expected="some text to train on")
    return Message("assistant", text)


def _spans(values: list[Any], field: str, prompt: str) -> list[str]:
    expected = f"a text, or one for each {SPAN} in the prompt"
    texts = all(isinstance(value, str) and value.strip() and SPAN not in value for value in values)
    if not values or not texts or SPAN not in prompt:
        raise FieldError(field, "not a text", received=shorten(values), expected=expected)
    if prompt.count(SPAN) != len(values):
        told = f"{len(values)} texts, {prompt.count(SPAN)} {SPAN} in the prompt"
        raise FieldError(field, "as many answers as gaps are needed", received=told, expected=expected)
    return values


def _alpaca(row: Row) -> list[Message]:
    messages = []
    for n, pair in enumerate(listed(row.get("history"), "history", "[[question, answer], ...]")):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise FieldError(f"history[{n}]", "not a pair", received=shorten(pair), expected="[question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = _instruction(row)
    return [*messages, asked, _answer(row, "output", f"{asked.content}\n{asked.context}")]


def _instruction(row: Row) -> Message:
    return Message("user", text_of(row, "instruction"), context=text_of(row, "input", required=False))


def _prompt_completion(row: Row) -> list[Message]:
    asked = _prompt(row, "prompt")
    return [*asked, *_completion(row, "completion", asked[-1].content)]


def _context_target(row: Row) -> list[Message]:
    asked = text_of(row, "context")
    return [Message("user", asked), _answer(row, "target", asked)]


def _plain_text(row: Row) -> list[Message]:
    """Text without a prompt is one answer: all of it is trained.

    Its template is to be `plain`, which adds nothing but the stop token. An answer is the only thing that a
    Conversation trains, so this needs no second kind of record: length, mask and report come as for any other row.
    """
    return [_answer(row, "text")]


def _messages(row: Row) -> list[Message]:
    return ending_in_answer(turns_of(row["messages"], "messages"), "messages")


def _sharegpt(row: Row) -> list[Message]:
    return ending_in_answer(turns_of(row["conversations"], "conversations"), "conversations")


def _preference(row: Row) -> list[Message]:
    """The prompt with the answer that was chosen; `rejected` is a column that is not used."""
    answer = _completion(row, "chosen")
    if answer[0].role != "assistant":  # the whole conversation stands in `chosen`
        return answer
    for field in ("conversations", "messages"):
        if field in row:
            return [*turns_of(row[field], field), *answer]
    if "instruction" in row:
        return [_instruction(row), *answer]
    if "prompt" not in row:
        raise FieldError("prompt", "missing (a row of preference)", received=_names(row), expected=PREFERENCE_PROMPTS)
    return [*_prompt(row, "prompt"), *answer]


PREFERENCE_PROMPTS = "conversations, messages, instruction or prompt beside chosen"


def _prompt(row: Row, field: str) -> list[Message]:
    """A prompt as text, or as turns."""
    return turns_of(row[field], field) if isinstance(row.get(field), list) else [Message("user", text_of(row, field))]


def _completion(row: Row, field: str, prompt: str = "") -> list[Message]:
    """An answer as text, as a turn, as turns, or as a text for each gap in the prompt."""
    value = row.get(field)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return [_answer(row, field, prompt)]
    if isinstance(value, dict):
        value = [value]
    return ending_in_answer(turns_of(value, field), field) if isinstance(value, list) else [_answer(row, field)]


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """Function descriptions, each in OpenAI's frame `{type: function, function: {name, description, parameters}}`."""
    tools = []
    for n, tool in enumerate(listed(row.get("tools"), "tools", "a list of function descriptions")):
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            expected = "{name, description, parameters}"
            raise FieldError(f"tools[{n}]", "not a function description", received=shorten(tool), expected=expected)
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


@dataclass(frozen=True)
class Format:
    """A row format: the keys that show it, the keys it can use, and how a row becomes messages."""

    name: str
    keys: frozenset[str]
    uses: frozenset[str]
    convert: Callable[[Row], list[Message]]


def _format(name: str, keys: str, more: str, convert: Callable[[Row], list[Message]]) -> Format:
    return Format(name, frozenset(keys.split()), frozenset([*keys.split(), *more.split()]), convert)


# The first whose keys a row has is taken, so a format with more to say stands before one with less.
FORMATS = (
    _format("preference", "chosen", "conversations messages prompt instruction input system tools", _preference),
    _format("messages", "messages", "system tools", _messages),
    _format("sharegpt", "conversations", "system tools", _sharegpt),
    _format("alpaca", "instruction output", "input system history", _alpaca),
    _format("prompt/completion", "prompt completion", "system tools", _prompt_completion),
    _format("context/target", "context target", "system", _context_target),
    _format("text", "text", "", _plain_text),
)
NAMES = {fmt.name: fmt for fmt in FORMATS}


def check(name: str, columns: Mapping[str, str]) -> None:
    """Refuse a format or a column map that no row could have.

    Raises:
        ConfigError: an unknown format or field, or two columns for one field.
    """
    if name != "auto" and name not in NAMES:
        raise ConfigError(f"unknown format {name!r}", fix=did_you_mean(name, ["auto", *NAMES]))
    known = NAMES[name].uses if name != "auto" else frozenset().union(*(fmt.uses for fmt in FORMATS))
    fields = list(columns.values())
    for column, field in columns.items():
        if field not in known:
            raise ConfigError(f"map: unknown field {field!r} (for column {column!r})", fix=did_you_mean(field, known))
        if fields.count(field) > 1:
            raise ConfigError(f"map: two columns for the field {field!r}", received=columns, expected="one column each")


def _names(row: Row) -> str:
    return f"the columns {', '.join(map(str, row))}" if row else "no columns"


def _find(row: Row, name: str, mapped: set[str]) -> Format:
    """The format of a row; where columns were mapped, one that uses them all."""
    known = [NAMES[name]] if name != "auto" else [fmt for fmt in FORMATS if mapped <= fmt.uses] or list(FORMATS)
    full = {key for key, value in row.items() if value is not None}
    for keys in (full, row.keys()):  # a column of nulls shows a format only where nothing else does
        for fmt in known:
            if fmt.keys <= keys:
                return fmt
    near = max(known, key=lambda fmt: len(fmt.keys & row.keys()))
    expected = "; ".join(f"{fmt.name}: {', '.join(sorted(fmt.keys))}" for fmt in known)
    if near.keys & row.keys() or name != "auto":
        missing = sorted(near.keys - row.keys())[0]
        raise FieldError(missing, f"missing (a row of {near.name})", received=_names(row), expected=expected)
    raise FieldError("", "no known format", received=_names(row), expected=expected)


def _renamed(row: Row, columns: Mapping[str, str]) -> tuple[Row, set[str]]:
    """The row under the names that formats know, and which of these were mapped."""
    present = {column: field for column, field in columns.items() if column in row}
    fields = set(present.values())
    rest = {key: value for key, value in row.items() if key not in present and key not in fields}
    return rest | {field: row[column] for column, field in present.items()}, fields


def to_conversation(
    row: object, source: Source, *, name: str = "auto", columns: Mapping[str, str] | None = None
) -> Conversation:
    """One parsed row as a conversation.

    Args:
        row: a JSON value; anything but an object is refused.
        source: where it stands.
        name: a format of FORMATS, or auto.
        columns: what columns of other names mean: {"content": "prompt", "summary": "completion"}.

    Raises:
        DataError: the row is of no known format, or a field of it is wrong.
    """
    columns = columns or {}
    try:
        if not isinstance(row, dict):
            raise FieldError("", "not a row", received=shorten(row), expected="an object")
        return _convert(row, source, name, columns)
    except FieldError as error:
        # the user knows his own column's name, not the one it stands for
        own = {field: column for column, field in columns.items()}
        root = re.split(r"[.\[]", error.field)[0]
        field = own.get(root, root) + error.field[len(root) :]
        fix = error.fix
        if not error.field and isinstance(row, dict):
            fix = fix or "say what your columns are: --map COLUMN=prompt ..."
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


def _convert(row: Row, source: Source, name: str, columns: Mapping[str, str]) -> Conversation:
    row, mapped = _renamed(row, columns)
    fmt = _find(row, name, mapped)
    messages = fmt.convert(row)
    system = text_of(row, "system", required=False) if "system" in fmt.uses else ""
    if system and messages[0].role == "system":
        raise FieldError("system", "a second system message", received=shorten(system), expected="one")
    if system:
        messages = [Message("system", system), *messages]
    tools = _tools(row) if "tools" in fmt.uses else ()
    for text in (*_texts(messages), json.dumps(tools, ensure_ascii=False, default=str) if tools else ""):
        if half := SURROGATE.search(text):
            raise FieldError("", "half a character (a lone surrogate)", received=shorten(half[0]), expected="text")
    return Conversation(tuple(messages), source=source, format=fmt.name, tools=tools)


def _texts(messages: Iterable[Message]) -> list[str]:
    return [
        text
        for message in messages
        for text in (
            message.content,
            message.context,
            message.thought,
            *(part for c in message.tool_calls for part in (c.name, c.arguments)),
        )
    ]


def unused(row: Row, name: str, columns: Mapping[str, str]) -> list[str]:
    """The columns of a row, and the keys of its turns, that its format makes nothing of."""
    uses = NAMES[name].uses
    renamed = {column for column, field in columns.items() if field in uses}
    taken = {field for column, field in columns.items() if column in row}
    found = [key for key in row if key not in renamed and (key not in uses or key in taken)]
    turns: list[Any] = next((row[key] for key in ("messages", "conversations") if isinstance(row.get(key), list)), [])
    keys = {key for turn in turns if isinstance(turn, dict) for key in turn} - TURN_KEYS - TURN_IDS
    return [*map(str, found), *sorted(f"turn.{key}" for key in keys)]


def fill(conversation: Conversation, values: Mapping[str, str]) -> Conversation:
    """The conversation with `{{name}}` replaced wherever `values` has the name."""

    def filled(text: str) -> str:
        return SLOT.sub(lambda slot: values.get(slot[1], slot[0]), text) if "{{" in text else text

    messages = tuple(
        replace(
            message,
            content=filled(message.content),
            context=filled(message.context),
            thought=filled(message.thought),
        )
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)


def slots(conversation: Conversation) -> set[str]:
    """The names of the slots `{{name}}` that stand in a conversation's texts."""
    texts = [text for message in conversation.messages for text in (message.content, message.context, message.thought)]
    return {slot for text in texts if "{{" in text for slot in SLOT.findall(text)}
