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
from fitune.records import SPAN, Conversation, Message, Role, Source, ToolCall

Row = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # roles whose text is a call as JSON
TURN = "[{role, content}, ...]"
TURN_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call"}
TURN_IDS = {"name", "id", "tool_call_id"}  # tie results to calls; templates go by the order
SLOT = re.compile(r"\{\{(\w+)\}\}")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can write it, UTF-8 cannot


class _FieldError(Exception):
    """A field of a row is wrong; `to_conversation` adds file and line."""

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


def _answer(row: Row, field: str, prompt: str = "") -> Message:
    """The answer; a list of texts is one for each gap in the prompt."""
    if isinstance(row.get(field), list):
        return Message("assistant", SPAN.join(_spans(row[field], field, prompt)))
    text = _text(row, field)
    if not text.strip():
        raise _FieldError(field, "the answer is empty", received=shorten(text), expected="some text to train on")
    return Message("assistant", text)


def _spans(values: list[Any], field: str, prompt: str) -> list[str]:
    expected = f"a text, or one for each {SPAN} in the prompt"
    texts = all(isinstance(value, str) and value.strip() and SPAN not in value for value in values)
    if not values or not texts or SPAN not in prompt:
        raise _FieldError(field, "not a text", received=shorten(values), expected=expected)
    if prompt.count(SPAN) != len(values):
        told = f"{len(values)} texts, {prompt.count(SPAN)} {SPAN} in the prompt"
        raise _FieldError(field, "as many answers as gaps are needed", received=told, expected=expected)
    return values


def _parsed(value: object, where: str, expected: str) -> Any:
    """The value of JSON text (as CSV cells and many data sets hold it); other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise _FieldError(where, "not JSON", received=shorten(value), expected=expected) from None


def _list(value: object, where: str, expected: str) -> list[Any]:
    """A list, or the JSON text of one; nothing is an empty one."""
    value = [] if value is None or value == "" else _parsed(value, where, expected)
    if not isinstance(value, list):
        raise _FieldError(where, "not a list", received=shorten(value), expected=expected)
    return value


def _alpaca(row: Row) -> list[Message]:
    messages = []
    for n, pair in enumerate(_list(row.get("history"), "history", "[[question, answer], ...]")):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise _FieldError(f"history[{n}]", "not a pair", received=shorten(pair), expected="[question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = _instruction(row)
    return [*messages, asked, _answer(row, "output", f"{asked.content}\n{asked.context}")]


def _instruction(row: Row) -> Message:
    return Message("user", _text(row, "instruction"), context=_text(row, "input", required=False))


def _prompt_completion(row: Row) -> list[Message]:
    asked = _prompt(row, "prompt")
    return [*asked, *_completion(row, "completion", asked[-1].content)]


def _context_target(row: Row) -> list[Message]:
    asked = _text(row, "context")
    return [Message("user", asked), _answer(row, "target", asked)]


def _plain_text(row: Row) -> list[Message]:
    """Text without a prompt is one answer: all of it is trained.

    Its template is to be `plain`, which adds nothing but the stop token. An answer is the only thing that a
    Conversation trains, so this needs no second kind of record: length, mask and report come as for any other row.
    """
    return [_answer(row, "text")]


def _messages(row: Row) -> list[Message]:
    return _ending_in_answer(_turns(row["messages"], "messages"), "messages")


def _sharegpt(row: Row) -> list[Message]:
    return _ending_in_answer(_turns(row["conversations"], "conversations"), "conversations")


def _preference(row: Row) -> list[Message]:
    """The prompt with the answer that was chosen; `rejected` is a column that is not used."""
    answer = _completion(row, "chosen")
    if answer[0].role != "assistant":  # the whole conversation stands in `chosen`
        return answer
    for field in ("conversations", "messages"):
        if field in row:
            return [*_turns(row[field], field), *answer]
    if "instruction" in row:
        return [_instruction(row), *answer]
    if "prompt" not in row:
        raise _FieldError("prompt", "missing (a row of preference)", received=_names(row), expected=PREFERENCE_PROMPTS)
    return [*_prompt(row, "prompt"), *answer]


PREFERENCE_PROMPTS = "conversations, messages, instruction or prompt beside chosen"


def _prompt(row: Row, field: str) -> list[Message]:
    """A prompt as text, or as turns."""
    return _turns(row[field], field) if isinstance(row.get(field), list) else [Message("user", _text(row, field))]


def _completion(row: Row, field: str, prompt: str = "") -> list[Message]:
    """An answer as text, as a turn, as turns, or as a text for each gap in the prompt."""
    value = row.get(field)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return [_answer(row, field, prompt)]
    if isinstance(value, dict):
        value = [value]
    return _ending_in_answer(_turns(value, field), field) if isinstance(value, list) else [_answer(row, field)]


def _ending_in_answer(messages: list[Message], where: str) -> list[Message]:
    if messages[-1].role != "assistant":
        raise _FieldError(where, "no answer at the end", received=messages[-1].role, expected="assistant")
    return messages


def _turns(value: object, where: str) -> list[Message]:
    """Turns in OpenAI's words (role, content) or in ShareGPT's (from, value)."""
    turns = _list(value, where, TURN)
    if not turns:
        raise _FieldError(where, "no list of turns", received=shorten(value), expected=TURN)
    messages = [_turn(turn, f"{where}[{n}]") for n, turn in enumerate(turns)]
    for n, message in enumerate(messages):
        if message.role == "system" and n > 0:
            raise _FieldError(f"{where}[{n}].role", "a system message after the first turn", received="system")
    return messages


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        raise _FieldError(where, "not a turn", received=shorten(turn), expected="{role, content}")
    role_key, key = "from" if "from" in turn else "role", "value" if "value" in turn else "content"
    name = turn.get(role_key)
    role = name.lower() if isinstance(name, str) else ""
    if role in CALLS:
        calls = _parsed(turn.get(key), f"{where}.{key}", '{"name": ..., "arguments": {...}}')
        return Message("assistant", "", tool_calls=_calls(calls, f"{where}.{key}"))
    if role not in ROLES:
        expected = ", ".join([*ROLES, *CALLS])
        raise _FieldError(f"{where}.{role_key}", "unknown role", received=shorten(name), expected=expected)
    calls = turn.get("tool_calls") or turn.get("function_call")  # the second is OpenAI's older name
    calls = _calls(_parsed(calls, f"{where}.tool_calls", "a list of calls"), f"{where}.tool_calls") if calls else ()
    content = _content(turn.get(key), f"{where}.{key}", required=not calls)
    if ROLES[role] == "assistant" and not calls and not content.strip():
        raise _FieldError(
            f"{where}.{key}", "the answer is empty", received=shorten(content), expected="some text to train on"
        )
    if ROLES[role] != "assistant" and calls:
        raise _FieldError(f"{where}.tool_calls", "only an answer can call", received=role, expected="assistant")
    return Message(ROLES[role], content, tool_calls=calls)


def _content(value: object, where: str, *, required: bool) -> str:
    """A turn's text: a string, or OpenAI's list of parts. An answer that calls may have none."""
    if value is None and not required:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, f"{where}[{n}]") for n, part in enumerate(value))
    if not isinstance(value, str):
        raise _FieldError(where, "not a text", received=shorten(value), expected="a string")
    return value


def _part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _FieldError(where, "not a part with text", received=shorten(part), expected='{"type": "text", "text": ...}')


def _calls(value: object, where: str) -> tuple[ToolCall, ...]:
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        expected = "{name, arguments}, or a list of them"
        raise _FieldError(where, "no list of calls", received=shorten(value), expected=expected)
    return tuple(_call(call, f"{where}[{n}]") for n, call in enumerate(calls))


def _call(call: object, where: str) -> ToolCall:
    """`{name, arguments}`, alone or in OpenAI's frame `{id, type, function: {name, arguments}}`."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise _FieldError(where, "not a call", received=shorten(call), expected="{name, arguments}")
    arguments = inner.get("arguments")
    if arguments is None or arguments == "":
        return ToolCall(inner["name"], "{}")
    parsed = _parsed(arguments, f"{where}.arguments", "a JSON object")
    if not isinstance(parsed, dict):
        raise _FieldError(
            f"{where}.arguments", "not an object", received=shorten(arguments), expected='{"name": value, ...}'
        )
    # text stays as it was written: the model learns it letter by letter
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return ToolCall(inner["name"], text)


