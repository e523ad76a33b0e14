"""Templates: the exact text of each named one, tools, a user's own, and what is trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fitune.core.errors import ConfigError, DataError, Problems
from fitune.core.records import Conversation, DataReport, Message, Segment, ToolCall
from fitune.data.batches import flat
from fitune.data.encode import Encoder
from fitune.data.fitting import counted
from fitune.data.templates import TABLE, ChatTemplate, PieceTemplate, Template, choose, from_dict
from fitune.data.templates.chatglm import TOOL_SYSTEM
from support import tiny
from support.encoding import decoded, sample_of

pytestmark = pytest.mark.unit

SYSTEM, HI, HELLO = Message("system", "Be brief."), Message("user", "hi"), Message("assistant", "hello")
BYE, SEE_YOU = Message("user", "bye"), Message("assistant", "see you")
TALK = (HI, HELLO, BYE, SEE_YOU)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}},
}
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "北京"}'),))
RESULT = Message("tool", '{"sky": "晴"}')
TOOL_TALK = (HI, CALL, RESULT, HELLO)


def text_of(segments: list[Segment]) -> str:
    """A rendering as one text: stop tokens as ⏹, BOS as ▶, tokens by their names."""
    marks = {"stop": "⏹", "bos": "▶"}
    return "".join(s.token or marks.get(s.role, s.text) for s in segments)


# ---- the exact text of each named template ----

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_ZH = "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n"
EXACT: dict[str, dict[str, str]] = {
    "alpaca": {
        "single": f"▶{ALPACA}### Instruction:\nhi\n\n### Response:\nhello⏹",
        "system": f"▶Be brief.\n\n{ALPACA}### Instruction:\nhi\n\n### Response:\nhello⏹",
        "multi": f"▶{ALPACA}### Instruction:\nhi\n\n### Response:\nhello⏹\n\n"
        "### Instruction:\nbye\n\n### Response:\nsee you⏹",
    },
    "alpaca-zh": {
        "single": f"▶{ALPACA_ZH}### 指令:\nhi\n\n### 回复:hello⏹",
        "system": f"▶Be brief.\n\n{ALPACA_ZH}### 指令:\nhi\n\n### 回复:hello⏹",
        "multi": f"▶{ALPACA_ZH}### 指令:\nhi\n\n### 回复:hello⏹\n\n### 指令:\nbye\n\n### 回复:see you⏹",
    },
    "chatml": {
        "single": "▶<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello⏹",
        "system": "▶<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello⏹",
        "multi": "▶<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello⏹\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nsee you⏹",
    },
    "qwen": {
        "single": "▶<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello⏹",
        "system": "▶<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello⏹",
        "multi": "▶<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello⏹\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nsee you⏹",
    },
    "llama2": {
        "single": "▶[INST] hi [/INST] hello ⏹",
        "system": "▶[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST] hello ⏹",
        "multi": "▶[INST] hi [/INST] hello ⏹▶[INST] bye [/INST] see you ⏹",
    },
    "llama3": {
        "single": "▶<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nhello⏹",
        "system": "▶<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nhello⏹",
        "multi": "▶<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nhello⏹"
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nsee you⏹",
    },
    "bloom": {
        "single": "▶Human: hi\n\nAssistant: hello⏹",
        "system": "▶Be brief.\n\nHuman: hi\n\nAssistant: hello⏹",
        "multi": "▶Human: hi\n\nAssistant: hello⏹Human: bye\n\nAssistant: see you⏹",
    },
    "plain": {"single": "▶hihello⏹", "system": "▶Be brief.\nhihello⏹", "multi": "▶hihello⏹byesee you⏹"},
    "chatglm": {
        "single": "hi[gMASK]<sop>hello⏹",
        "system": "Be brief.\nhi[gMASK]<sop>hello⏹",
        "multi": "[Round 0]\n问：hi\n答：hello\n[Round 1]\n问：bye\n答：[gMASK]<sop>see you⏹",
    },
    "chatglm2": {
        "single": "[gMASK]sop[Round 1]\n\n问：hi\n\n答：hello⏹",
        "system": "[gMASK]sopBe brief.\n\n[Round 1]\n\n问：hi\n\n答：hello⏹",
        "multi": "[gMASK]sop[Round 1]\n\n问：hi\n\n答：hello\n\n[Round 2]\n\n问：bye\n\n答：see you⏹",
    },
    "chatglm3": {
        "single": "[gMASK]sop<|user|>\nhi<|assistant|>\nhello⏹",
        "system": "[gMASK]sop<|system|>\nBe brief.<|user|>\nhi<|assistant|>\nhello⏹",
        "multi": "[gMASK]sop<|user|>\nhi<|assistant|>\nhello<|user|>\nbye<|assistant|>\nsee you⏹",
    },
}
TURNS = {"single": TALK[:2], "system": (SYSTEM, *TALK[:2]), "multi": TALK}


def test_every_named_template_has_its_exact_text_here() -> None:
    assert set(EXACT) == set(TABLE)


@pytest.mark.parametrize("case", TURNS)
@pytest.mark.parametrize("name", TABLE)
def test_exact_text(name: str, case: str) -> None:
    rendered = TABLE[name].render(TURNS[case])
    assert text_of(rendered) == EXACT[name][case]
    prompt = TABLE[name].render(TURNS[case][:-1])
    assert EXACT[name][case].startswith(text_of(prompt))  # what chat sends is what was trained, up to the answer


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "alpaca",
            "▶Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        ),
        (
            "alpaca-zh",
            "▶以下是一个描述任务的指令，并配有一个提供详细上下文信息的输入。请写一个完成该指令的适当回复。\n\n"
            "### 指令:\nAdd.\n\n### 输入:\n1 2\n\n### 回复:",
        ),
        ("bloom", "▶Human: Add.\n1 2\n\nAssistant: "),
        ("chatglm", "Add.\n1 2[gMASK]<sop>"),
    ],
)
def test_a_context_has_its_place(name: str, text: str) -> None:
    assert text_of(TABLE[name].render([Message("user", "Add.", context="1 2")])) == text


@pytest.mark.parametrize("name", TABLE)
def test_only_answers_and_their_stops_are_trained(name: str) -> None:
    trained = text_of([s for s in TABLE[name].render((SYSTEM, *TALK)) if s.trained])
    expected = {
        "llama2": " hello ⏹ see you ⏹",
        "chatglm": "see you⏹",
        "chatglm2": "see you⏹",
        "chatglm3": "\nhello<|user|>\nsee you⏹",
    }
    assert trained == expected.get(name, "hello⏹see you⏹")


@pytest.mark.parametrize("name", TABLE)
def test_an_answer_is_read_back_without_its_frame(name: str) -> None:
    answer = TABLE[name].render(TURNS["single"])
    assert TABLE[name].answer_text("".join(s.text for s in answer if s.trained)) == "hello"


# ---- tools ----

QWEN_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "weather", "description": "查询天气", "parameters": '
    '{"type": "object", "properties": {}}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
QWEN_TALK = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>⏹\n'
    '<|im_start|>user\n<tool_response>\n{"sky": "晴"}\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\nhello⏹"
)


def test_qwen_writes_tools_as_its_own_template_does() -> None:
    head = "▶<|im_start|>system\nYou are a helpful assistant.\n\n"
    assert text_of(TABLE["qwen"].render(TOOL_TALK, [WEATHER])) == head + QWEN_TOOLS + QWEN_TALK
    assert text_of(TABLE["chatml"].render(TOOL_TALK, [WEATHER])) == "▶<|im_start|>system\n" + QWEN_TOOLS + QWEN_TALK


def test_qwen_puts_results_of_several_calls_into_one_turn() -> None:
    two = replace(CALL, content="let me see", tool_calls=(*CALL.tool_calls, ToolCall("weather", "{}")))
    text = text_of(TABLE["chatml"].render((HI, two, RESULT, RESULT)))
    assert text.endswith(
        "let me see\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>⏹\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "晴"}\n</tool_response>\n'
        '<tool_response>\n{"sky": "晴"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
    )


def test_a_call_is_trained_like_any_answer() -> None:
    trained = text_of([s for s in TABLE["qwen"].render(TOOL_TALK, [WEATHER]) if s.trained])
    assert trained == '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>⏹hello⏹'


def test_chatglm3_brings_its_own_words_above_a_list_of_tools() -> None:
    text = text_of(TABLE["chatglm3"].render(TOOL_TALK, [WEATHER]))
    assert text.startswith(f'[gMASK]sop<|system|>\n{TOOL_SYSTEM}\n[\n    {{\n        "name": "weather"')
    assert text.endswith(
        "<|user|>\nhi<|assistant|>weather\n```python\ntool_call(city='北京')\n```"
        '<|observation|>\n{"sky": "晴"}<|assistant|>\nhello⏹'
    )


@pytest.mark.parametrize("name", ["alpaca", "alpaca-zh", "llama2", "llama3", "bloom", "plain", "chatglm", "chatglm2"])
@pytest.mark.parametrize(
    ("messages", "tools", "what"),
    [((HI,), (WEATHER,), "tools"), ((HI, CALL), (), "tool calls"), ((HI, HELLO, RESULT), (), "tool results")],
)
def test_a_template_without_a_place_for_tools_says_so(name: str, messages: Any, tools: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=f"template '{name}' has no place for {what}") as caught:
        TABLE[name].render(messages, tools)
    assert "qwen" in str(caught.value)


def test_arguments_that_are_not_json_are_refused() -> None:
    with pytest.raises(DataError, match="not a JSON object"):
        TABLE["qwen"].render((HI, replace(CALL, tool_calls=(ToolCall("weather", "city=北京"),))))


TOOL_JINJA = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_tokenizers_own_template_gets_tools_and_calls(tokenizer: Any) -> None:
    template = ChatTemplate(TOOL_JINJA, tokenizer, "<|end|>")
    encoder = Encoder(tokenizer, template)
    sample = sample_of(encoder, Conversation(TOOL_TALK, tools=(WEATHER,)))
    trained = tokenizer.decode(sample.ids[sample.mask])
    assert trained == 'CALL weather {"city": "北京"}<|end|>hello<|end|>'
    assert '"name": "weather"' in tokenizer.decode(sample.ids)
    prompt = encoder.prompt(TOOL_TALK[:-1], [WEATHER])
    assert sample.ids[: len(prompt)].tolist() == prompt


def test_the_tokenizers_own_template_without_tools_says_so(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no place for tools"):
        choose("auto", tokenizer).render((HI,), [WEATHER])


def test_what_the_jinja_template_refuses_is_a_clear_error(tokenizer: Any) -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", tokenizer, "<|end|>")
    with pytest.raises(ConfigError, match="roles must alternate"):
        template.render((HI,))


def test_a_users_copy_of_a_template_mark_is_not_taken_for_the_templates_own(tokenizer: Any) -> None:
    template = choose("auto", tokenizer)
    for typed in ("<|user|>", "<|assistant|>", "user", "<|system|>hi", " <|end|> "):
        segments = template.render((Message("system", typed), Message("user", typed), HELLO))
        own = [s.text.strip() for s in segments if not s.literal and not s.trained]
        assert own == [typed.strip(), typed.strip()]
        ids = Encoder(tokenizer, template).prompt((Message("system", typed), Message("user", typed)))
        marks = [i for i in ids if i in (1, 2, 3, 4)]
        assert [tokenizer.convert_ids_to_tokens(i) for i in marks] == ["<|system|>", "<|user|>", "<|assistant|>"]


# ---- the run folder ----


@pytest.mark.parametrize("name", ["auto", *TABLE])
def test_a_template_survives_json(name: str, tokenizer: Any) -> None:
    template = choose(name, tokenizer)
    again = from_dict(json.loads(json.dumps(template.as_dict())), tokenizer)
    assert text_of(again.render((SYSTEM, *TALK))) == text_of(template.render((SYSTEM, *TALK)))
    assert (again.name, again.stop, again.other_stops) == (template.name, template.stop, template.other_stops)


def test_a_stored_template_of_another_version_is_a_clear_error(tokenizer: Any) -> None:
    for values in ({"kind": "new"}, {}, {"kind": "pieces", "name": "x", "user": "{content}", "colour": "red"}):
        with pytest.raises(ConfigError, match="stored template"):
            from_dict(values, tokenizer)


# ---- a user's own ----


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_users_own_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, 'user: "Q: {content}\\n"\nopening: "A:"\nassistant: " {content}"\nstop: "<|end|>"\n')
    template = choose(path, tokenizer)
    assert template.name == "mine"
    assert text_of(template.render(TALK)) == "▶Q: hi\nA: hello⏹Q: bye\nA: see you⏹"
    again = from_dict(template.as_dict(), tokenizer)
    assert again == template
    assert Encoder(tokenizer, again).stop_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('user: "{content}"\nasistant: "{content}"\n', r"asistant: unknown key(.|\n)*did you mean 'assistant'"),
        ('user: "Q:"\n', r"user: no place for \{content\}"),
        ('user: "{contents}"\n', r"unknown slot(.|\n)*did you mean 'content'"),
        ("user: 5\n", "user: not text"),
        ('opening: "A:"\n', "no 'user'"),
        ("- a\n", "not a list of pieces"),
        ("user: [\n", "not YAML"),
        ("", "not a list of pieces"),
        ('user: "{content}"\nuser_with_system: "{content}"\n', r"no place for \{system\}"),
        ('user: "{content}"\nbos_each_turn: "yes"\n', "bos_each_turn: not true or false"),
    ],
)
def test_mistakes_in_a_users_own_template(tmp_path: Path, tokenizer: Any, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        choose(write(tmp_path, text), tokenizer)
    assert caught.value.received is not None
    assert caught.value.fix


def test_all_mistakes_of_a_users_own_template_are_reported_together(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(Problems) as caught:
        choose(write(tmp_path, 'user: "Q"\nstopp: "x"\nopening: 3\n'), tokenizer)
    assert len(caught.value.problems) == 3


def test_names_that_mean_nothing(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'chatglm2'"):
        choose("chatgml2", tokenizer)
    with pytest.raises(ConfigError, match="no such file"):
        choose(str(tmp_path / "none.yaml"), tokenizer)


def test_a_template_that_needs_other_tokens_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs the special token '<\|observation\|>'"):
        Encoder(tokenizer, TABLE["chatglm3"])
    with pytest.raises(ConfigError, match=r"needs the special token '\[gMASK\]'"):
        Encoder(tokenizer, TABLE["chatglm"]).prompt((HI,))


# ---- what is trained ----


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [("all", [1, 3, 5]), ("last", [5]), ("tool-calls", [1])],
)
def test_train_on(tokenizer: Any, train_on: Any, trained: list[int]) -> None:
    turns = (*TOOL_TALK, BYE, SEE_YOU)
    encoder = Encoder(tokenizer, TABLE["chatml"], train_on=train_on)
    sample = sample_of(encoder, Conversation(turns))
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    texts = {1: call, 3: "hello", 5: "see you"}
    assert tokenizer.decode(sample.ids[sample.mask]) == "".join(f"{texts[turn]}<|end|>" for turn in trained)
    assert sample.ends_whole
    assert encoder.with_max_length(1000).train_on == train_on


def test_a_row_without_what_is_trained_is_dropped(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE["chatml"], train_on="tool-calls")
    samples, of = tiny.encoded([Conversation(TALK)], encoder)
    assert len(samples) == 0
    report = counted(DataReport(), samples, of, 1)
    assert (report.kept, report.dropped) == (0, 1)


def test_every_stop_token_is_trained_though_it_is_the_pad_token_too(tokenizer: Any) -> None:
    same = tiny.make_tokenizer()
    same.pad_token = same.eos_token
    assert same.pad_token_id == same.eos_token_id
    sample = sample_of(Encoder(same, TABLE["alpaca"]), Conversation(TALK))
    stops = np.flatnonzero(sample.ids == same.eos_token_id)
    assert len(stops) == 2
    assert sample.mask[stops].all()
    assert sample.ids.tolist() == sample_of(Encoder(tokenizer, TABLE["alpaca"]), Conversation(TALK)).ids.tolist()


def test_the_textbook_collator_trains_the_last_prompt_token_and_ours_does_not(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE["alpaca"])
    sample = sample_of(encoder, Conversation((HI, HELLO)))
    ids, seq_len = sample.ids.tolist(), sample.prompt_length
    # the textbook: labels from seq_len - 1, and the model shifts them by one again
    labels = [-100] * (seq_len - 1) + ids[seq_len - 1 :]
    textbook = [label for label in labels[1:] if label != -100]
    assert textbook == ids[seq_len - 1 :]  # the last token of the prompt is among them
    ours = flat([sample], [0])
    assert ours.labels.tolist() == ids[seq_len:]
    assert ours.label_rows.tolist() == list(range(seq_len - 1, len(ids) - 1))


def test_nothing_crosses_a_border_of_turns(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, TABLE["plain"])
    sample = sample_of(encoder, Conversation((Message("user", "Hel"), Message("assistant", "lo, world!"))))
    assert tokenizer.decode(sample.ids[: sample.prompt_length]) == "Hel"


# ---- over random conversations ----


def spaced_tokenizer() -> Any:
    """A tokenizer that puts a space in front of every text, as sentencepiece does."""
    core = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = sorted({c for text in tiny.TEXT for c in text} | set("abcdefghijklmnopqrstuvwxyz.:[]/#<|>_▁"))
    special = ["<unk>", "<s>", "</s>", "<|user|>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(tiny.TEXT, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>"],
    )


PLAIN, SPACED = tiny.make_tokenizer(), spaced_tokenizer()
PIECES = [name for name, template in TABLE.items() if isinstance(template, PieceTemplate)]
TYPED = [
    "<|end|>",
    "<|user|>",
    "</s>",
    "<s>",
    "<|assistant|>",
    "hello",
    "你好",
    " ",
    "\n",
    "two plus",
    "{content}",
    "a",
]
TEXTS = st.lists(st.sampled_from(TYPED), min_size=1, max_size=6).map("".join) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    system = [Message("system", draw(TEXTS))] if draw(st.booleans()) else []
    turns = [Message(role, draw(TEXTS)) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    return (*system, *turns)


@st.composite
def encoders(draw: st.DrawFn) -> Encoder:
    tokenizer = draw(st.sampled_from([PLAIN, SPACED]))
    names = [*PIECES, "auto"] if tokenizer is PLAIN else PIECES
    return Encoder(tokenizer, choose(draw(st.sampled_from(names)), tokenizer))


def written(encoder: Encoder, template: Template, messages: tuple[Message, ...]) -> str:
    """The rendering as text, its special tokens by name."""
    bos = "" if encoder.bos_id is None else encoder.tokenizer.convert_ids_to_tokens(encoder.bos_id)
    names = {"stop": encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id), "bos": bos}
    return "".join(names.get(s.role, s.text) for s in template.render(messages))


def squeezed(text: str) -> str:
    """Without blanks, and without the sign that sentencepiece writes for a blank."""
    return text.replace(" ", "").replace("▁", "")


@given(encoders(), conversations())
def test_ids_decode_to_the_rendering(encoder: Encoder, messages: tuple[Message, ...]) -> None:
    sample = sample_of(encoder, Conversation(messages))
    text = decoded(encoder, sample.ids)
    wanted = written(encoder, encoder.template, messages)
    if encoder.tokenizer is PLAIN:
        assert text == wanted
    else:  # the space in front of the text, and the same after special tokens, is this tokenizer's own
        assert squeezed(text) == squeezed(wanted)
        assert len(text) <= len(wanted) + 2 * len(messages) + 1


@given(encoders(), conversations())
def test_what_is_trained_is_the_answers_and_nothing_else(encoder: Encoder, messages: tuple[Message, ...]) -> None:
    sample = sample_of(encoder, Conversation(messages))
    stop = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id)
    answers = [m.content for m in messages if m.role == "assistant"]
    trained = decoded(encoder, sample.ids[sample.mask])
    assert squeezed(trained) == squeezed("".join(f"{answer}{stop}" for answer in answers))
    assert sample.ids[sample.mask][-1] == encoder.stop_id
    assert int((sample.ids[sample.mask] == encoder.stop_id).sum()) == len(answers)  # none typed by anyone


@given(encoders(), conversations())
def test_special_tokens_come_from_the_template_alone(encoder: Encoder, messages: tuple[Message, ...]) -> None:
    """The same turns with harmless texts have the same special ids."""
    harmless = tuple(replace(m, content="a") for m in messages)
    words = encoder.tokenizer
    special = set(map(words.convert_tokens_to_ids, words.all_special_tokens)) - {words.unk_token_id}
    found, expected = (
        [i for i in sample_of(encoder, Conversation(turns)).ids.tolist() if i in special]
        for turns in (messages, harmless)
    )
    assert found == expected


@given(encoders(), conversations(), st.integers(1, 80))
def test_a_cut_row_keeps_to_the_policy(encoder: Encoder, messages: tuple[Message, ...], limit: int) -> None:
    whole = sample_of(encoder, Conversation(messages))
    cut = encoder.with_max_length(limit).sample(Conversation(messages))
    if cut is None:
        return  # not one trained token fits
    assert len(cut) <= limit
    if len(whole) <= limit:
        assert cut.ids.tolist() == whole.ids.tolist()
        assert cut.cut_prompt == cut.cut_answer == 0
        return
    assert cut.cut_prompt + cut.cut_answer == len(whole) - len(cut)
    # the stop token ends the row exactly where the last answer is whole
    assert (cut.ids[-1] == encoder.stop_id) == cut.ends_whole
    last = sample_of(encoder, Conversation((messages[-2], messages[-1])))
    answer = last.ids[last.mask].tolist()
    kept = cut.ids[cut.mask].tolist()
    if cut.ids.tolist() == answer[: len(cut)]:
        answer = answer[1:]  # all of the prompt is gone, and a row's first token cannot be trained
    if cut.ends_whole:
        assert kept[-len(answer) :] == answer
    else:
        assert kept == answer[: len(kept)]  # a beginning of the last answer, and every older exchange is gone


@given(encoders(), conversations())
def test_each_prompt_begins_the_row(encoder: Encoder, messages: tuple[Message, ...]) -> None:
    row = sample_of(encoder, Conversation(messages)).ids.tolist()
    for turn, message in enumerate(messages):
        if message.role == "assistant":
            prompt = encoder.prompt(messages[:turn])
            assert row[: len(prompt)] == prompt
