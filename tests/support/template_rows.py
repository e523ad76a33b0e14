"""Rows and expected texts for every kind of published chat template."""

# ruff: noqa: E501  (a table of texts)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fitune.core.records import Message, ToolCall
from support import chat_templates as kinds

SYSTEM, FRUIT, CHERRY = (
    Message("system", "Be brief."),
    Message("user", "Name a fruit."),
    Message("assistant", "A cherry."),
)

MORE, LEMON = Message("user", "And a yellow one?"), Message("assistant", "A lemon.")


HELLO = Message("assistant", "Hello.")


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}


CALL = Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Rome"}'),))


OTHER = Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Oslo"}'),))


RESULT, TIME = Message("tool", "10:05"), Message("assistant", "It is five past ten.")


THOUGHT = replace(CHERRY, thought="Cherries are fruits.")


TAGGED = replace(LEMON, content="<think>\nLemons are yellow.\n</think>\n\nA lemon.")


TEN = tuple(
    message for n in range(10) for message in (Message("user", f"Question {n}?"), Message("assistant", f"Answer {n}."))
)


ROWS: dict[str, tuple[Message, ...]] = {
    "single": (FRUIT, CHERRY),
    "multi": (FRUIT, CHERRY, MORE, LEMON),
    "system": (SYSTEM, FRUIT, CHERRY, MORE, LEMON),
    "greeting": (HELLO, FRUIT, CHERRY),
    "two answers": (FRUIT, CHERRY, LEMON),
    "two users": (Message("user", "Well."), FRUIT, CHERRY),
    "call": (FRUIT, CALL, RESULT, TIME),
    "calls as turns": (FRUIT, CALL, OTHER, RESULT, replace(RESULT, content="10:06"), TIME),
    "thought": (FRUIT, THOUGHT, MORE, LEMON),
    "tagged": (FRUIT, CHERRY, MORE, TAGGED),
    "ten": TEN,
}


@dataclass(frozen=True)
class Kind:
    """A template, and what its answers look like behind their prompts."""

    jinja: str
    eos: str
    end: str  # behind an answer
    call: str = ""  # a call; empty: there is no place for one
    call_end: str = ""
    thought: str = "{}{}"  # a thought and an answer
    empty: str = "{}"  # an answer without a thought
    options: Mapping[str, Any] = field(default_factory=dict)
    opened: bool = False  # the prompt is no beginning of the rendered answer
    splits: tuple[str, ...] = ()  # rows of which each answer is a sample
    refused: Mapping[str, str] = field(default_factory=dict)
    drops: bool = False  # it leaves thoughts in a field of their own out


HERMES = '<tool_call>\n{"name": "clock", "arguments": {"city": "CITY"}}\n</tool_call>'


THINK = "<think>\n{}\n</think>\n\n{}"


SEVERAL = ("multi", "system", "two answers", "thought", "tagged", "ten")


NO_TOOLS = dict.fromkeys(("call", "calls as turns"), "no place for tools")


ALTERNATE = dict.fromkeys(("greeting", "two answers", "two users"), "alternate")


R1_CALL = '<|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>clock\n```json\n{"city": "CITY"}\n```<|tool_call_end|><|tool_calls_end|>'


KINDS: dict[str, Kind] = {
    "qwen2.5": Kind(kinds.QWEN25, "<|im_end|>", "<|im_end|>", HERMES, thought=THINK, drops=True, splits=("thought",)),
    "qwen3": Kind(
        kinds.QWEN3, "<|im_end|>", "<|im_end|>", f"<think>\n\n</think>\n\n{HERMES}", thought=THINK, empty="<think>\n\n</think>\n\n{}",
        splits=(*SEVERAL, "call", "calls as turns"),
    ),
    "qwen3, no thinking": Kind(
        kinds.QWEN3, "<|im_end|>", "<|im_end|>", HERMES, options={"enable_thinking": False},
        splits=(*SEVERAL, "greeting", "call", "calls as turns"),
        refused={"thought": "closes the thought", "tagged": "closes the thought"},
    ),
    "qwen3 thinking": Kind(
        kinds.QWEN3_THINKING, "<|im_end|>", "<|im_end|>", f"\n</think>\n\n{HERMES}", thought="{}\n</think>\n\n{}",
        empty="\n</think>\n\n{}", splits=(*SEVERAL, "greeting", "call", "calls as turns"),
    ),
    "r1": Kind(
        kinds.R1, "<|end_of_sentence|>", "<|end_of_sentence|>", f"\n</think>\n\n{R1_CALL}", thought="{}\n</think>\n\n{}",
        empty="\n</think>\n\n{}", drops=True, opened=True, splits=(*SEVERAL, "greeting", "call", "calls as turns"),
    ),
    "v3.1": Kind(
        kinds.V31, "<|end_of_sentence|>", "<|end_of_sentence|>",
        refused={**NO_TOOLS, "thought": "closes the thought", "tagged": "closes the thought"},
    ),
    "v3.1 thinking": Kind(
        kinds.V31, "<|end_of_sentence|>", "<|end_of_sentence|>", thought="{}</think>{}", empty="</think>{}", drops=True,
        options={"thinking": True}, opened=True, splits=(*SEVERAL, "greeting"), refused=NO_TOOLS,
    ),
    "gemma2": Kind(kinds.GEMMA2, "<eos>", "<end_of_turn>", thought=THINK, drops=True, splits=("thought",), refused={**NO_TOOLS, **ALTERNATE}),
    "gemma3": Kind(kinds.GEMMA3, "<eos>", "<end_of_turn>", thought=THINK, drops=True, splits=("thought",), refused={**NO_TOOLS, **ALTERNATE}),
    "mistral": Kind(
        kinds.MISTRAL, "<eos>", "<eos>",
        '[TOOL_CALLS] [{"name": "clock", "arguments": {"city": "CITY"}, "id": "ID"}]', thought=f" {THINK}", empty=" {}", drops=True,
        splits=("system", "thought"), refused=ALTERNATE,
    ),
    "llama3.1": Kind(
        kinds.LLAMA31, "<|eot_id|>", "<|eot_id|>", '{"name": "clock", "parameters": {"city": "CITY"}}', thought=THINK, drops=True,
        splits=("thought",),
    ),
    "glm4.5": Kind(
        kinds.GLM45, "<eos>", "<|user|>",
        "\n<think></think>\n<tool_call>clock\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n</tool_call>", "<|observation|>",
        thought="\n<think>{}</think>\n{}", empty="\n<think></think>\n{}", splits=("thought",),
    ),
    "channels": Kind(
        kinds.CHANNELS, "<|return|>", "<|return|>", " to=functions.clock<|channel|>commentary json<|message|>{\"city\": \"CITY\"}",
        "<|call|>", thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
        empty="<|channel|>final<|message|>{}", splits=(*SEVERAL, "greeting"),
    ),
}  # fmt: skip