def _tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """Function descriptions, each in OpenAI's frame `{type: function, function: {name, description, parameters}}`."""
    tools = []
    for n, tool in enumerate(_list(row.get("tools"), "tools", "a list of function descriptions")):
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            expected = "{name, description, parameters}"
            raise _FieldError(f"tools[{n}]", "not a function description", received=shorten(tool), expected=expected)
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
        raise _FieldError(missing, f"missing (a row of {near.name})", received=_names(row), expected=expected)
    raise _FieldError("", "no known format", received=_names(row), expected=expected)


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
            raise _FieldError("", "not a row", received=shorten(row), expected="an object")
        return _convert(row, source, name, columns)
    except _FieldError as error:
        # the user knows his own column's name, not the one it stands for
        own = {field: column for column, field in columns.items()}
        root = re.split(r"[.\[]", error.field)[0]
        field = own.get(root, root) + error.field[len(root) :]
        fix = None if error.field or not isinstance(row, dict) else "say what your columns are: --map COLUMN=prompt ..."
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
    system = _text(row, "system", required=False) if "system" in fmt.uses else ""
    if system and messages[0].role == "system":
        raise _FieldError("system", "a second system message", received=shorten(system), expected="one")
    if system:
        messages = [Message("system", system), *messages]
    tools = _tools(row) if "tools" in fmt.uses else ()
    for text in (*_texts(messages), json.dumps(tools, ensure_ascii=False, default=str) if tools else ""):
        if half := SURROGATE.search(text):
            raise _FieldError("", "half a character (a lone surrogate)", received=shorten(half[0]), expected="text")
    return Conversation(tuple(messages), source=source, format=fmt.name, tools=tools)


def _texts(messages: Iterable[Message]) -> list[str]:
    return [
        text
        for message in messages
        for text in (
            message.content,
            message.context,
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
        replace(message, content=filled(message.content), context=filled(message.context))
        for message in conversation.messages
    )
    return replace(conversation, messages=messages)


def slots(conversation: Conversation) -> set[str]:
    """The names of the slots `{{name}}` that stand in a conversation's texts."""
    texts = [text for message in conversation.messages for text in (message.content, message.context)]
    return {slot for text in texts if "{{" in text for slot in SLOT.findall(text)}
