"""What an answer is to a client: thought, text and calls apart, whole and streamed alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from fitune.commands.serve.asked import AskedChat, read
from fitune.commands.serve.choices import ChatChoice
from fitune.commands.serve.errors import Refused
from fitune.commands.serve.live import Live
from fitune.commands.serve.prompts import of_chat
from fitune.data.encode import Encoder
from fitune.data.templates import choose
from fitune.engine.batching import Ended, Request
from fitune.engine.drawing import Sampling, Token
from fitune.engine.speech import Speech
from fitune.engine.thinking import Thinking
from fitune.models import families
from fitune.models.load import Tuned
from support import chat_templates, tiny

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CHANNELS = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>It is Oslo."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def tuned_of(name: str) -> Tuned:
    words = chat_templates.make_tokenizer(getattr(chat_templates, name))
    template = choose("chat_template", words)
    model = tiny.make_model("llama")
    return Tuned(model, words, template, Encoder(words, template), families.of(model))


def choice(tuned: Tuned, text: str, stops: Sequence[str] = (), **more: Any) -> ChatChoice:
    """A choice whose answer has been drawn already."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    asked = read(AskedChat, body)
    question, prompt = of_chat(tuned, asked)
    queue: asyncio.Queue[Token | Ended] = asyncio.Queue()
    ids = tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
    for one in ids:
        queue.put_nowait(Token(one))
    queue.put_nowait(Ended("stop"))
    request = Request(prompt, Sampling(), lambda token: None)
    return ChatChoice(0, Live(prompt, Speech(tuned.encoder, stops), request, queue), tuned, asked, question)


def whole(one: ChatChoice) -> dict[str, Any]:
    asyncio.run(one.take())
    return one.whole()


def streamed(one: ChatChoice) -> tuple[str, str, list[dict[str, Any]], str]:
    """Thought, text, calls, and why it ended, put together as a client does."""

    async def all_of() -> list[dict[str, Any]]:
        return [chunk async for chunk in one.chunks()]

    chunks = asyncio.run(all_of())
    deltas = [chunk["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    thought, text = ("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))
    return thought, text, calls, chunks[-1]["finish_reason"]


@pytest.mark.parametrize(
    ("name", "text", "thought", "content"),
    [
        ("QWEN3", "<think>\nLet me see.\n</think>\n\nIt is Oslo.\n", "Let me see.", "It is Oslo.\n"),
        ("QWEN3", "<think>\n\n</think>\n\nIt is Oslo.", "", "It is Oslo."),
        ("QWEN3", "It is <b>Oslo</b>.", "", "It is <b>Oslo</b>."),
        ("QWEN3", "<think>\nLet me", "Let me", ""),
        ("QWEN3_THINKING", "Let me see.\n</think>\n\nIt is Oslo.", "Let me see.", "It is Oslo."),
        ("QWEN3_THINKING", "Let me see", "Let me see", ""),
        ("QWEN25", "", "", ""),
        ("QWEN25", "你好，世界", "", "你好，世界"),
        ("CHANNELS", CHANNELS, "Let me see.", "It is Oslo."),
    ],
)
def test_a_thought_is_apart_whole_and_streamed(name: str, text: str, thought: str, content: str) -> None:
    tuned = tuned_of(name)
    message = whole(choice(tuned, text))["message"]
    assert (message.get("reasoning_content", ""), message["content"]) == (thought, content)
    assert streamed(choice(tuned, text))[:2] == (thought, content)


@pytest.mark.parametrize("before", ["", "Let me look.\n", "<think>\nIt is cold there.\n</think>\n\n"])
def test_calls_come_as_calls(before: str) -> None:
    tuned = tuned_of("QWEN3")
    made = whole(choice(tuned, before + CALL, tools=[TOOL]))
    (call,) = made["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert made["finish_reason"] == "tool_calls"
    assert made["message"]["content"] == (before.strip() if "Let" in before else None)
    assert made["message"].get("reasoning_content") == ("It is cold there." if "cold" in before else None)
    _, _, calls, finish = streamed(choice(tuned, before + CALL, tools=[TOOL]))
    assert [one["function"] for one in calls] == [call["function"]]
    assert (calls[0]["index"], finish) == (0, "tool_calls")


def test_without_tools_a_call_is_text() -> None:
    none: dict[str, Any] = {"tools": [TOOL], "tool_choice": "none"}
    for more in ({}, none):
        message = whole(choice(tuned_of("QWEN3"), CALL, **more))["message"]
        assert message["content"] == CALL
        assert "tool_calls" not in message


def test_a_conversation_with_calls_and_results_is_asked_as_it_is_trained() -> None:
    tuned = tuned_of("QWEN3")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Cold?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "-5"},
    ]
    question, ids = of_chat(tuned, read(AskedChat, {"model": "m", "messages": turns, "tools": [TOOL]}))
    assert ids == tuned.encoder.prompt(question.messages, question.tools)
    assert CALL in tuned.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0]"),
        ([{"role": "user", "content": "half \ud800"}], "messages"),
    ],
)
def test_messages_that_are_none_are_refused(turns: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(Refused) as caught:
        of_chat(tuned_of("QWEN3"), read(AskedChat, {"model": "m", "messages": turns}))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("text", ["<think>\na b\n</think>\n\nc <b> d", "<thi is no tag", "x </think> y", " <think> a"])
def test_however_the_text_is_cut_the_parts_are_the_same(text: str) -> None:
    tuned = tuned_of("QWEN3")

    def parts(size: int) -> tuple[str, str]:
        thinking = Thinking(tuned, [])
        found = [thinking.add(text[at : at + size]) for at in range(0, len(text), size)]
        thought, answer = map("".join, zip(*found, thinking.end(), strict=True))
        return thought, answer

    assert len({parts(size) for size in range(1, len(text) + 1)}) == 1
