"""One contract for every kind of published chat template: what is trained is what is served."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fitune.commands.chat import Chat
from fitune.core.errors import FituneError
from fitune.core.records import Conversation, Message, Sample, Source, ToolCall
from fitune.data.conversations import to_conversation
from fitune.data.encode import Encoder
from fitune.data.templates.jinja import of_tokenizer
from fitune.data.tokenizer import load
from fitune.models import families
from fitune.models.load import Tuned
from support import chat_templates as kinds
from support import tiny
from support.encoding import decoded
from support.template_rows import (
    CALL,
    CHERRY,
    FRUIT,
    HELLO,
    KINDS,
    RESULT,
    ROWS,
    SYSTEM,
    TAGGED,
    TEN,
    THINK,
    THOUGHT,
    TIME,
    TOOL,
    Kind,
)

IDS = re.compile(r"call\d{5}")  # of calls, where a template asks for them


NO_THOUGHT = {"thought": "no place for a thought"}


@lru_cache
def encoder_of(name: str) -> Encoder:
    kind = KINDS[name]
    tokenizer = kinds.make_tokenizer(kind.jinja, kind.eos)
    return Encoder(tokenizer, of_tokenizer(tokenizer, options=kind.options))


def row_of(name: str, *, listed: bool = True) -> Conversation:
    tools = (TOOL,) if name.startswith("call") and listed else ()
    return Conversation(ROWS[name], Source("f.jsonl", 1), "messages", tools)


def expected(kind: Kind, messages: tuple[Message, ...], turn: int) -> str:
    """The labels of an answer."""
    message = messages[turn]
    end = (message.tool_calls and kind.call_end) or kind.end
    if kind.jinja is kinds.GLM45 and messages[turn + 1 : turn + 2]:  # the next role's token, where it is no answer's
        end = {"user": "<|user|>", "tool": "<|observation|>"}.get(messages[turn + 1].role, "")
    if message.tool_calls:
        return kind.call.replace("CITY", json.loads(message.tool_calls[0].arguments)["city"]) + end
    if message is TAGGED and kind.jinja is kinds.CHANNELS:  # knows no such tags
        return kind.empty.format(message.content) + end
    if kind.jinja is kinds.R1 and messages[turn - 1].role == "tool":  # no thought is opened behind results
        return message.content + end
    thought = message.thought or ("Lemons are yellow." if message is TAGGED else "")
    text = message.content.rpartition("\n")[2]
    empty = "{}" if messages[0] is HELLO and turn == 0 and kind.jinja == kinds.QWEN3 else kind.empty
    return (kind.thought.format(thought, text) if thought else empty.format(text)) + end


def each_sample(encoder: Encoder, row: Conversation) -> list[tuple[Sample, list[int]]]:
    """The samples of a row, each with the turns that it trains."""
    answers = [turn for turn, message in enumerate(row.messages) if message.role == "assistant"]
    samples = encoder.samples(row)
    assert len(samples) == (len(answers) if encoder.one_answer_per_sample(row) else 1)
    turns = [[turn] for turn in answers] if len(samples) > 1 else [answers]
    return list(zip(samples, turns, strict=True))


CASES = [(kind, row) for kind in KINDS for row in ROWS]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_contract(name: str, case: str) -> None:
    kind, row, encoder = KINDS[name], row_of(case, listed=name != "r1"), encoder_of(name)
    decode = partial(decoded, encoder)
    if case in kind.refused:
        with pytest.raises(FituneError, match=kind.refused[case]):
            encoder.samples(row)
        return
    assert encoder.one_answer_per_sample(row) == (case in kind.splits)
    for sample, turns in each_sample(encoder, row):
        for turn in turns:
            prompt = encoder.prompt(row.messages[:turn], row.tools)
            assert sample.ids[: len(prompt)].tolist() == prompt  # chat asks what was trained
            assert sample.mask[len(prompt)]
            assert not sample.mask[len(prompt) - 1] or (name == "mistral" and row.messages[turn - 1].tool_calls)
        wanted = "".join(expected(kind, row.messages, turn) for turn in turns)
        assert IDS.sub("ID", decode(sample.ids[sample.mask])) == wanted
        served(encoder, kind, row, sample, turns[-1])


def served(encoder: Encoder, kind: Kind, row: Conversation, sample: Sample, turn: int) -> None:
    """The ids are those of transformers up to the stop token; where it does not render the answer behind its prompt, or
    not its thought, those of the prompt."""
    messages = [as_openai(kind, m, n, last=n == turn) for n, m in enumerate(row.messages)]
    if kind.jinja is kinds.GEMMA2 and messages[0]["role"] == "system":
        rules = messages.pop(0)["content"]
        messages[0]["content"], turn = f"{rules}\n\n{messages[0]['content']}", turn - 1
    how = {"tools": list(row.tools) or None, "tokenize": True, "return_dict": False, **kind.options}
    apply, ids = encoder.tokenizer.apply_chat_template, sample.ids.tolist()
    if rendered_so(kind, row, turn):
        whole = apply(messages[: turn + 1], **how)
        ids = ids[:-1] if kind.jinja is kinds.GLM45 else ids  # it writes no stop
        assert whole[: len(ids)] == ids
        assert not decoded(encoder, whole[len(ids) :]).strip()
    elif turn and messages[turn - 1]["role"] != "assistant" and not any("tool_calls" in m for m in messages[:turn]):
        prompt = apply(messages[:turn], add_generation_prompt=True, **how)
        assert ids[: len(prompt)] == prompt


def rendered_so(kind: Kind, row: Conversation, turn: int) -> bool:
    """Does the rendering with an answer begin with its prompt?"""
    first = row.messages[0]
    if kind.jinja is kinds.MISTRAL:
        return first is not SYSTEM  # which the template leaves out once there is an answer
    # a greeting has no thought in Qwen3, whatever the header of other answers says of one
    header = kind.options.get("enable_thinking") is False or kind.jinja is kinds.QWEN3_THINKING
    return not kind.opened and not (first is HELLO and turn == 0 and header)


def as_openai(kind: Kind, message: Message, turn: int, *, last: bool) -> dict[str, Any]:
    """A message as transformers gets it; where the template has no place for a thought, earlier answers go without."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thought and kind.drops and last:
        values["content"] = THINK.format(message.thought, message.content)
    elif message.thought and not kind.drops:
        values["reasoning_content"] = message.thought
    if message.tool_calls:
        function = {"name": "clock", "arguments": json.loads(message.tool_calls[0].arguments)}
        values["tool_calls"] = [{"type": "function", "function": function, "id": f"call{turn:03d}00"}]
    if message.role == "tool":
        values["tool_call_id"] = f"call{turn - 1 if turn == 2 else turn - 2:03d}00"
    return values


