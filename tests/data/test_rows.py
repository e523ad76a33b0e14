"""Files to conversations: formats, and where a bad row stands."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitune.core.errors import ConfigError, DataError, Problems
from fitune.core.options import DataSource
from fitune.core.records import Conversation, Message, Source, ToolCall
from fitune.data.conversations import fill, to_conversation, unused
from fitune.data.formats import FORMATS, NAMES, check
from fitune.data.rows import load

pytestmark = pytest.mark.unit


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_format_becomes_the_same_turns(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]], "extra": 1}
    path = write(tmp_path / "a.json", json.dumps([alpaca, {"prompt": "p", "completion": "c"}]))
    found = load([path])
    (first, second), report = found.rows, found.report
    assert first.messages == (
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "add", context="1 2"),
        Message("assistant", "3"),
    )
    assert second.messages == (Message("user", "p"), Message("assistant", "c"))
    assert report.formats == {"alpaca": 1, "prompt/completion": 1}
    assert report.unused_columns == {"extra": 1}


def test_rows_know_their_line_in_a_json_list(tmp_path: Path) -> None:
    rows = [{"prompt": str(n), "completion": "x"} for n in range(3)]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=2))
    assert [c.source and c.source.line for c in load([path]).rows] == [2, 6, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', ":2:completion: missing (a row of prompt/completion)"),
        ('{"prompt": "a", "completion": 5}', ":1:completion: not a text\n  received: 5\n  expected: a string"),
        ('{"prompt": "a", "completion": " "}', ":1:completion: the answer is empty"),
        ('{"text": "a"', ":1: not JSON"),
        ("[1]", ":1: not a row"),
        ('[{"prompt": "a", "completion": "b"},\n {"prompt"', ":2: broken JSON"),
        ('[{"prompt": "a", "completion": "b"}', ":1: the list is not closed"),
        ("", "the file is empty"),
        ("[]", "no rows"),
        ('{"foo": 1}', ":1: no known format"),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1:messages: no answer at the end"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', ":1:messages[0].role: unknown role"),
        ('{"messages": [{"role": "user", "content": null}]}', ":1:messages[0].content: not a text"),
        ('{"instruction": "a", "output": "b", "history": [["x"]]}', ":1:history[0]: not a pair"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(DataError) as caught:
        load([path])
    assert f"{path}{message}" in str(caught.value) or message in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_bad_rows_are_reported_at_once_up_to_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' * 30)
    with pytest.raises(Problems) as caught:
        load([path])
    assert ":20:completion" in str(caught.value)
    assert "and 10 more bad rows" in str(caught.value)


def test_missing_file_folder_and_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('[{"prompt": "café", "completion": "b"}]'.encode("latin-1"))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(Problems) as caught:
        load([str(tmp_path / "none.json"), str(empty), str(tmp_path / "latin.json")])
    for part in ("no such file", "no data in this folder", "not UTF-8"):
        assert part in str(caught.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'[{"prompt": "a", "completion": "b"}]')
    assert len(load([str(tmp_path / "bom.json")]).rows) == 1


def convert(row: object, **how: Any) -> Conversation:
    return to_conversation(row, Source("f", 7), **how)


def refused(row: object, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(row, **how)
    return str(caught.value)


TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
FRAMED = {"type": "function", "function": TOOL}
ASKED = (
    Message("system", "s"),
    Message("user", "1 加 2?"),
    Message("assistant", "", tool_calls=(ToolCall("add", '{"数": [1, 2]}'),)),
    Message("tool", "3"),
    Message("assistant", "三"),
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"数": [1, 2]}'}}
OPENAI = [
    {"role": "developer", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "1 加"}, {"type": "text", "text": " 2?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"},
    {"role": "assistant", "content": "三", "tool_calls": None, "refusal": None},
]
SHAREGPT = [
    {"from": "human", "value": "1 加 2?"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"数": [1, 2]}}'},
    {"from": "observation", "value": "3"},
    {"from": "gpt", "value": "三"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": OPENAI, "tools": [FRAMED]},
        {"messages": json.dumps(OPENAI), "tools": json.dumps([TOOL])},  # as a cell of a CSV file holds them
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "1 加 2?"},
                {"role": "assistant", "function_call": {"name": "add", "arguments": {"数": [1, 2]}}},
                {"role": "function", "name": "add", "content": "3"},
                {"role": "assistant", "content": "三"},
            ],
            "tools": [TOOL],
        },
        {"conversations": SHAREGPT, "system": "s", "tools": json.dumps([TOOL])},
        {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT], "tools": [TOOL]},
        {"conversations": [{"role": "System", "content": "s"}, *SHAREGPT], "tools": [TOOL]},
        {"prompt": OPENAI[:4], "completion": OPENAI[4:], "tools": [TOOL]},
        {"conversations": SHAREGPT[:3], "chosen": SHAREGPT[3], "rejected": {}, "system": "s", "tools": [TOOL]},
    ],
)
def test_tools_and_calls_come_out_alike_however_they_are_written(row: dict[str, Any]) -> None:
    conversation = convert(row)
    assert tuple(without_ids(message) for message in conversation.messages) == ASKED
    assert conversation.tools == (FRAMED,)


def without_ids(message: Message) -> Message:
    """Ids of calls, and names of what they gave back, are kept as a row has them; not every row has some."""
    calls = tuple(replace(call, id="") for call in message.tool_calls)
    return replace(message, tool_calls=calls, call_id="", name="")


def test_ids_and_names_of_calls_are_kept() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "clock", "content": "10:05"},
        {"role": "assistant", "content": "10:05"},
    ]
    _, asked, result, _ = convert({"messages": turns}).messages
    assert asked.tool_calls[0].id == result.call_id == "c1"
    assert result.name == "clock"


@pytest.mark.parametrize(("human", "bot"), [("user", "assistant"), ("Human", "bot"), ("human", "chatgpt")])
def test_speakers_have_many_names(human: str, bot: str) -> None:
    row = {"conversations": [{"from": human, "value": "a"}, {"from": bot, "value": "b"}], "tools": "[]"}
    assert convert(row) == Conversation((Message("user", "a"), Message("assistant", "b")), Source("f", 7), "sharegpt")


@pytest.mark.parametrize(
    ("turn", "thought", "content"),
    [
        ({"reasoning_content": "t", "content": "b"}, "t", "b"),
        ({"thinking": "t", "content": "b"}, "t", "b"),
        ({"reasoning": "t", "reasoning_content": "t", "content": "b"}, "t", "b"),  # one thought under two names
        ({"reasoning_content": None, "content": "b"}, "", "b"),
        ({"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "b"}]}, "t", "b"),
        ({"content": [{"type": "reasoning", "text": "t"}, {"type": "output_text", "text": "b"}]}, "t", "b"),
        ({"reasoning": [{"type": "text", "text": "t"}], "content": "b"}, "t", "b"),
    ],
)
def test_a_thought_of_its_own_is_kept(turn: dict[str, Any], thought: str, content: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]}
    assert convert(row).messages[1] == Message("assistant", content, thought=thought)
    assert unused(row, "messages", {}) == []


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, 1.0),
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"weight": 0.25}, 0.25),
        ({"loss": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"loss": None}, 1.0),
        ({"loss_scale": 2.0}, 2.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"training": False}, 0.0),
        ({"trainable": True}, 1.0),
        ({"mask": True}, 0.0),
        ({"mask": False}, 1.0),
        ({"weight": 0.5, "train": True}, 0.5),
    ],
)
def test_flags_of_turns_are_weights(flags: dict[str, Any], weight: float) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **flags}]}
    assert convert(row).messages[1].weight == weight
    assert unused(row, "messages", {}) == []


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"context": "a", "target": "b"}, "context/target"),
        ({"prompt": "a", "completion": "b"}, "prompt/completion"),
        ({"instruction": "a", "output": "b", "text": "a b"}, "alpaca"),
        ({"instruction": "a", "output": "b", "messages": None}, "alpaca"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"messages": [{"role": "user", "content": "a"}], "chosen": "b"}, "preference"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "preference",
        ),
    ],
)
def test_formats_are_found_by_their_keys(row: dict[str, Any], name: str) -> None:
    conversation = convert(row)
    assert conversation.format == name
    assert conversation.messages == (Message("user", "a"), Message("assistant", "b"))


def test_plain_text_is_one_answer_trained_whole() -> None:
    conversation = convert({"text": "从前有座山"})
    assert conversation == Conversation((Message("assistant", "从前有座山"),), Source("f", 7), "text")
    assert conversation.prompt() == ()


# a flag of a turn, and what is said of it
FLAGS: list[tuple[dict[str, Any], str]] = [
    ({"weight": -1}, "no weight of the loss\n  received: -1\n  expected: true, false, or a number"),
    ({"loss": "yes"}, "no weight of the loss\n  received: 'yes'"),
    ({"weight": float("nan")}, "no weight of the loss\n  received: nan"),
    ({"mask": 1}, "no weight of the loss\n  received: 1\n  expected: true or false"),  # may mean either
    ({"train_detail": [{"begin_offset": 0}]}, "parts of a turn have flags of their own"),
    ({"reasoning_content": 5}, "a thought that is not a text\n  received: 5"),
]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "a", "chosen": " "}, ["chosen: the answer is empty"]),
        ({"chosen": "a", "rejected": "b"}, ["prompt: missing (a row of preference)", "expected: conversations, mess"]),
        ({"prompt": "a", "completion": None}, ["completion: not a text", "received: None", "expected: a string"]),
        ({"prompt": "a", "completion": "\ud800"}, ["half a character (a lone surrogate)"]),
        ({"messages": []}, ["messages: no list of turns", "received: []", "expected: [{role, content}, ...]"]),
        ({"messages": "hello"}, ["messages: not JSON", "received: 'hello'"]),
        ({"messages": 5}, ["messages: not a list", "received: 5"]),
        ({"messages": [5]}, ["messages[0]: not a turn", "received: 5", "expected: {role, content}"]),
        ({"messages": [{"role": ["user"]}]}, ["messages[0].role: unknown role", "received: ['user']", "human, assis"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            ["content[0]: pictures, sound and films cannot"],
        ),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [CALL]}]}, ["only an answer can call"]),
        ({"messages": [{"role": "assistant", "content": ""}]}, ["messages[0].content: the answer is empty"]),
        ({"messages": OPENAI[:4]}, ["messages: no answer at the end", "received: tool", "expected: assistant"]),
        ({"messages": [*OPENAI, OPENAI[0]]}, ["messages: no answer at the end"]),
        ({"messages": OPENAI, "system": "s"}, ["system: a second system message", "expected: one"]),
        ({"messages": OPENAI, "tools": "no"}, ["tools: not JSON"]),
        ({"messages": OPENAI, "tools": [{}]}, ["tools[0]: not a function description", "expected: {name, desc"]),
        ({"conversations": [{"from": "gpt", "value": None}]}, ["conversations[0].value: not a text"]),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, ["conversations[0].value: not JSON"]),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, ["[0].value: no list of calls"]),
        ({"conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]}, ["[0].value[0]: not a call"]),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": "[1]"}'}]},
            ["value[0].arguments: not an object", "received: '[1]'", 'expected: {"name": value, ...}'],
        ),
        *(
            (
                {"messages": [{"role": "assistant", "content": "b", **flag}]},
                [f"messages[0].{next(iter(flag))}: {what}"],
            )
            for flag, what in FLAGS
        ),
        ({"instruction": "a", "output": "b", "history": "x"}, ["history: not JSON", "expected: [[question, answer]"]),
    ],
)
def test_each_wrong_field_says_what_it_is(row: dict[str, Any], parts: list[str]) -> None:
    text = refused(row)
    assert text.startswith("f:7:")
    for part in parts:
        assert part in text


def test_a_named_format_names_the_missing_field() -> None:
    row = {"prompt": "a", "completion": "b"}
    text = refused(row, name="alpaca")
    assert text.startswith("f:7:instruction: missing (a row of alpaca)")
    assert "received: the columns prompt, completion" in text
    assert "expected: alpaca: instruction, output" in text
    assert convert({**row, "text": "t"}, name="text").answer() == "t"


def test_columns_of_other_names() -> None:
    row = {"content": "a", "summary": "b", "prompt": "other", "id": 3}
    columns = {"content": "prompt", "summary": "completion"}
    assert convert(row, columns=columns).messages == (Message("user", "a"), Message("assistant", "b"))
    assert unused(row, "prompt/completion", columns) == ["prompt", "id"]
    also_alpaca = {"instruction": "x", "output": "y", **row}
    assert convert(also_alpaca, columns=columns).format == "prompt/completion"  # what was mapped is what is meant
    assert refused({"content": "a"}, columns=columns).startswith("f:7:summary: missing (a row of prompt/completion)")
    assert refused({**row, "summary": 5}, columns=columns).startswith("f:7:summary: not a text")


def test_a_column_map_is_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown field 'promt' \(for column 'a'\)\n  fix:      did you mean 'prompt'"
    ):
        check("auto", {"a": "promt"})
    with pytest.raises(ConfigError, match="unknown field 'prompt'"):
        check("alpaca", {"a": "prompt"})
    with pytest.raises(ConfigError, match="two columns for the field 'text'"):
        check("auto", {"a": "text", "b": "text"})
    with pytest.raises(ConfigError, match=r"unknown format 'alpacca'\n  fix:      did you mean 'alpaca'\?"):
        check("alpacca", {})


def test_without_a_known_format_the_map_is_proposed_once_for_all_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"content": "a", "summary": "b"}\n' * 30)
    with pytest.raises(Problems) as caught:
        load([path])
    text = str(caught.value)
    assert text.startswith("2 problems:")
    assert "received: the columns content, summary" in text
    assert "fix:      say what your columns are: --map content=prompt summary=completion" in text
    assert "and 29 more bad rows" in text


def test_what_turns_hold_beside_is_listed_too(tmp_path: Path) -> None:
    report = load([write(tmp_path / "a.jsonl", json.dumps({"messages": OPENAI, "id": 1}))]).report
    assert report.unused_columns == {"id": 1, "turn.refusal": 1}


def test_slots_are_filled_or_counted(tmp_path: Path) -> None:
    row = {
        "instruction": "你好 {{name}}",
        "input": "{{name}}",
        "output": "我是 {{name}}，由 {{author}} 开发",
        "system": "{{x}}",
    }
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    found = load([path])
    report = found.report
    assert found.rows[0].answer() == row["output"]
    assert report.unfilled_slots == {"name": 1, "author": 1, "x": 1}
    found = load([path], fill={"name": "{{x}}", "author": "Ada"})
    filled, report = found.rows[0], found.report
    assert filled.answer() == "我是 {{x}}，由 Ada 开发"
    assert filled.messages[1] == Message("user", "你好 {{x}}", context="{{x}}")
    assert report.unfilled_slots == {"x": 1}


def test_bad_rows_are_skipped_and_listed_if_so_wished(tmp_path: Path) -> None:
    text = '{"prompt": "a", "completion": "b"}\n' + '{"prompt": "a"}\n' * 30 + "{\n"
    path = write(tmp_path / "a.jsonl", text)
    found = load([path], skip_bad=True)
    report = found.report
    assert len(found.rows) == 1
    assert report.skipped_bad == 31
    assert len(report.skipped) == 20
    assert report.skipped[0] == f"{path}:2:completion: missing (a row of prompt/completion)"
    assert report.rows == report.files[path] == 1


def test_skipping_hides_neither_a_broken_file_nor_one_without_a_good_row(tmp_path: Path) -> None:
    good = '[{"prompt": "a", "completion": "b"}'
    cut, all_bad = write(tmp_path / "cut.json", good), write(tmp_path / "bad.jsonl", '{"prompt": "a"}\n' * 3)
    with pytest.raises(Problems) as caught:
        load([cut, all_bad, str(tmp_path / "none.json")], skip_bad=True)
    for part in ("the file is cut off", "bad.jsonl: no rows\n  received: 3 bad rows", "none.json: no such file"):
        assert part in str(caught.value)


def test_a_bad_row_says_how_to_go_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": ""}')
    with pytest.raises(DataError, match="fix:      fix the row, or leave bad rows out with --skip-bad"):
        load([path])


KEYS = sorted({key for fmt in FORMATS for key in fmt.uses} | {"role", "from", "content", "value", "tool_calls", "name"})
TEXTS = st.text(max_size=4) | st.sampled_from(["user", "gpt", "assistant", "function_call", "[]", '{"name": "f"}'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | TEXTS, inner, max_size=4),
    max_leaves=12,
)


@given(row=VALUES | st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), name=st.sampled_from(["auto", *NAMES]))
def test_any_json_value_converts_or_is_refused(row: object, name: str) -> None:
    columns = {"content": "prompt", "value": "completion"} if name == "auto" else {}
    with suppress(DataError):
        conversation = convert(row, name=name, columns=columns)
        assert conversation.messages[-1].role == "assistant"
        assert isinstance(row, dict)
        unused(row, conversation.format, columns)
        fill(conversation, {"name": "x"})


@given(
    text=st.text(alphabet='{}[]",:\\ \n\r\tab1eE.-\0\ufeffu', max_size=40), name=st.sampled_from(["a.json", "a.csv"])
)
def test_any_text_is_read_or_refused(text: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(text.encode())
    with suppress(DataError, Problems):
        load([str(path)])


@pytest.mark.parametrize("depth", [100, 900, 985, 995, 5000])
def test_depth_is_no_crash(depth: int, tmp_path: Path) -> None:
    deep = "[" * depth + "]" * depth
    for row in (f'{{"prompt": {deep}, "completion": "b"}}', f'{{"messages": {json.dumps(deep)}}}', f'{{"id": {deep}}}'):
        with pytest.raises(DataError):
            load([write(tmp_path / "a.jsonl", row)])


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count", "how"),
    [
        ("alpaca_zh_demo.json", 1000, {"alpaca"}),
        ("alpaca_en_demo.json", 999, {"alpaca"}),
        ("identity.json", 91, {"alpaca"}),
        ("advertisegen_dev/dev_chatml.json", 1070, {"messages"}),
        ("glaive_toolcall_zh_demo.json", 300, {"sharegpt"}),
        ("glaive_toolcall_en_demo.json", 300, {"sharegpt"}),
        ("dpo_zh_demo.json", 300, {"preference"}),
    ],
)
def test_real_data(shared: Path, name: str, count: int, how: set[str]) -> None:
    found = load([str(shared / "data" / name)])
    conversations, report = found.rows, found.report
    assert len(conversations) == report.rows == count
    assert report.formats == dict.fromkeys(how, count)
    assert report.unused_columns == ({"rejected": 300} if "dpo" in name else {})
    assert report.unfilled_slots == ({"name": 77, "author": 60} if "identity" in name else {})
    if "glaive" in name:
        calls = sum(len(message.tool_calls) for row in conversations for message in row.messages)
        assert calls == (216 if "zh" in name else 211)
        assert sum(bool(row.tools) for row in conversations) == (200 if "zh" in name else 191)


@pytest.mark.shared
def test_real_data_with_a_column_map(shared: Path) -> None:
    path = str(shared / "data" / "advertisegen_dev" / "dev.json")
    columns = {"content": "prompt", "summary": "completion"}
    mapped = load([DataSource(path=path, map=columns)]).rows
    turns = load([str(shared / "data" / "advertisegen_dev" / "dev_chatml.json")]).rows
    assert [row.messages for row in mapped] == [row.messages for row in turns]


@pytest.mark.shared
def test_a_real_folder_has_eleven_empty_answers(shared: Path) -> None:
    folder = str(shared / "data" / "alpaca_zh_20k")
    with pytest.raises(Problems, match="11 problems") as caught:
        load([folder])
    assert "zh-data-part-01.json:25107:output: the answer is empty" in str(caught.value)
    found = load([folder], skip_bad=True)
    report = found.report
    assert len(found.rows) == 20_465 - 11
    assert report.skipped_bad == len(report.skipped) == 11
    assert list(report.files.values()) == [10_015, 10_439]
