"""Where an answer begins and ends in templates that write it otherwise than their generation prompt says."""

# ruff: noqa: E501  (a table of texts)

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fitune.core.errors import FituneError
from fitune.core.records import Conversation, Message, Source, ToolCall
from fitune.data import labels
from fitune.data.encode import Encoder
from fitune.data.templates.jinja import of_tokenizer
from fitune.models import handover
from support import chat_templates as kinds
from support.encoding import decoded

pytestmark = pytest.mark.unit

SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Sky?"), Message("assistant", "Blue.")
HELLO, MORE = Message("assistant", "Hello."), Message("assistant", "Or grey.")
CALL = Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Rome"}'),))
AGAIN = Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Oslo"}'),))
RESULT, TIME = Message("tool", "10:05"), Message("assistant", "It is five.")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}

CALLS = "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>{% endfor %}"
# the last result of a conversation ends without the line break that the others have, and tools are always listed
LAST_RESULT = (
    "<|system|>{% for t in tools %}{{ t.function.name }}{% endfor %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n{{ m.content }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}<|im_end|>"
    "{% elif m.tool_calls %}<|im_start|>assistant\n" + CALLS + "<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# a result ends in nothing where an answer follows
OPEN_RESULT = LAST_RESULT.replace(
    "{% if not loop.last %}{{ '\n' }}{% endif %}<|im_end|>", "{% if loop.last %}<|im_end|>{{ '\n' }}{% endif %}"
)
# no generation prompt but behind a question
ASKED_ONLY = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>\n"
    "{% if loop.last and m.role == 'user' and add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>{% endif %}{% endfor %}"
)
# a system text of its own, and a generation prompt with words that no given answer has
WORDS = (
    "{% if messages and messages[0].role != 'system' %}<|system|>Think first.\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}"
    "{% if not loop.last %}{{ '\n' }}<|end|>\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\nHere are my steps:\n{% endif %}"
)
# a second answer in a row has no header
NO_SECOND = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% if loop.last and add_generation_prompt %}"
    "<|Assistant|></think>{% endif %}{% elif m.role == 'assistant' %}{% if loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}"
    "<|Assistant|></think>{% endif %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
# a second answer in a row goes on in the turn of the first
ONE_TURN = (
    "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if ns.open %}<|end|>{% set ns.open = false %}{% endif %}<|user|>{{ m.content }}<|eot_id|>"
    "{% else %}{% if not ns.open %}<|assistant|>{% set ns.open = true %}{% endif %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if ns.open %}<|end|>{% endif %}<|assistant|>{% endif %}"
)
# the conversation ends in a token where nothing is to come
CLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<eos>{% endif %}"
)
# the generation prompt is always there, and an answer ends in its own token and in that of its turn
ALWAYS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.first %}<|start|><|assistant|>{% endif %}"
    "{% if m.tool_calls %}<|call|>"
    + CALLS
    + "<|return|><eos>{% else %}<|message|>{{ m.content }}<|end|><eos>{% endif %}"
    "{% if loop.last %}<|start|><|assistant|>{% endif %}"
    "{% else %}<|start|><|{{ m.role }}|>{{ m.content }}<eos>"
    "{% if m.role != 'system' %}<|start|><|assistant|>{% endif %}{% endif %}{% endfor %}"
)
# instructions stand behind the last turn, whoever's it is; a call has no stop before them; tools are always listed
BEHIND = (
    "<|system|>{% for t in tools %}{{ t.function.name }}{% endfor %}<eos>{% for m in messages %}"
    "{% if m.tool_calls %}<|start|><|assistant|>\nAction: " + CALLS + "{{ '\n' }}"
    "{% else %}<|start|><|{{ 'system' if m.role == 'tool' else m.role }}|>{{ m.content }}<eos>{% endif %}{% endfor %}"
    "<|start|><|system|>Write an action.<eos>{% if add_generation_prompt %}<|start|><|assistant|>{% endif %}"
)
# a call ends in a token of its own
CALL_STOP = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
    "{% if m.tool_calls %}<|start|>assistant<|message|>" + CALLS + "<|call|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)

# texts as JSON in ASCII alone
ASCII = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content | tojson(ensure_ascii=true) }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
# no header for an answer that is to come, and no place for a thought
BARE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# texts are lists of parts, as in models that take images
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.content[0].type == 'image' %}<|image|>{% endif %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)

