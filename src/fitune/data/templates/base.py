"""What the rest of fitune needs of a template, and what the templates share.

In: messages. Out: the protocol `Template`, and helpers that refuse what a template has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fitune.core.errors import ConfigError, DataError, shorten
from fitune.core.records import Message, Segment, ToolCall
from fitune.data.templates import thoughts

Tools = Sequence[Mapping[str, object]]


class Template(Protocol):
    """What the rest of fitune needs of a template."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def stop(self) -> str | None:
        """The text of the token that ends an answer; None: the tokenizer's EOS."""
        ...

    @property
    def other_stops(self) -> tuple[str, ...]:
        """Further tokens at which generation ends."""
        ...

    def one_answer_per_sample(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """Does this conversation become one sample per answer, because answers stand otherwise in the prompts that
        come after them than where they were made?"""
        ...

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """Messages to segments; the stop token of a trained answer is a segment of its own, marked by role "stop".

        Raises:
            ConfigError: the template has no place for tools.
        """
        ...

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """Messages to what a model is asked when the next answer is its own, whoever spoke last.

        Raises:
            ConfigError: the template has no place for tools.
        """
        ...

    def read_answer(self, text: str) -> Message:
        """What a model wrote as a message: without the template's frame, its thought apart."""
        ...

    def answer_text(self, text: str) -> str:
        """What a model wrote, without the frame that the template puts around an answer."""
        ...

    def as_dict(self) -> dict[str, object]:
        """For the run folder; `from_dict` reads it back."""
        ...


class Rendered:
    """What templates share that write a whole conversation at once: `prompt` and `_segments` are theirs."""

    @property
    def other_stops(self) -> tuple[str, ...]:
        """See Template."""
        return ()

    def one_answer_per_sample(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """See Template."""
        return False

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        if not messages or messages[-1].role != "assistant":
            return self.prompt(messages, tools)
        return self._segments(messages, tools)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        raise NotImplementedError

    def _segments(self, messages: Sequence[Message], tools: Tools) -> list[Segment]:
        """The conversation as it is trained; its last message may be an answer or not."""
        raise NotImplementedError


def kept_date(template: Template) -> str:
    """What a user should know of the date that a template writes; nothing where it writes none."""
    date = getattr(template, "date", None)
    return f"the chat template writes a date: {date}, kept by the run" if date else ""


def joined(message: Message) -> str:
    """Content and context as one text, for templates that keep no place for the context."""
    if message.context and message.content:
        return f"{message.content}\n{message.context}"
    return message.content or message.context


def read_answer(text: str) -> Message:
    """An answer of a template without a place for thoughts: what stands between tags is one all the same."""
    thought, answer = thoughts.split(text)
    return Message("assistant", answer, thought=thought) if thought or answer != text else Message("assistant", text)


def arguments(call: ToolCall) -> dict[str, object]:
    """The arguments of a tool call.

    Raises:
        DataError: they are not a JSON object.
    """
    try:
        values = json.loads(call.arguments or "{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise DataError(
            f"the arguments of the call of {call.name!r} are not a JSON object",
            received=repr(call.arguments),
            expected='text such as {"city": "Paris"}',
            fix="write the arguments as JSON",
        )
    return values


def as_json(values: object, indent: int | None = None) -> str:
    """JSON as templates write it: Chinese stays Chinese."""
    return json.dumps(values, ensure_ascii=False, indent=indent)


def function_of(tool: Mapping[str, object]) -> Mapping[str, object]:
    """The bare description of a function, with or without OpenAI's `{"type": "function"}` around it."""
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def refuse_later_system(name: str, messages: Sequence[Message]) -> None:
    """Refuse a system text behind the first turn, for a template with no place for it there.

    Raises:
        DataError: there is one.
    """
    for turn, message in enumerate(messages[1:], 1):
        if message.role == "system":
            raise DataError(
                f"template {name!r} has no place for a system text after the first turn",
                received=f"turn {turn + 1}: {shorten(joined(message))}",
                expected="one at the beginning, or a template that takes more: chatml, qwen, llama3, chatglm3",
                fix="join them in one, at the beginning, or leave such rows out with --skip-bad",
            )


def no_place_for_tools(name: str, what: str = "tools") -> ConfigError:
    """The error of a template that knows no tools."""
    return ConfigError(
        f"template {name!r} has no place for {what}",
        received=f"a conversation with {what}",
        expected="a template with tools: qwen, chatml, chatglm3, or a chat template that names them",
        fix="--template qwen, or leave such rows out",
    )


def refuse_tools(name: str, messages: Sequence[Message], tools: Tools) -> None:
    """Refuse tools, tool calls and tool results, for a template with no place for any of them.

    Raises:
        ConfigError: there are some.
    """
    if tools:
        raise no_place_for_tools(name)
    if any(m.tool_calls for m in messages):
        raise no_place_for_tools(name, "tool calls")
    if any(m.role == "tool" for m in messages):
        raise no_place_for_tools(name, "tool results")


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a list of parts, as servers send it where a template reads nothing else."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
