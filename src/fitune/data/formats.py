"""Rows to conversations.

In: one parsed row. Out: a Conversation. FORMATS is the whole list of formats: a new one is a row of that table. Which
one a row has is found by its keys, or named; columns of other names are renamed first (`map`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fitune.core.errors import ConfigError, did_you_mean, shorten
from fitune.core.records import SPAN, Message
from fitune.data.columns import FIELDS, IGNORE, propose, sizes
from fitune.data.fields import FieldError, Row, Turn, listed, missing, text_of
from fitune.data.turns import (
    LEAVE_OUT,
    PAIRS,
    ROLE_KEYS,
    ending_in_answer,
    speaker,
    turns_of,
)

TOOLS = ("tools", "functions")  # the second is OpenAI's older name
SYSTEMS, HISTORIES = ("system", "system_prompt", "系统"), ("history", "历史")
SHORT = (
    "messages; conversations; instruction, output; prompt, completion; query, response; question, answer; text; "
    "or another format of docs/data.md"
)
UNKNOWN = "no known format"


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
        counts = f"{len(values)} texts, {prompt.count(SPAN)} {SPAN} in the prompt"
        raise FieldError(field, "as many answers as gaps are needed", received=counts, expected=expected)
    return values


def _history(row: Row) -> list[Message]:
    """Earlier exchanges, as pairs or as turns."""
    name = next((name for name in HISTORIES if name in row), HISTORIES[0])
    pairs = listed(row.get(name), name, "[[question, answer], ...]")
    if pairs and isinstance(pairs[0], dict):
        return turns_of(pairs, name)
    messages = []
    for n, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise FieldError(f"{name}[{n}]", "not a pair", received=shorten(pair), expected="[question, answer]")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def _asked_and_said(prompt: str, answer: str, context: str = "") -> Callable[[Row], list[Message]]:
    """How rows with a column for the prompt and one for the answer are read, perhaps with one for its context."""

    def convert(row: Row) -> list[Message]:
        asked = [*_history(row), *_prompt(row, prompt, context)]
        whole = f"{asked[-1].content}\n{asked[-1].context}"
        if not whole.strip() and len(asked) == 1:
            raise FieldError(
                prompt,
                "the prompt is empty",
                received=shorten(row.get(prompt)),
                expected="a question or an instruction",
                fix=f"{LEAVE_OUT}; text without prompts: --map {answer}=text",
            )
        return [*asked, *completion(row, answer, whole)]

    return convert


def _plain_text(row: Row) -> list[Message]:
    """Text without a prompt is one answer: all of it is trained.

    Its template is to be `plain`, which adds nothing but the stop token. An answer is the only thing that a
    Conversation trains, so this needs no second kind of record: length, mask and report come as for any other row.
    """
    return [_answer(row, "text")]


def _list_of_turns(field: str) -> Callable[[Row], list[Message]]:
    return lambda row: ending_in_answer(turns_of(row[field], field), field)


def _preference(row: Row) -> list[Message]:
    """The prompt with the answer that was chosen."""
    answer = completion(row, "chosen")
    if answer[0].role != "assistant":  # the whole conversation stands in `chosen`
        return answer
    for field in ("conversations", "messages"):
        if field in row:
            return [*turns_of(row[field], field), *answer]
    if "instruction" in row:
        return [*_prompt(row, "instruction", "input"), *answer]
    asked = next((field for field in ("prompt", "question", "query") if field in row), None)
    if asked is None:
        raise FieldError("prompt", "missing (a row of preference)", received=_names(row), expected=PREFERENCE_PROMPTS)
    return [*_prompt(row, asked), *answer]


PREFERENCE_PROMPTS = "conversations, messages, instruction, prompt, question, query, or the whole of it in chosen"


def _prompt(row: Row, field: str, context: str = "") -> list[Message]:
    """A prompt as text, or as turns."""
    if isinstance(row.get(field), list):
        return turns_of(row[field], field)
    more = text_of(row, context, required=False) if context else ""
    return [Message("user", text_of(row, field, required=not more), context=more)]


def completion(row: Row, field: str, prompt: str = "") -> list[Message]:
    """An answer as text, as a turn, as turns, or as a text for each gap in the prompt."""
    value = row.get(field)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return [_answer(row, field, prompt)]
    if isinstance(value, dict) and value.keys() & set(ROLE_KEYS):
        value = [value]
    return ending_in_answer(turns_of(value, field), field) if isinstance(value, list) else [_answer(row, field)]


def tools_of(row: Row, fmt: Format) -> tuple[Mapping[str, object], ...]:
    """Function descriptions, each in OpenAI's frame `{type: function, function: {name, description, parameters}}`.

    They stand in a column, or in the system's turn (ChatGLM3).
    """
    found = {name: described(row.get(name), name) for name in TOOLS}
    for name in fmt.uses - {*TOOLS, *SYSTEMS}:
        value = row.get(name)
        turns = listed(value, name, "turns") if name in fmt.keys & set(TURNS) else value
        for n, turn in enumerate(turns if isinstance(turns, list) else []):
            if isinstance(turn, dict) and turn.get("tools"):
                found[f"{name}[{n}].tools"] = _of_turn(turn, f"{name}[{n}]")
    places = [name for name, tools in found.items() if tools]
    if len(places) > 1 and any(found[name] != found[places[0]] for name in places):
        raise FieldError(places[1], "tools in two places", received=" and ".join(places), expected="one list of them")
    return found[places[0]] if places else ()


def _of_turn(turn: Turn, where: str) -> tuple[Mapping[str, object], ...]:
    if speaker(turn) != "system":
        raise FieldError(
            f"{where}.tools", "tools in a turn", received=speaker(turn), expected="a column tools, or the system's turn"
        )
    return described(turn["tools"], f"{where}.tools")


def described(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The function descriptions of one place."""
    tools = []
    for n, tool in enumerate(listed(value, where, "a list of function descriptions")):
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            expected = "{name, description, parameters}"
            raise FieldError(f"{where}[{n}]", "not a function description", received=shorten(tool), expected=expected)
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
    uses = [*keys.split(), *more.split()]
    return Format(name, frozenset(keys.split()), frozenset([*uses, *(TOOLS if "tools" in uses else ())]), convert)