ROME, OSLO = (f'<tool_call>clock {{"city": "{city}"}}</tool_call>' for city in ("Rome", "Oslo"))
CASES: dict[str, tuple[str, tuple[Message, ...], list[tuple[str, str]]]] = {
    "another end of the last result": (
        LAST_RESULT,
        (USER, CALL, RESULT, TIME),
        [("<|im_start|>assistant\n", ROME + "<|im_end|>"), ("10:05<|im_end|><|im_start|>assistant\n", "It is five.<|im_end|>")],
    ),
    "another end of the last result, before a call": (
        LAST_RESULT,
        (USER, CALL, RESULT, AGAIN),
        [("<|im_start|>assistant\n", ROME + "<|im_end|>"), ("10:05<|im_end|><|im_start|>assistant\n", OSLO + "<|im_end|>")],
    ),
    "an open result": (
        OPEN_RESULT,
        (SYSTEM, USER, CALL, RESULT, TIME),
        [("<|im_start|>assistant\n", ROME + "<|im_end|>"), ("10:05<|im_end|>\n<|im_start|>assistant\n", "It is five.<|im_end|>")],
    ),
    "a greeting behind a system text": (
        ASKED_ONLY,
        (SYSTEM, HELLO, USER, ANSWER),
        [("brief.<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>", "Hello.<|eot_id|>"), ("assistant<|end_header_id|>", "Blue.<|eot_id|>")],
    ),
    "a greeting behind the template's own system text": (
        WORDS,
        (HELLO, USER, ANSWER),
        [("<|system|>Think first.\n<|assistant|>\nHere are my steps:\n", "Hello.<|end|>"), ("Here are my steps:\n", "Blue.<|end|>")],
    ),
    "two answers, a blank line before the header": (
        WORDS.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ '\n' }}"),
        (USER, ANSWER, MORE),
        [("Here are my steps:\n", "Blue.<|end|>"), ("Blue.\n<|end|>\n<|assistant|>\nHere are my steps:\n", "Or grey.<|end|>")],
    ),
    "two answers, words in the header": (
        WORDS,
        (USER, ANSWER, MORE),
        [("Here are my steps:\n", "Blue.<|end|>"), ("Blue.\n<|end|>\n<|assistant|>\nHere are my steps:\n", "Or grey.<|end|>")],
    ),
    "a second answer without a header": (
        NO_SECOND,
        (USER, ANSWER, MORE),
        [("<|Assistant|></think>", "Blue.<|end|>"), ("Blue.<|end|>", "Or grey.<|end|>")],
    ),
    "a second answer in the same turn": (
        ONE_TURN,
        (USER, ANSWER, MORE),
        [("<|assistant|>", "Blue.<|end|>"), ("Blue.<|end|><|assistant|>", "Or grey.<|end|>")],
    ),
    "a greeting, and a token that ends the conversation": (
        CLOSED,
        (HELLO, USER, ANSWER),
        [("<|assistant|>\n", "Hello.<|end|>"), ("<|assistant|>\n", "Blue.<|end|>")],
    ),
    "a header that is always there": (
        ALWAYS,
        (USER, CALL, RESULT, TIME),
        [("<|start|><|assistant|>", f"<|call|>{ROME}<|return|><eos>"), ("<|start|><|assistant|>", "<|message|>It is five.<|end|><eos>")],
    ),
    "a greeting, and a header that is always there": (
        ALWAYS,
        (HELLO, USER, ANSWER),
        [("<|start|><|assistant|>", "<|message|>Hello.<|end|><eos>"), ("<|start|><|assistant|>", "<|message|>Blue.<|end|><eos>")],
    ),
    "text behind the answer": (
        BEHIND,
        (USER, CALL, RESULT, TIME),
        [("Write an action.<eos><|start|><|assistant|>", f"\nAction: {ROME}\n<eos>"), ("Write an action.<eos><|start|><|assistant|>", "It is five.<eos>")],
    ),
    "a special token typed into a text that is written in ASCII": (
        ASCII,
        (Message("user", "What is <|end|>?"), Message("assistant", "<|end|> ends it.")),
        [('user<|message|>"What is <|end|>?"<|end|><|start|>assistant<|message|>', '"<|end|> ends it."<|end|>')],
    ),
    "a thought behind the header that an answer brings along": (
        BARE,
        (USER, replace(ANSWER, thought="Clear.")),
        [("Sky?<|im_end|>\n", "<|im_start|>assistant\n<think>\nClear.\n</think>\n\nBlue.<|im_end|>")],
    ),
    "texts as parts": (
        PARTS,
        (SYSTEM, USER, ANSWER, USER, MORE),
        [("system:Be brief.<|im_end|>\n<|im_start|>user:Sky?<|im_end|>\n<|im_start|>assistant:", "Blue.<|im_end|>"), ("assistant:", "Or grey.<|im_end|>")],
    ),
    "a call that ends in a token of its own": (
        CALL_STOP,
        (USER, CALL, RESULT, TIME),
        [("assistant<|message|>", ROME + "<|call|>"), ("assistant<|message|>", "It is five.<|end|>")],
    ),
}  # fmt: skip


