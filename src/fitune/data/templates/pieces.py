"""Templates that are nothing but pieces of text with slots, and the table of the named ones.

In: messages. Out: segments. A piece is text with `{content}` and other slots; what fills a slot is a user's text, in a
segment of its own, so that special tokens in it stay text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from fitune.core.records import Message, Segment, ToolCall
from fitune.data.templates.base import (
    Rendered,
    Tools,
    arguments,
    as_json,
    joined,
    no_place_for_tools,
    read_answer,
    refuse_later_system,
)


@dataclass(frozen=True)
class PieceTemplate(Rendered):
    """A template made of pieces.

    A prompt is [system] [user] ... opening; an answer is `assistant` and the stop token.

    Args:
        name: what it is called.
        user: a user's turn; slot `{content}`.
        opening: stands before every answer and ends a prompt.
        assistant: the answer, all of it trained; slot `{content}`.
        system: slot `{content}`.
        later_system: a system text between turns is written so, too; False: it is refused.
        default_system: the system's text where the data has none.
        user_with_context: a turn that brings a context (alpaca's input), slots `{content}`, `{context}`. Without it
            the context stands on a new line below the content.
        user_with_system: the first turn where there is a system text, slots `{content}`, `{system}`.
        next_user: replaces `user` from the second turn on.
        bos_each_turn: every exchange begins with BOS, not the first one only.
        tools: stands after the system's text; slot `{tools}`, one JSON object a line.
        tool_call: one call in an answer; slots `{name}`, `{arguments}`.
        tool_start, tool, tool_end: results of calls: start, each result with slot `{content}`, end.
        stop: the token that ends an answer; None: the tokenizer's EOS.
        after_stop: follows the stop token where the conversation goes on.
    """

    name: str
    user: str
    opening: str = ""
    assistant: str = "{content}"
    system: str = "{content}\n\n"
    later_system: bool = False
    default_system: str | None = None
    user_with_context: str | None = None
    user_with_system: str | None = None
    next_user: str | None = None
    bos_each_turn: bool = False
    tools: str | None = None
    tool_call: str | None = None
    tool_start: str = ""
    tool: str | None = None
    tool_end: str = ""
    stop: str | None = None
    after_stop: str = ""

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        segments = self._segments(messages, tools)
        if messages and messages[-1].role == "assistant" and self.after_stop:
            segments.append(Segment(self.after_stop, turn=len(messages) - 1))
        return [*segments, Segment(self.opening)] if self.opening else segments

    def read_answer(self, text: str) -> Message:
        """See Template."""
        return read_answer(self.answer_text(text))

    def _segments(self, messages: Sequence[Message], tools: Tools) -> list[Segment]:
        segments = [Segment(role="bos")]
        system = messages[0] if messages and messages[0].role == "system" else None
        if not self.later_system:
            refuse_later_system(self.name, messages)
        if self.user_with_system is None or tools:
            segments += self._system(system, tools)
        users = 0
        for turn, message in enumerate(messages):
            after = messages[turn + 1] if turn + 1 < len(messages) else None
            if message.role == "user":
                segments += [Segment(role="bos")] if users and self.bos_each_turn else []
                segments += self._user(message, turn, users, system)
                users += 1
            elif message.role == "system" and turn:
                segments += fill(self.system, {"content": joined(message)}, turn=turn, role="system")
            elif message.role == "tool":
                segments += self._result(message, turn, messages[turn - 1] if turn else None, after)
            elif message.role == "assistant":
                segments += [Segment(self.opening, turn=turn)] if self.opening else []
                segments += [*self._answer(message, turn), Segment(trained=True, turn=turn, role="stop")]
                segments += [Segment(self.after_stop, turn=turn)] if self.after_stop and after is not None else []
        return segments

    def _system(self, message: Message | None, tools: Tools) -> list[Segment]:
        text = joined(message) if message else self.default_system
        if tools and self.tools is None:
            raise no_place_for_tools(self.name)
        if text is None and not tools:
            return []
        head, _, tail = self.system.partition("{content}")
        segments = fill(head + "{content}", {"content": text or ""}, role="system")
        if message is None:  # the template's own text, not a user's
            segments = [Segment(head + (text or ""), role="system")]
        if tools and self.tools is not None:
            # tools stand below the system's text, or alone
            frame = ("\n\n" if text else "") + self.tools
            listed = fill(frame, {"tools": "\n".join(as_json(tool) for tool in tools)}, role="system")
            own = [Segment(head, role="system"), Segment(text or "", role="system")] if message is None else segments
            segments = [own[0], *_as_one([*own[1:], *listed])]
        return [s for s in (*segments, Segment(tail, role="system")) if s.text]

    def _user(self, message: Message, turn: int, users: int, system: Message | None) -> list[Segment]:
        slots = {"content": message.content, "context": message.context}
        if users and self.next_user is not None:
            piece = self.next_user
        elif not users and system is not None and self.user_with_system is not None:
            piece, slots["system"] = self.user_with_system, joined(system)
        elif message.context and self.user_with_context is not None:
            piece = self.user_with_context
        else:
            piece = self.user
        if "{context}" not in piece:
            slots["content"] = joined(message)
        return fill(piece, slots, turn=turn, role="user")

    def _result(self, message: Message, turn: int, before: Message | None, after: Message | None) -> list[Segment]:
        """A tool's result; results that follow each other share one frame."""
        if self.tool is None:
            raise no_place_for_tools(self.name, "tool results")
        start = self.tool_start if before is None or before.role != "tool" else ""
        end = self.tool_end if after is None or after.role != "tool" else ""
        filled = fill(self.tool, {"content": joined(message)}, turn=turn, role="tool")
        filled = _as_one(filled, goes_on=before is not None and before.role == "tool")
        return [s for s in (Segment(start, turn=turn), *filled, Segment(end, turn=turn)) if s.text]

    def _answer(self, message: Message, turn: int) -> list[Segment]:
        if not message.tool_calls:
            return fill(self.assistant, {"content": joined(message)}, turn=turn, role="assistant", trained=True)
        calls: list[Segment] = []
        if message.content:
            calls.append(Segment(message.content, literal=False, trained=True, turn=turn, role="assistant"))
        for call in message.tool_calls:
            if calls:
                calls.append(Segment("\n", trained=True, turn=turn, role="assistant"))
            calls += self._call(call, turn)
        return _as_one(calls)

    def _call(self, call: ToolCall, turn: int) -> list[Segment]:
        if self.tool_call is None:
            raise no_place_for_tools(self.name, "tool calls")
        slots = {"name": call.name, "arguments": as_json(arguments(call))}
        return fill(self.tool_call, slots, turn=turn, role="assistant", trained=True)

    def answer_text(self, text: str) -> str:
        """See Template."""
        before, _, after = self.assistant.partition("{content}")
        return text.removeprefix(before).removesuffix(after)

    def as_dict(self) -> dict[str, object]:
        """See Template."""
        return {"kind": "pieces", **asdict(self)}


def _as_one(segments: Sequence[Segment], *, goes_on: bool = False) -> list[Segment]:
    """Segments between two control tokens, encoded as one text: so are they where the conversation is served.

    goes_on: with what stands before them, too.
    """
    kept = [segment for segment in segments if segment.text]
    return [replace(segment, joined=goes_on or n > 0) for n, segment in enumerate(kept)]


def fill(
    piece: str, slots: Mapping[str, str], *, turn: int = -1, role: str = "", trained: bool = False
) -> list[Segment]:
    """The piece with texts in its slots, text and template in segments of their own.

    A blank before a slot goes with the text that fills it: tokenizers make one token of a blank and the word after it.
    """
    names = "|".join(map(re.escape, slots))
    parts = re.split(rf"( ?\{{(?:{names})\}})", piece)
    segments = []
    for n, part in enumerate(parts):
        if n % 2 == 0:
            segments.append(Segment(part, turn=turn, role=role, trained=trained))
            continue
        name = part.strip(" {}")
        text = f" {slots[name]}" if part.startswith(" ") else slots[name]
        whose = "system" if name == "system" else role  # inside a user's turn in some templates
        segments.append(Segment(text, literal=False, turn=turn, role=whose, trained=trained))
    return [segment for segment in segments if segment.text]


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_ALPACA_ZH = "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n"
_ALPACA_ZH_CONTEXT = "以下是一个描述任务的指令，并配有一个提供详细上下文信息的输入。请写一个完成该指令的适当回复。\n\n"

# Qwen2.5's chat template (the format of Hermes)
_CHATML = PieceTemplate(
    "chatml",
    system="<|im_start|>system\n{content}<|im_end|>\n",
    later_system=True,
    user="<|im_start|>user\n{content}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    tools=(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{tools}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    ),
    tool_call='<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>',
    tool_start="<|im_start|>user",
    tool="\n<tool_response>\n{content}\n</tool_response>",
    tool_end="<|im_end|>\n",
    stop="<|im_end|>",
    after_stop="\n",
)

# Format facts: each string is exactly what the models of that name were trained with.
ROWS: tuple[PieceTemplate, ...] = (
    # Stanford Alpaca (2023)
    PieceTemplate(
        "alpaca",
        user=_ALPACA + "### Instruction:\n{content}\n\n",
        user_with_context=_ALPACA_CONTEXT + "### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
        next_user="\n\n### Instruction:\n{content}\n\n",
        opening="### Response:\n",
    ),
    # Alpaca in Chinese, as BigTranslate and other Chinese LLaMA models have it; there is no line break at the end
    PieceTemplate(
        "alpaca-zh",
        user=_ALPACA_ZH + "### 指令:\n{content}\n\n",
        user_with_context=_ALPACA_ZH_CONTEXT + "### 指令:\n{content}\n\n### 输入:\n{context}\n\n",
        next_user="\n\n### 指令:\n{content}\n\n",
        opening="### 回复:",
    ),
    # OpenAI's chat markup, as Qwen and many others use it
    _CHATML,
    replace(_CHATML, name="qwen", default_system="You are a helpful assistant."),
    # Meta's Llama 2 chat: the system's text stands inside the first turn, and each exchange begins with BOS
    PieceTemplate(
        "llama2",
        user="[INST] {content} [/INST]",
        user_with_system="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        bos_each_turn=True,
        assistant=" {content} ",
    ),
    # Meta's Llama 3 instruct
    PieceTemplate(
        "llama3",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        later_system=True,
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
    ),
    # BELLE and other Chinese models on BLOOM
    PieceTemplate("bloom", user="Human: {content}\n\n", opening="Assistant: "),
    # nothing but the text: for base models and completion data
    PieceTemplate("plain", system="{content}\n", user="{content}"),
)
