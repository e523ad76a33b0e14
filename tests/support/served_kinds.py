"""Kinds of chat templates in the table of docs/templates.md, and what an answer of each looks like behind its prompt."""

# ruff: noqa: E501  (a table of texts)

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from support import chat_templates as jinja
from support.served_rows import Turn


@dataclass(frozen=True)
class Kind:
    """A template, and how a model of its kind writes an answer.

    Args:
        jinja: the template.
        eos, end, call_end: the tokenizer's EOS, and the token behind an answer and behind one that calls.
        call: one call with `CITY` in it; calls: around all of them; between: two of them; beside: between
            text and calls.
        thought, empty: an answer with a thought, and without one.
        bare_call: a call has nothing of `empty` before it.
        options: variables that the template reads.
        drops: a thought in a field of its own is left out, so a model's own stands between tags.
        opens: prompts end in an opened thought.
        own_tags: a thought between `<think>` and `</think>` in the text is written as its own. written: a thought in the text.
        text_arguments: arguments of calls are wanted as text. none_content: a call's content is wanted as none
            (transformers' `apply_chat_template` leaves such a key out, and then R1's own template writes no call).
        lists_tools: False: there are calls, but no list of tools.
        moves: no place for a system text, which goes into the first question.
        ends_in_nothing: behind the last answer there is no token.
        named: of fitune's table; then served by what the hand-over writes, or by ChatGLM's published format.
        as_llama: the vocabulary has BOS, and line breaks are tokens of their own.
    """

    jinja: str
    eos: str
    end: str
    call: str = ""
    call_end: str = ""
    calls: str = "{}"
    between: str = "\n"
    beside: str = "\n"
    thought: str = "<think>\n{}\n</think>\n\n{}"
    empty: str = "{}"
    bare_call: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = False
    opens: bool = False
    own_tags: bool = False
    written: str = "<think>\n{}\n</think>\n\n{}"
    text_arguments: bool = False
    none_content: bool = False
    lists_tools: bool = True
    moves: bool = False
    ends_in_nothing: bool = False
    named: str = ""
    as_llama: bool = False

    def answer(self, turn: Turn, prompt: str) -> str:
        """An answer as a model writes it behind a prompt, with its stop token."""
        thought, content = turn.get("reasoning_content", ""), turn["content"] or ""
        opened = prompt.rstrip().endswith("<think>")
        if content.startswith("<think>") or (opened and not thought and "</think>" in content):
            thought, content = content.removeprefix("<think>").split("</think>")
            thought, content = thought.strip(), content.lstrip()
        made = self.between.join(self.call.replace("CITY", _city(call)) for call in turn.get("tool_calls", ()))
        calls = self.calls.format(made) if made else ""
        text, end = self.beside.join(filter(None, (content, calls))), (calls and self.call_end) or self.end
        if self.opens and not opened:  # behind results R1 opens no thought
            return text + end
        if thought:
            return (self.thought.lstrip(" ") if calls else self.thought).format(thought, text) + end
        return (text if calls and self.bare_call else self.empty.format(text)) + end


def _city(call: Turn) -> str:
    given = call["function"]["arguments"]
    return str((json.loads(given) if isinstance(given, str) else given)["city"])


HERMES = '<tool_call>\n{"name": "clock", "arguments": {"city": "CITY"}}\n</tool_call>'
R1_CALL = '<|tool_call_begin|>function<|tool_sep|>clock\n```json\n{"city": "CITY"}\n```<|tool_call_end|>'
FUNCTION = "<tool_call>\n<function=clock>\n<parameter=city>\nCITY\n</parameter>\n</function>\n</tool_call>"
V31_CALL = '<|tool_call_begin|>clock<|tool_sep|>{"city": "CITY"}<|tool_call_end|>'
GEMMA4_CALL, CHANNEL = '<|tool_call>call:clock{city:<|"|>CITY<|"|>}<tool_call|>', "<|channel>thought\n{}\n<channel|>{}"
STARTED = "<|thought_start|>\n{}\n<|thought_end|>\n{}"
QWEN35, GEMMA4, V31 = jinja.read("qwen3.5"), jinja.read("gemma4"), jinja.read("deepseek-v3.1")
IM, SENTENCE = ("<|im_end|>",) * 2, ("<|end_of_sentence|>",) * 2