KNOWN = {
    ("instruction", "output"),
    ("prompt", "completion"),
    ("query", "response"),
    ("prompt", "response"),
    ("question", "answer"),
}  # pairs that have more to say, above the others in FORMATS


def _pair(prompt: str, answer: str, context: str = "", name: str = "") -> Format:
    more = f"{context} tools {' '.join((*SYSTEMS, *HISTORIES))}"
    return _format(name or f"{prompt}/{answer}", f"{prompt} {answer}", more, _asked_and_said(prompt, answer, context))


def _talk(field: str, name: str = "") -> Format:
    return _format(name or field, field, f"tools {' '.join(SYSTEMS)}", _list_of_turns(field))


# The first whose keys a row has is taken, so a format with more to say stands before one with less.
FORMATS = (
    _format(
        "preference",
        "chosen",
        f"conversations messages prompt question query instruction input tools {' '.join(SYSTEMS)}",
        _preference,
    ),
    _talk("messages"),
    _talk("conversations", "sharegpt"),
    _pair("instruction", "output", "input", name="alpaca"),
    _pair("prompt", "completion"),
    _pair("context", "target"),
    _pair("query", "response"),
    _pair("instruction", "response", "context"),
    _pair("prompt", "response"),
    _pair("question", "answer", "context"),
    _pair("question", "response"),
    _pair("problem", "solution"),
    _pair("inputs", "targets"),
    _pair("指令", "输出", "输入"),
    *(_pair(*names) for names in PAIRS if names not in KNOWN),
    _talk("conversation"),
    _talk("dialogue"),
    _talk("dialog"),
    _talk("chat"),
    _talk("turns"),
    _talk("对话"),
    _format("text", "text", "", _plain_text),
    _talk("data"),
)
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "对话", "data")  # lists
NAMES = {fmt.name: fmt for fmt in FORMATS}