@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_answers_is_ever_trained(name: str) -> None:
    """No header, no system text of the template's own, nothing that others said, whatever stands before an answer."""
    kind, encoder = KINDS[name], encoder_of(name)
    for case in ROWS.keys() - kind.refused.keys():
        row = row_of(case, listed=name != "r1")
        for sample, _ in each_sample(encoder, row):
            trained = decoded(encoder, sample.ids[sample.mask])
            for text in (
                "You are",
                "Today",
                "date",
                "Be brief",
                "fruit?",
                "10:05",
                "Question",
                "start_header",
                "|User",
            ):
                assert text not in trained, (case, trained)


@pytest.mark.parametrize("name", KINDS)
def test_what_somebody_typed_is_no_control_token(name: str) -> None:
    kind, encoder = KINDS[name], encoder_of(name)
    special = set(map(encoder.tokenizer.convert_tokens_to_ids, encoder.tokenizer.all_special_tokens))
    calm = row_of("multi").messages
    wild = tuple(replace(m, content=f"{m.content} {kind.end}<|im_start|><|User|>[INST]{kind.eos} it") for m in calm)
    found, wanted = (
        [[int(i) for i in sample.ids if int(i) in special] for sample in encoder.samples(Conversation(messages))]
        for messages in (wild, calm)
    )
    assert found == wanted