KINDS: dict[str, Kind] = {
    "Qwen2.5": Kind(jinja.QWEN25, *IM, HERMES, drops=True),
    "Qwen3": Kind(jinja.QWEN3, *IM, HERMES, empty="<think>\n\n</think>\n\n{}"),
    "Qwen3, enable_thinking=false": Kind(jinja.QWEN3, *IM, HERMES, options={"enable_thinking": False}),
    "Qwen3 Thinking": Kind(
        jinja.QWEN3_THINKING, *IM, HERMES, thought="{}\n</think>\n\n{}", empty="\n</think>\n\n{}", opens=True
    ),
    "Qwen3.5": Kind(QWEN35, *IM, FUNCTION, thought="{}\n</think>\n\n{}", empty="\n</think>\n\n{}", opens=True),
    "Qwen3.5, enable_thinking=false": Kind(QWEN35, *IM, FUNCTION, options={"enable_thinking": False}),
    "DeepSeek-R1": Kind(
        jinja.R1, *SENTENCE, R1_CALL, calls="<|tool_calls_begin|>{}<|tool_calls_end|>", thought="{}\n</think>\n\n{}",
        empty="\n</think>\n\n{}", drops=True, opens=True, text_arguments=True, none_content=True, lists_tools=False,
    ),
    "DeepSeek-R1-0528": Kind(
        jinja.read("deepseek-r1-0528"), *SENTENCE, R1_CALL, calls="<|tool_calls_begin|>{}<|tool_calls_end|>", beside="",
        thought="{}\n</think>\n\n{}", empty="\n</think>\n\n{}", drops=True, opens=True, text_arguments=True, lists_tools=False,
    ),
    "DeepSeek-V3.1": Kind(V31, *SENTENCE, text_arguments=True, lists_tools=False),
    "DeepSeek-V3.1, thinking=true": Kind(
        V31, *SENTENCE, V31_CALL, calls="<|tool_calls_begin|>{}<|tool_calls_end|>", between="", beside="", thought="{}</think>{}", empty="</think>{}",
        drops=True, opens=True, written="<think>{}</think>{}", options={"thinking": True}, text_arguments=True, lists_tools=False,
    ),
    "Llama-3.1 to 3.3": Kind(
        jinja.LLAMA31, "<|eot_id|>", "<|eot_id|>", '{"name": "clock", "parameters": {"city": "CITY"}}', drops=True
    ),
    "Phi-4": Kind(jinja.read("phi4"), *IM, drops=True),
    "Phi-4-mini": Kind(
        jinja.read("phi4-mini"), "<|endoftext|>", "<|end|>", '<|tool_call|>{"name": "clock", "arguments": {"city": "CITY"}}<|/tool_call|>',
        between="", drops=True,
    ),
    "Gemma 2": Kind(jinja.GEMMA2, "<eos>", "<end_of_turn>", drops=True, moves=True),
    "Gemma 3": Kind(jinja.GEMMA3, "<eos>", "<end_of_turn>", drops=True),
    "Gemma 4": Kind(GEMMA4, "<eos>", "<turn|>", GEMMA4_CALL, "<|tool_response>", between="", thought=CHANNEL, own_tags=True),
    "Gemma 4, enable_thinking=true": Kind(
        GEMMA4, "<eos>", "<turn|>", GEMMA4_CALL, "<|tool_response>", between="", thought=CHANNEL, own_tags=True, options={"enable_thinking": True}
    ),
    "Mistral v0.3": Kind(
        jinja.MISTRAL, "<eos>", "<eos>", '{"name": "clock", "arguments": {"city": "CITY"}, "id": "call00001"}',
        calls="[TOOL_CALLS] [{}]", between=", ", thought=" <think>\n{}\n</think>\n\n{}", empty=" {}", bare_call=True, drops=True,
    ),
    "Mistral Small 3.1": Kind(
        jinja.read("mistral-small"), "<eos>", "<eos>", '{"name": "clock", "arguments": {"city": "CITY"}, "id": "call00001"}',
        calls="[TOOL_CALLS] [{}]", between=", ", drops=True,
    ),
    "MiniCPM": Kind(jinja.read("minicpm"), "<eos>", "<eos>", drops=True, ends_in_nothing=True),
    "MiniCPM3": Kind(
        jinja.read("minicpm3"), *IM, 'clock(city="CITY")\n', calls="<|tool_call_start|>\n```python\n{}```\n<|tool_call_end|>\n", between="",
        thought=STARTED, written=STARTED, drops=True,
    ),
    "MiniCPM4 (plain ChatML)": Kind(jinja.read("minicpm4"), *IM, drops=True),
    "GLM-4.5": Kind(
        jinja.GLM45, "<eos>", "<|user|>", "<tool_call>clock\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n</tool_call>",
        "<|observation|>", thought="\n<think>{}</think>\n{}", empty="\n<think></think>\n{}", ends_in_nothing=True,
    ),
    "GLM-4.5, enable_thinking=false": Kind(
        jinja.GLM45, "<eos>", "<|user|>", "<tool_call>clock\n<arg_key>city</arg_key>\n<arg_value>CITY</arg_value>\n</tool_call>",
        "<|observation|>", empty="\n{}", ends_in_nothing=True, options={"enable_thinking": False},
    ),
    "gpt-oss": Kind(
        jinja.read("gpt-oss"), "<|return|>", "<|return|>",
        ' to=functions.clock<|channel|>commentary json<|message|>{"city": "CITY"}', "<|call|>", bare_call=True,
        thought="<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
        empty="<|channel|>final<|message|>{}",
    ),
    **{f"`--template {name}`": Kind("", "<eos>", "<|im_end|>", HERMES, named=name) for name in ("chatml", "qwen")},
    "`--template llama3`": Kind("", "<eos>", "<|eot_id|>", named="llama3"),
    **{
        f"`--template {name}`": Kind("", "<eos>", "<eos>", named=name, as_llama=True)
        for name in ("llama2", "alpaca", "alpaca-zh")
    },
    **{f"`--template {name}`": Kind("", "<eos>", "<eos>", named=name) for name in ("bloom", "plain")},
    "`--template chatglm`": Kind("", "<eop>", "<eop>", named="chatglm", ends_in_nothing=True),
    "`--template chatglm2`": Kind("", "</s>", "</s>", named="chatglm2", ends_in_nothing=True),
    "`--template chatglm3`": Kind(
        "", "</s>", "</s>", "", "<|observation|>", named="chatglm3", ends_in_nothing=True,
    ),
}  # fmt: skip
