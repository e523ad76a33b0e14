"""A thought is there once, as its family writes it, whatever the prompt has opened or closed before it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fitune.core.errors import DataError
from fitune.core.records import Conversation, Message, Source
from fitune.data.encode import Encoder
from fitune.data.templates.jinja import of_tokenizer
from support import chat_templates as kinds

pytestmark = pytest.mark.unit

ASKED, FIVE = Message("user", "2+3?"), Message("assistant", "Five.")
THOUGHT = replace(FIVE, thought="Two and three.")
INLINE = replace(FIVE, content="<think>\nTwo and three.\n</think>\n\nFive.")
EMPTY = replace(FIVE, content="<think>\n\n</think>\n\nFive.")
CODE = replace(FIVE, content="    return x\nelse: y")
MENTION = replace(FIVE, content="The tag </think> closes.")

LOOP = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
ASK = "<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
# DeepSeek V3.1: any answer has an empty thought, the one to come may have an open one
V31 = (
    LOOP
    + "<|assistant|><think></think>{{ m.content.split('</think>', 1)[-1] }}"
    + ASK
    + "{{ '<think>' if thinking else '<think></think>' }}{% endif %}"
)
# DeepSeek V3.2: an answer without a thought has a closing tag, its prompt both; a second in a row has no header
V32 = (
    LOOP + "{% if not loop.first and loop.previtem.role == 'user' %}<|assistant|>{{ '<think>' if thinking }}"
    "{{ m.reasoning_content if thinking }}</think>{% endif %}{{ m.content }}"
    + ASK
    + "{{ '<think>' if thinking else '<think></think>' }}{% endif %}"
)
# Kimi K2: all answers have an empty one, and nobody's thought is read
KIMI = LOOP + "<|assistant|><think></think>{{ m.content }}" + ASK + "{% endif %}"
# Spark: a prompt that opens a thought, a field for it, and a closing tag where it is empty
SPARK = (
    LOOP
    + "<|assistant|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}{% endif %}</think>{{ m.content }}"
    + ASK
    + "<think>{% endif %}"
)
# Ministral: parts of the content
PARTS = (
    LOOP + "<|assistant|>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}{% endfor %}{% endif %}"
    + ASK
    + "{% endif %}"
)
# Nemotron: opens a thought before the last answer too, and never closes it
NANO = LOOP + "<|assistant|>{{ '<think>\n' if loop.last }}{{ m.content }}" + ASK + "<think>\n{% endif %}"
# QwQ: opens it in the prompt alone
QWQ = LOOP + "<|assistant|>{{ m.content }}" + ASK + "<think>\n{% endif %}"
# Command A: tags of its own, and tags around the answer
COMMAND = (
    LOOP + "<|assistant|>{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>"
    "{% endif %}<|START_TEXT|>{{ m.content }}" + ASK + "<|START_THINKING|>{% endif %}"
)
# Command R7B: the same without a field
COMMAND7 = LOOP + "<|assistant|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>" + ASK + "{% endif %}"
COMMAND7 += "{# <|START_THINKING|><|END_THINKING|> #}"
# Gemma 4: thoughts beside calls only, in no tags of those kinds
CHANNEL = (
    LOOP + "<|assistant|>{% for c in m.tool_calls or [] %}<|channel|>{{ m.reasoning_content }}<|end|>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}" + ASK + "{% endif %}"
)


def trained(jinja: str, answer: Message, **options: Any) -> str:
    tokenizer = kinds.make_tokenizer(jinja)
    encoder = Encoder(tokenizer, of_tokenizer(tokenizer, options=options))
    (sample,) = encoder.samples(Conversation((ASKED, answer), Source("f", 1), "messages"))
    return str(tokenizer.decode(sample.ids[sample.mask])).removesuffix("<eos>")


THINKING = {"thinking": True}
BARE, LINES = "Two and three.</think>Five.", "Two and three.\n</think>\n\nFive."


@pytest.mark.parametrize(
    ("jinja", "answer", "options", "expected"),
    [
        (V31, THOUGHT, THINKING, BARE),
        (V31, INLINE, THINKING, BARE),
        (V31, FIVE, THINKING, "</think>Five."),
        (V31, FIVE, {}, "Five."),
        (V32, FIVE, {}, "Five."),
        (V32, CODE, {}, CODE.content),
        (V32, EMPTY, {}, "Five."),
        (V32, THOUGHT, THINKING, BARE),
        (V32, INLINE, THINKING, BARE),
        (V32, FIVE, THINKING, "</think>Five."),
        (KIMI, THOUGHT, {}, f"<think>{BARE}"),
        (KIMI, INLINE, {}, f"<think>{BARE}"),
        (KIMI, FIVE, {}, "<think></think>Five."),
        (KIMI, EMPTY, {}, "<think></think>Five."),
        (KIMI, MENTION, {}, f"<think></think>{MENTION.content}"),
        (SPARK, THOUGHT, {}, BARE),
        (SPARK, INLINE, {}, BARE),
        (SPARK, FIVE, {}, "</think>Five."),
        (SPARK, MENTION, {}, MENTION.content),
        (PARTS, THOUGHT, {}, "[THINK]Two and three.[/THINK]Five."),
        (PARTS, FIVE, {}, "Five."),
        (NANO, FIVE, {}, "\n</think>\n\nFive."),
        (NANO, CODE, {}, f"\n</think>\n\n{CODE.content}"),
        (NANO, THOUGHT, {}, LINES),
        (NANO, INLINE, {}, LINES),
        (NANO, EMPTY, {}, "\n</think>\n\nFive."),
        (QWQ, FIVE, {}, "\n</think>\n\nFive."),
        (QWQ, CODE, {}, f"\n</think>\n\n{CODE.content}"),
        (QWQ, replace(CODE, thought="Two and three."), {}, f"Two and three.\n</think>\n\n{CODE.content}"),
        (QWQ, INLINE, {}, LINES),
        (COMMAND7, FIVE, {}, "<|START_RESPONSE|>Five.<|END_RESPONSE|>"),
        (
            COMMAND7,
            THOUGHT,
            {},
            "<|START_THINKING|>Two and three.<|END_THINKING|><|START_RESPONSE|>Five.<|END_RESPONSE|>",
        ),
        (COMMAND, FIVE, {}, "<|END_THINKING|><|START_TEXT|>Five."),
        (COMMAND, THOUGHT, {}, "Two and three.<|END_THINKING|><|START_TEXT|>Five."),
        (COMMAND, INLINE, {}, "Two and three.<|END_THINKING|><|START_TEXT|>Five."),
    ],
)
def test_a_thought_is_trained_once_as_its_family_writes_it(
    jinja: str, answer: Message, options: dict[str, Any], expected: str
) -> None:
    assert trained(jinja, answer, **options) == expected


@pytest.mark.parametrize("jinja", [V31, V32])
def test_a_thought_behind_a_prompt_that_has_closed_it_is_refused(jinja: str) -> None:
    for answer in (THOUGHT, INLINE):
        with pytest.raises(DataError, match="the template closes the thought"):
            trained(jinja, answer)


def test_a_thought_that_the_answer_repeats_is_written_all_the_same() -> None:
    """A template that drops thoughts: that "Five." stands in the answer does not mean that the thought was written."""
    assert trained(QWQ, replace(FIVE, thought="Five.")) == "Five.\n</think>\n\nFive."
    assert trained(KIMI, replace(FIVE, thought="Five.")) == "<think>Five.</think>Five."


def test_a_thought_that_is_written_beside_calls_in_no_known_tags_has_no_place_there() -> None:
    tokenizer = kinds.make_tokenizer(CHANNEL)
    renderer = of_tokenizer(tokenizer)._renderers["default"]
    assert renderer.takes_calls
    assert renderer.thought_place != "field"


def test_a_second_answer_stands_behind_the_first_where_the_thought_was_closed() -> None:
    tokenizer = kinds.make_tokenizer(V32)
    encoder = Encoder(tokenizer, of_tokenizer(tokenizer))
    samples = encoder.samples(Conversation((ASKED, FIVE, replace(FIVE, content="Or so.")), Source("f", 1), "messages"))
    assert "Five." in tokenizer.decode(samples[-1].ids)
    assert tokenizer.decode(samples[-1].ids[samples[-1].mask]).endswith("Or so.<eos>")
    assert not any("</think>" in tokenizer.decode(sample.ids[sample.mask]) for sample in samples)