def what_they_are(lengths: Mapping[str, int]) -> str:
    """How to go on with columns of unknown names, from the lengths of their texts."""
    return f"say what your columns are: {propose(lengths)}"


def check(name: str, columns: Mapping[str, str]) -> None:
    """Refuse a format or a column map that no row could have.

    Raises:
        ConfigError: an unknown format or field, or two columns for one field.
    """
    if name != "auto" and name not in NAMES:
        raise ConfigError(f"unknown format {name!r}", fix=did_you_mean(name, ["auto", *NAMES]))
    known = NAMES[name].uses if name != "auto" else frozenset().union(*(fmt.uses for fmt in FORMATS))
    known |= FIELDS
    fields = [field for field in columns.values() if field != IGNORE]
    for column, field in columns.items():
        if field not in known:
            raise ConfigError(f"map: unknown field {field!r} (for column {column!r})", fix=did_you_mean(field, known))
        if fields.count(field) > 1:
            raise ConfigError(f"map: two columns for the field {field!r}", received=columns, expected="one column each")


def _names(row: Row) -> str:
    return f"the columns {', '.join(map(str, row))}" if row else "no columns"


def _first(row: Row, mapped: set[str], name: str = "auto") -> Format | None:
    """The first format whose keys a row has; a column of nulls shows one only where nothing else does."""
    full = {key for key, value in row.items() if not missing(value)}
    known = _known(name, mapped)
    return next((fmt for keys in (full, row.keys()) for fmt in known if fmt.keys <= keys), None)


def _known(name: str, mapped: set[str]) -> list[Format]:
    """The formats that a row may have; where columns were mapped, those that use them all."""
    wanted = mapped - FIELDS
    return [NAMES[name]] if name != "auto" else [fmt for fmt in FORMATS if wanted <= fmt.uses] or list(FORMATS)


def find(row: Row, name: str, mapped: set[str]) -> Format:
    """The format of a row."""
    if fmt := _first(row, mapped, name):
        return fmt
    known = _known(name, mapped)
    near = max(known, key=lambda fmt: len(_there(fmt, row)))
    expected = "; ".join(f"{fmt.name}: {', '.join(sorted(fmt.keys))}" for fmt in known) if name != "auto" else SHORT
    if not _there(near, row) and name == "auto":
        raise FieldError("", UNKNOWN, received=_names(row), expected=expected)
    absent = sorted(near.keys - row.keys())[0]
    texts = sizes(row)
    fix = f"if other columns hold it: {propose(texts)}" if len(texts) > 1 and name == "auto" else None
    raise FieldError(absent, f"missing (a row of {near.name})", received=_names(row), expected=expected, fix=fix)


def _there(fmt: Format, row: Row) -> set[str]:
    """The keys of a format that a row has; a column `a` or `问` alone says too little."""
    return {key for key in fmt.keys & row.keys() if len(key) > 1}


def understood(row: Row, name: str, columns: Mapping[str, str]) -> Mapping[str, str]:
    """The column map, with `Question` read as `question` where that makes a format of the row."""
    if name != "auto" or _first(*by_known_names(row, columns)) is not None:
        return columns
    known = FIELDS.union(*(fmt.uses for fmt in FORMATS))
    lower = {key: key.strip().lower() for key in row if isinstance(key, str) and key not in columns}
    lower = {key: small for key, small in lower.items() if key != small and small not in row and small in known}
    return {**lower, **columns} if lower and _first(*by_known_names(row, {**lower, **columns})) is not None else columns


def by_known_names(row: Row, columns: Mapping[str, str]) -> tuple[Row, set[str]]:
    """The row under the names that formats know, and which of these were mapped."""
    present = {column: field for column, field in columns.items() if column in row}
    fields = set(present.values()) - {IGNORE}
    rest = {key: value for key, value in row.items() if key not in present and key not in fields}
    return rest | {field: row[column] for column, field in present.items() if field != IGNORE}, fields