def test_a_text_beside_the_templates_own_is_encoded_as_it_is_served() -> None:
    """ "five." and the line break of the template behind it are one token, as for whoever renders the conversation."""
    encoder = encoder_of("qwen3")
    (sample,) = encoder.samples(Conversation((FRUIT, replace(CHERRY, thought="Two make five."))))
    pieces = encoder.tokenizer.convert_ids_to_tokens(sample.ids[sample.mask].tolist())
    assert ".Ċ" in pieces


# ---- a conversation that goes on ----


def tuned_of(monkeypatch: pytest.MonkeyPatch, name: str, say: Any) -> Tuned:
    """A model that says what `say` gives for the ids of a prompt."""
    encoder = encoder_of(name)
    model = tiny.make_model("llama")

    def generate(tuned: Tuned, prompts: list[list[int]], *_: object, **__: object) -> list[list[int]]:
        return [encoder.tokenizer(say(ids), add_special_tokens=False)["input_ids"] for ids in prompts]

    monkeypatch.setattr("fitune.engine.generation._generate", generate)
    return Tuned(model, encoder.tokenizer, encoder.template, encoder, families.of(model))


@pytest.mark.parametrize("thought", ["", "Let me see."])
@pytest.mark.parametrize("name", KINDS)
def test_a_chat_of_ten_turns_asks_what_was_trained(name: str, thought: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, encoder = KINDS[name], encoder_of(name)
    if thought and "thought" in kind.refused:
        return
    messages = tuple(replace(m, thought=thought) if m.role == "assistant" else m for m in TEN)
    trained = [
        (sample.ids[: at.start].tolist(), decoded(encoder, sample.ids[at]).removesuffix(kind.end))
        for sample in encoder.samples(Conversation(messages))
        for at in runs(sample)
    ]
    asked: list[list[int]] = []

    def say(prompt: list[int]) -> str:
        asked.append(prompt)
        return trained[len(asked) - 1][1]

    chat = Chat(tuned_of(monkeypatch, name, say))
    for message in messages[::2]:
        chat.say(message.content)
    assert asked == [prompt for prompt, _ in trained]
    assert len(asked) == 10
    assert [turn.content.strip() for turn in chat.history[1::2]] == [f"Answer {n}." for n in range(10)]
    assert {turn.thought for turn in chat.history[1::2]} == {thought}


def runs(sample: Sample) -> list[slice]:
    """Where the labels of each answer stand."""
    edges = np.flatnonzero(np.diff(sample.mask.astype(np.int8), prepend=0, append=0))
    return [slice(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@pytest.mark.shared
def test_the_cases_on_a_real_vocabulary(shared: Path) -> None:
    tokenizer = load(shared / "tokenizers" / "qwen2")
    row, _ = (
        to_conversation(json.loads(line), Source("multi.jsonl", n))
        for n, line in enumerate((shared / "cases" / "multi.jsonl").read_text().splitlines(), 1)
    )
    last, opened = ((shared / "cases" / f"think-{name}.jinja").read_text() for name in ("last-turn", "in-prompt"))

    def trained(jinja: str, **how: Any) -> list[str]:
        tokenizer.chat_template = jinja
        encoder = Encoder(tokenizer, of_tokenizer(tokenizer), **how)
        return [tokenizer.decode(sample.ids[sample.mask]) for sample in encoder.samples(row)]

    fruits = ("A cherry.", "A lemon.")
    assert trained(last) == [f"<think>\n\n</think>\n\n{fruit}<|im_end|>" for fruit in fruits]
    assert trained(last, train_on="last") == ["<think>\n\n</think>\n\nA lemon.<|im_end|>"]
    assert trained(opened) == [f"\n</think>\n\n{fruit}<|im_end|>" for fruit in fruits]


def test_ids_of_calls_are_those_of_the_row_where_the_template_takes_them() -> None:
    """Mistral's are nine letters and digits; those of another form give way to some that are right."""
    encoder = encoder_of("mistral")

    def trained(number: str) -> str:
        call = replace(CALL, tool_calls=(replace(CALL.tool_calls[0], id=number),))
        row = Conversation((FRUIT, call, replace(RESULT, call_id=number), TIME), Source("f", 1), "messages", (TOOL,))
        (sample,) = encoder.samples(row)
        return decoded(encoder, sample.ids)

    assert trained("abc123XYZ").count("abc123XYZ") == 2
    assert "call_Zk2" not in trained("call_Zk2mW")
    assert IDS.search(trained("call_Zk2mW"))
    assert "<eos>" not in trained("<eos>abcd").split("[TOOL_CALLS]")[1].split("]<eos>")[0]  # an id is no control token


def test_names_and_ids_reach_the_template() -> None:
    """A template that writes them all, without asking for them."""
    jinja = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% elif m.role == 'tool' %}<|observation|>{{ m.name }} {{ m.tool_call_id }} {{ m.content }}"
        "{% else %}<|assistant|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.id }} "
        "{{ c.function.arguments | tojson }}{% endfor %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = kinds.make_tokenizer(jinja)
    encoder = Encoder(tokenizer, of_tokenizer(tokenizer))
    call = {"id": "c-7", "type": "function", "function": {"name": "clock", "arguments": {"city": "Rome"}}}
    given = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "tool_call_id": "c-7", "content": "10:05"},
        {"role": "assistant", "content": "It is 10:05."},
    ]
    (sample,) = encoder.samples(to_conversation({"messages": given}, Source("f", 1)))
    assert sample.ids.tolist() == tokenizer.apply_chat_template(given, tokenize=True, return_dict=False)


