"""The tokenizer's own Jinja template, split into segments by rendering it turn by turn.

In: messages, tools. Out: segments. The text that a turn adds is the difference of two renderings. Where a rendering
does not begin with the one before it (a template that rewrites earlier turns), the turns cannot be told apart, and
the template is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from fitune.errors import ConfigError, ModelError
from fitune.records import Message, Segment
from fitune.templates.base import Tools, arguments, as_json, joined, no_place_for_tools


class ChatTemplate:
    """A Jinja template.

    Args:
        jinja: its text.
        tokenizer: renders it.
        stop: the token that ends an answer; None: the tokenizer's EOS.
    """

    name = "chat_template"
    other_stops: tuple[str, ...] = ()
    one_answer_per_sample = False

    def __init__(self, jinja: str, tokenizer: Any, stop: str | None) -> None:
        self.jinja, self.tokenizer, self.stop = jinja, tokenizer, stop

    def _text(self, messages: Sequence[Message], tools: Tools, *, generate: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [_as_openai(m) for m in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=self.jinja,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except TemplateError as error:
            raise ConfigError(
                "the tokenizer's own chat template refuses a conversation",
                received=f"roles {', '.join(m.role for m in messages)}: {error}",
                expected="roles in the order that the template wants",
                fix="mend such rows, or choose a template by name: --template chatml",
            ) from error
        return str(text)

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        self._refuse(messages, tools)
        segments: list[Segment] = []
        done, start = "", 0
        for turn, message in enumerate(messages):
            last = turn + 1 == len(messages)
            answers_next = last or messages[turn + 1].role == "assistant"
            if message.role != "assistant" and not answers_next:
                continue  # rendered with the turn after it: some templates refuse a lone system message
            whole = self._text(messages[: turn + 1], tools, generate=message.role != "assistant")
            added = _difference(whole, done, turn)
            if message.role == "assistant":
                segments += self._answer(added, message, turn, last=last)
            else:
                segments += self._prompt(added, messages[: turn + 1], start, tools, done)
            done, start = whole, turn + 1
        return segments

    def _prompt(self, text: str, messages: Sequence[Message], start: int, tools: Tools, done: str) -> list[Segment]:
        """What messages[start:] add, the users' own texts in segments of their own.

        Where these stand is seen in a rendering of marks in their place: to look for the texts themselves would find
        a user's `<|im_start|>` in the template's own.
        """
        marks = [f"⟦fitune {n}⟧" for n in range(start, len(messages))]
        marked = [replace(m, content=mark, context="") for m, mark in zip(messages[start:], marks, strict=True)]
        frame = self._text([*messages[:start], *marked], tools, generate=True).removeprefix(done)
        frames = re.split("|".join(map(re.escape, marks)), frame)
        if len(frames) != len(marks) + 1:
            return _split(text, messages[start:], start)
        segments: list[Segment] = []
        for n, (message, before) in enumerate(zip(messages[start:], frames, strict=False), start):
            texts = (joined(message), joined(message).strip())  # some templates strip
            own = next((own for own in texts if text.startswith(before + own)), None)
            if own is None:  # the template rewrites texts: look for what is left of them
                return [*segments, *_split(text, messages[n:], n)]
            segments.append(Segment(before, turn=n, role=message.role))
            segments.append(Segment(own, literal=False, turn=n, role=message.role))
            text = text[len(before) + len(own) :]
        segments.append(Segment(text, turn=len(messages) - 1, role=messages[-1].role))
        return [segment for segment in segments if segment.text]

    def _refuse(self, messages: Sequence[Message], tools: Tools) -> None:
        if tools and "tools" not in self.jinja:
            raise no_place_for_tools("the tokenizer's own")
        if any(m.tool_calls for m in messages) and "tool_calls" not in self.jinja:
            raise no_place_for_tools("the tokenizer's own", "tool calls")
        if any(m.role == "tool" for m in messages) and "tool" not in self.jinja:
            raise no_place_for_tools("the tokenizer's own", "tool results")

    def _answer(self, text: str, message: Message, turn: int, *, last: bool) -> list[Segment]:
        """An answer's text as [content, stop token, what the template puts behind it]."""
        stop = self.stop or self.tokenizer.eos_token
        content, found, after = text.rpartition(stop) if stop else (text, "", "")
        if not found:
            raise ModelError(
                "the chat template does not end an answer with a stop token: a model trained so would never stop",
                received=repr(text[-40:]),
                expected=f"{stop!r} after the answer",
                fix="choose a template by name: --template chatml",
            )
        segments = [Segment(content, literal=False, trained=True, turn=turn, role="assistant")]
        if message.tool_calls or content.strip() != message.content.strip():
            # the template adds marks of its own (a call, an empty thinking block): they are template, and trained
            segments = _split(content, [message], turn, trained=True)
        segments.append(Segment(trained=True, turn=turn, role="stop"))
        if after and not last:
            segments.append(Segment(after, turn=turn))
        return segments

    def answer_text(self, text: str) -> str:
        """See Template."""
        return text

    def as_dict(self) -> dict[str, Any]:
        """See Template."""
        return {"kind": "chat_template", "jinja": self.jinja, "stop": self.stop}


def _as_openai(message: Message) -> dict[str, Any]:
    """A message as Jinja templates want it: arguments of calls as a dictionary, not as text."""
    values: dict[str, Any] = {"role": message.role, "content": joined(message)}
    if message.tool_calls:
        values["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": arguments(call)}}
            for call in message.tool_calls
        ]
    return values


def _difference(whole: str, done: str, turn: int) -> str:
    if not whole.startswith(done):
        raise ModelError(
            f"the chat template rewrites earlier turns (seen at turn {turn + 1}), so training and chat would differ",
            fix="choose a template by name: --template chatml",
        )
    return whole[len(done) :]


def _split(text: str, messages: Sequence[Message], first: int, *, trained: bool = False) -> list[Segment]:
    """A rendering with the users' own texts in segments of their own, so that special tokens in them stay text.

    Args:
        text: what the template made of the messages.
        messages: in their order.
        first: the turn of the first of them.
        trained: is it an answer.
    """
    segments: list[Segment] = []
    turn = first
    for turn, message in enumerate(messages, first):
        for own in _own_texts(message):
            before, found, after = text.partition(own)
            if found:
                segments.append(Segment(before, trained=trained, turn=turn, role=message.role))
                segments.append(Segment(own, literal=False, trained=trained, turn=turn, role=message.role))
                text = after
    segments.append(Segment(text, trained=trained, turn=turn, role=messages[-1].role))
    return [segment for segment in segments if segment.text]


def _own_texts(message: Message) -> list[str]:
    """The texts of a message that are not the template's; templates may strip them, so stripped."""
    texts = [joined(message).strip()]
    texts += [as_json(arguments(call)) for call in message.tool_calls]
    return [text for text in texts if text]


def find_stop(tokenizer: Any) -> str | None:
    """The special token that the chat template puts behind an answer: often not the tokenizer's EOS."""
    marker = "fitune"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = text.rpartition(marker)[2]
    found = [token for token in tokenizer.get_added_vocab() if token and token in after]
    return min(found, key=lambda token: (after.index(token), -len(token)), default=None)
