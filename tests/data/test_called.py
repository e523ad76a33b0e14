"""What a template writes for calls of tools is read back as these calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fitune.core.records import Conversation, Message, ToolCall
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE, choose
from fitune.data.templates.called import calls_in
from support import chat_templates

pytestmark = pytest.mark.unit

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
OSLO, BEIJING = ToolCall("weather", '{"city": "Oslo", "days": 3}', "abcdefghi"), ToolCall("weather", '{"city": "北京"}')


def written(name: str, *calls: ToolCall, text: str = "") -> str:
    """What a model is trained to write, with its special tokens."""
    tokenizer = chat_templates.make_tokenizer(getattr(chat_templates, name))
    encoder = Encoder(tokenizer, choose("chat_template", tokenizer))
    row = Conversation((Message("user", "hi"), Message("assistant", text, tool_calls=calls)), tools=(TOOL,))
    sample = encoder.samples(row)[-1]
    return str(tokenizer.decode(sample.ids[sample.mask]))


def plain(calls: tuple[ToolCall, ...]) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("name", ["QWEN3", "QWEN25", "MISTRAL", "LLAMA31", "GLM45", "CHANNELS"])
def test_a_call_is_read_back(name: str) -> None:
    _, calls = calls_in(written(name, OSLO), [TOOL])
    assert plain(calls) == plain((OSLO,))


@pytest.mark.parametrize("name", ["QWEN3", "QWEN25", "GLM45"])
def test_calls_behind_a_text_are_read_back(name: str) -> None:
    text, calls = calls_in(written(name, OSLO, BEIJING, text="Let me look."), [TOOL])
    assert plain(calls) == plain((OSLO, BEIJING))
    assert text.rstrip().endswith("Let me look.")


def test_chatglm3s_call_is_read_back() -> None:
    row = [Message("user", "hi"), Message("assistant", "", tool_calls=(OSLO,))]
    text = "".join(s.text for s in TABLE["chatglm3"].render(row, [TOOL]) if s.trained)
    assert plain(calls_in(text, [TOOL])[1]) == plain((OSLO,))


@pytest.mark.parametrize(
    "text",
    [
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Oslo", "days": 3}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Oslo", "days": 3}<｜tool▁call▁end｜>',
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        '[TOOL_CALLS]weather[ARGS]{"city": "Oslo", "days": 3}',
    ],
)
def test_calls_of_other_families_are_read(text: str) -> None:
    assert plain(calls_in(text, [TOOL])[1]) == plain((OSLO,))


@pytest.mark.parametrize(
    "text",
    [
        "It is cold.",
        '<tool_call>{"name": "weather", "arguments": </tool_call>',
        '{"name": "other", "parameters": {}}',
        '{"city": "Oslo"}',
        "weather\n```python\ntool_call(__import__('os'))\n```",
        '<tool_call>{"name": "weather", "arguments": 3}</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert calls_in(text, [TOOL]) == (text, ())