def test_a_thought_behind_a_prompt_that_opened_it_has_one_opening_tag() -> None:
    """A template that opens the thought and writes the last answer as it is given behind it (Nemotron Nano)."""
    jinja = (
        "{% set last = messages[-1].role == 'assistant' %}"
        "{% for m in (messages[:-1] if last else messages) %}"
        "{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] | trim }}<eos>{% endif %}{% endfor %}"
        "{% if last %}<|assistant|><think>\n{{ messages[-1].content | trim }}<eos>"
        "{% elif add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    tokenizer = kinds.make_tokenizer(jinja)
    encoder = Encoder(tokenizer, of_tokenizer(tokenizer))
    for answer in (
        THOUGHT,
        replace(TAGGED, content=TAGGED.content.replace("Lemons are yellow", "Cherries are fruits")),
    ):
        row = Conversation((FRUIT, answer), Source("f", 1), "messages")
        (sample,) = encoder.samples(row)
        text = tokenizer.decode(sample.ids[sample.mask])
        assert text.startswith("Cherries are fruits.\n</think>\n\nA ")
        assert tokenizer.decode(sample.ids).count("<think>") == 1


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.call and name != "r1"])
def test_what_stands_in_calls_and_tools_is_no_control_token(name: str) -> None:
    """Arguments, names and descriptions: an answer that ends in the middle of its JSON would be learned."""
    kind, encoder = KINDS[name], encoder_of(name)
    typed = kind.end

    def ids(text: str) -> list[int]:
        call = replace(CALL, tool_calls=(ToolCall("clock", json.dumps({"city": f"a{text}b"})),))
        tool = {"type": "function", "function": {**TOOL["function"], "description": f"The {text} time."}}
        row = Conversation((FRUIT, call, RESULT, TIME), Source("f", 1), "messages", (tool,))
        return [int(i) for sample in encoder.samples(row) for i in sample.ids]

    number = encoder.tokenizer.convert_tokens_to_ids(typed)
    assert number is not None
    assert ids(typed).count(number) == ids("plain").count(number)
    assert decoded(encoder, ids(typed)).count(f"a{typed}b")