def encoder_of(jinja: str) -> Encoder:
    tokenizer = kinds.make_tokenizer(jinja)
    return Encoder(tokenizer, of_tokenizer(tokenizer))


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_its_own_text_and_its_stop(name: str) -> None:
    jinja, messages, wanted = CASES[name]
    encoder = encoder_of(jinja)
    tools = (TOOL,) if "tools" in jinja else ()
    row = Conversation(messages, Source("f", 1), "messages", tools)
    samples = encoder.samples(row)
    decode = partial(decoded, encoder)
    turns = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
    assert "".join(decode(sample.ids[sample.mask]) for sample in samples) == "".join(text for _, text in wanted)
    for turn, (before, _) in zip(turns, wanted, strict=True):
        assert decode(encoder.prompt(messages[:turn], tools)).endswith(before)
    each = [[turn] for turn in turns] if len(samples) > 1 else [turns]
    assert [labels.wrong(encoder, row, sample, some) for sample, some in zip(samples, each, strict=True)] == [""] * len(
        samples
    )


def test_a_template_with_texts_as_parts_is_handed_over(tmp_path: Path) -> None:
    tokenizer = kinds.make_tokenizer(PARTS)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = handover.hand_over(tmp_path, tokenizer, of_tokenizer(tokenizer))
    assert found.proof.holds, found.proof
    assert found.parts


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% include 'base.jinja' %}" + BARE, "include, line 1"),
        ("{% import 'parts.jinja' as parts %}" + BARE, "import, line 1"),
        (BARE.replace("{{ m.role }}", "{{ [m.role, 'x'] | random }}"), "filter random"),
    ],
)
def test_prompts_that_are_not_of_the_templates_text_alone_are_refused(jinja: str, reason: str) -> None:
    encoder = encoder_of(jinja)
    with pytest.raises(FituneError, match=reason):
        encoder.samples(Conversation((USER, ANSWER), Source("f", 1), "messages"))


def test_calls_that_the_template_counts_are_no_wrong_labels() -> None:
    counted = CALLS.replace("<tool_call>", '<tool_call>{"tool_call_id": "{{ messages[:at] | length }}"} ')
    encoder = encoder_of(CALL_STOP.replace(CALLS, "{% set at = loop.index0 %}" + counted))
    row = Conversation((USER, CALL, RESULT, AGAIN, RESULT, TIME), Source("f", 1), "messages", (TOOL,))
    (sample,) = encoder.samples(row)
    assert '"tool_call_id": "3"' in decoded(encoder, sample.ids[sample.mask])
    assert labels.wrong(encoder, row, sample, [1, 3, 5]) == ""


def test_what_ends_calls_ends_generation_too() -> None:
    encoder = encoder_of(CALL_STOP)
    assert encoder.template.other_stops == ("<|call|>",)
    stops = [encoder.tokenizer.convert_tokens_to_ids(one) for one in ("<|end|>", "<|call|>")]
    assert set(stops) <= set(encoder.stop_ids)


def test_a_template_that_fails_without_tools_is_handed_over(tmp_path: Path) -> None:
    """What is typed at the edges of a message is tried with a tool then."""
    tokenizer = kinds.make_tokenizer(LAST_RESULT.replace("{% for t in tools %}", "{% for t in tools + [] %}"))
    with pytest.raises(FituneError):
        Encoder(tokenizer, of_tokenizer(tokenizer)).prompt([USER])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = handover.hand_over(tmp_path, tokenizer, of_tokenizer(tokenizer))
    assert found.written
    assert "tools" in found.proof.same
