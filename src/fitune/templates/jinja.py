"""The tokenizer's own Jinja template, split into segments by rendering it turn by turn.

In: messages, tools. Out: segments. The text that a turn adds is the difference of two renderings. Where a rendering
does not begin with the one before it (a template that rewrites earlier turns), the turns cannot be told apart, and
the template is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fitune.errors import ModelError
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
        text = self.tokenizer.apply_chat_template(
            [_as_openai(m) for m in messages],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self.jinja,
            tokenize=False,
            add_generation_prompt=generate,
        )
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
                segments += self._marked(added, messages[: turn + 1], start, tools, done)
            done, start = whole, turn + 1
        return segments

    def _marked(self, text: str, messages: Sequence[Message], start: int, tools: Tools, done: str) -> list[Segment]:
        """What the messages from `start` on add, with the users' own texts in segments of their own.

        Where they stand is found by rendering marks in their place: a text such as `a` stands in the template too.
        """
        marks = {turn: f"\ue000{turn}\ue001" for turn in range(start, len(messages))}  # private-use characters
        blank = [replace(messages[turn], content=mark, context="") for turn, mark in marks.items()]
        frame = self._text([*messages[:start], *blank], tools, generate=True).removeprefix(done)
        for strip in (False, True):  # many templates strip what they are given
            segments: list[Segment] = []
            rest = frame
            for turn, mark in marks.items():
                before, _, rest = rest.partition(mark)
                own = joined(messages[turn]).strip() if strip else joined(messages[turn])
                segments.append(Segment(before, turn=turn, role=messages[turn].role))
                segments.append(Segment(own, literal=False, turn=turn, role=messages[turn].role))
            segments.append(Segment(rest, turn=len(messages) - 1, role=messages[-1].role))
            if "".join(segment.text for segment in segments) == text:
                return [segment for segment in segments if segment.text]
        return _split(text, messages[start:], start)

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
