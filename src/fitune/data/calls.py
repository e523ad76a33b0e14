"""Calls of tools in a turn: `{name, arguments}`, alone, in a list, or in OpenAI's frame.

In: a value of a turn. Out: ToolCalls, whose arguments are the text of a JSON object; FieldError for anything else.
"""

from __future__ import annotations

import json

from fitune.core.errors import shorten
from fitune.core.records import ToolCall
from fitune.data.fields import FieldError, Turn, parsed

ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")  # of a call; input is Anthropic's
CALL_KEYS = {"name", "id", "type", "index", "function", "call_id", "tool_call_id", "cache_control", *ARGUMENTS}


def calls_of(value: object, where: str) -> tuple[ToolCall, ...]:
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list) or not calls:
        expected = "{name, arguments}, or a list of them"
        raise FieldError(where, "no list of calls", received=shorten(value), expected=expected)
    return tuple(call_of(call, f"{where}[{n}]") for n, call in enumerate(calls))


def call_of(call: object, where: str) -> ToolCall:
    """`{name, arguments}`, alone or in OpenAI's frame `{id, type, function: {name, arguments}}`."""
    inner = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise FieldError(where, "not a call", received=shorten(call), expected="{name, arguments}")
    holder = inner if inner.keys() & set(ARGUMENTS) or not isinstance(call, dict) else call
    given = [key for key in ARGUMENTS if key in holder]
    arguments = next((holder[key] for key in given if holder[key] not in (None, "", {})), None)
    unknown = sorted(str(key) for key in inner.keys() - CALL_KEYS)
    if not given and unknown:
        raise FieldError(
            where,
            "a call whose arguments are not found",
            received=", ".join(unknown),
            expected='{"name": ..., "arguments": {...}}',
            fix="name them arguments",
        )
    own = name_of(call, "id") if isinstance(call, dict) else ""
    if arguments is None or arguments == "":
        return ToolCall(inner["name"], "{}", own)
    values = parsed(arguments, f"{where}.arguments", "a JSON object")
    if not isinstance(values, dict):
        raise FieldError(
            f"{where}.arguments", "not an object", received=shorten(arguments), expected='{"name": value, ...}'
        )
    # text stays as it was written: the model learns it letter by letter
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
    return ToolCall(inner["name"], text, own)


def name_of(values: Turn, key: str) -> str:
    """A name or an id; "" where there is none."""
    value = values.get(key)
    return value if isinstance(value, str) else ""
