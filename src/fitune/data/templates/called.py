"""Calls of tools in what a model wrote: back from each family's syntax to names and arguments.

In: the text of an answer, special tokens included. Out: the text before the first call, and the calls. One row of the
table for each syntax; a text that none of them reads whole has no calls.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fitune.core.records import ToolCall
from fitune.data.templates.base import Tools, function_of

Found = tuple[str, object]  # a name, and its arguments: an object, or the text of one


class _NoCall(Exception):
    """It looks like a call and is none."""


@dataclass(frozen=True)
class Syntax:
    """How a family writes calls. calls: one match for each; named: only names of the tools that were given count."""

    family: str
    calls: re.Pattern[str]
    read: Callable[[re.Match[str], Tools], Iterator[Found]]
    named: bool = False


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _NoCall from None


def _object(value: object) -> Found:
    """`{name, arguments}`, or `{name, parameters}`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise _NoCall
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments


def _one(found: re.Match[str], tools: Tools) -> Iterator[Found]:
    yield _object(_json(found["json"]))


def _several(found: re.Match[str], tools: Tools) -> Iterator[Found]:
    values = _json(found["json"])
    if not isinstance(values, list) or not values:
        raise _NoCall
    yield from map(_object, values)


def _named(found: re.Match[str], tools: Tools) -> Iterator[Found]:
    yield found["name"].strip(), _json(found["json"])


def _pairs(pattern: str) -> Callable[[re.Match[str], Tools], Iterator[Found]]:
    """Arguments one by one as text: those that the tool wants as something else are read as JSON."""
    each = re.compile(pattern, re.DOTALL)

    def read(found: re.Match[str], tools: Tools) -> Iterator[Found]:
        name = found["name"].strip()
        kinds = _kinds(name, tools)
        pairs = [(one["key"].strip(), one["value"]) for one in each.finditer(found["pairs"])]
        yield name, {key: _typed(value, kinds.get(key)) for key, value in pairs}

    return read


def _kinds(name: str, tools: Tools) -> Mapping[str, object]:
    """The types of a tool's parameters."""
    for tool in tools:
        described = function_of(tool)
        parameters = described.get("parameters")
        if described.get("name") == name and isinstance(parameters, Mapping):
            properties = parameters.get("properties")
            if isinstance(properties, Mapping):
                return {key: one.get("type") for key, one in properties.items() if isinstance(one, Mapping)}
    return {}


def _typed(value: str, kind: object) -> object:
    if kind in (None, "string"):
        return value
    try:
        found: object = json.loads(value)
    except ValueError:
        return value
    return found


def _python(found: re.Match[str], tools: Tools) -> Iterator[Found]:
    """`tool_call(city='Oslo', days=3)`: literals only."""
    try:
        call = ast.parse(found["call"].strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise _NoCall
        yield found["name"].strip(), {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _NoCall from None


def _syntax(
    family: str, pattern: str, read: Callable[[re.Match[str], Tools], Iterator[Found]], *, named: bool = False
) -> Syntax:
    return Syntax(family, re.compile(pattern, re.DOTALL), read, named)


_BEGIN, _SEP, _END = (f"<[|｜]tool[_▁]{name}[|｜]>" for name in ("call[_▁]begin", "sep", "call[_▁]end"))
SYNTAXES = (
    _syntax("Qwen2.5, Qwen3, Hermes", r"<tool_call>\s*(?P<json>\{.*?\})\s*</tool_call>", _one),
    _syntax(
        "Qwen3-Coder, Qwen3.5",
        r"<tool_call>\s*<function=(?P<name>[^>]+)>(?P<pairs>.*?)</function>\s*</tool_call>",
        _pairs(r"<parameter=(?P<key>[^>]+)>\n?(?P<value>.*?)\n?</parameter>"),
    ),
    _syntax(
        "GLM-4.5",
        r"<tool_call>(?P<name>[^<{\n]+)(?P<pairs>\s*(?:<arg_key>.*?)?)</tool_call>",
        _pairs(r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
    ),
    _syntax("Mistral", r"\[TOOL_CALLS\]\s*(?P<json>\[.*\])", _several),
    _syntax(
        "Mistral, newer",
        r"\[TOOL_CALLS\](?P<name>[^\[{]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\](?P<json>\{.*?\})\s*(?=\[TOOL_CALLS\]|</s>|$)",
        _named,
    ),
    _syntax(
        "gpt-oss",
        r"(?:<\|channel\|>commentary)? to=functions\.(?P<name>[\w.-]+)(?:<\|channel\|>commentary)?[^<]*"
        r"(?:<\|constrain\|>\w+)?<\|message\|>(?P<json>\{.*?\})(?=<\|call\|>|$)",
        _named,
    ),
    _syntax("DeepSeek", rf"{_BEGIN}function{_SEP}(?P<name>[^\n]+)\n```json\n(?P<json>.*?)\n```{_END}", _named),
    _syntax("DeepSeek-V3.1", rf"{_BEGIN}(?P<name>[^<]+){_SEP}(?P<json>\{{.*?\}}){_END}", _named),
    _syntax(
        "ChatGLM3", r"(?P<name>[^\n<>]+)\n```python\n(?P<call>tool_call\(.*?\))\n```", _python, named=True
    ),
    _syntax("Llama 3", r"^\s*(?:<\|python_tag\|>)?(?P<json>\{.*\})", _one, named=True),
)  # fmt: skip


def calls_in(text: str, tools: Tools) -> tuple[str, tuple[ToolCall, ...]]:
    """(the text before the first call, the calls) of an answer; without calls all of the text.

    Args:
        text: what a model wrote, with its special tokens.
        tools: those that it was given.
    """
    known = {str(function_of(tool).get("name")) for tool in tools}
    for syntax in SYNTAXES:
        found = list(syntax.calls.finditer(text))
        try:
            calls = [_call(*one) for match in found for one in syntax.read(match, tools)]
        except _NoCall:
            continue
        if calls and (not syntax.named or {call.name for call in calls} <= known):
            return text[: found[0].start()], tuple(calls)
    return text, ()


def _call(name: str, arguments: object) -> ToolCall:
    """A call whose arguments are the text of an object."""
    values = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(values, dict):
        raise _NoCall
    return ToolCall(name, json.dumps(values, ensure_ascii=False))
