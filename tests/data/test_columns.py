"""Roles, columns and flags of other toolkits: each is understood, refused by name, or counted in a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.core.errors import DataError, Problems
from fitune.core.records import Conversation, DataReport, Message, Source, ToolCall
from fitune.data.columns import propose
from fitune.data.conversations import to_conversation, unused
from fitune.data.rows import load

pytestmark = pytest.mark.unit

PLAIN = (Message("user", "Sky?"), Message("assistant", "Blue."))
TALK = {"messages": [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]}


def convert(row: object, **how: Any) -> Conversation:
    return to_conversation(row, Source("f", 7), **how)


def refused(row: object, **how: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(row, **how)
    return str(caught.value)


def read(tmp_path: Path, rows: list[Any], **how: Any) -> tuple[list[Conversation], DataReport]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = load([str(path)], **how)
    return list(found.rows), found.report


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"query": "Sky?", "response": "Blue."}, "query/response"),
        ({"question": "Sky?", "answer": "Blue."}, "question/answer"),
        ({"Question": "Sky?", "Response": "Blue."}, "question/response"),
        ({"问题": "Sky?", "回答": "Blue."}, "问题/回答"),
        ({"问": "Sky?", "答": "Blue."}, "问/答"),
        ({"problem": "Sky?", "solution": "Blue."}, "problem/solution"),
        ({"Human": "Sky?", "Assistant": "Blue."}, "human/assistant"),
        ({"q": "Sky?", "a": "Blue."}, "q/a"),
        ({"指令": "Sky?", "输入": "", "输出": "Blue."}, "指令/输出"),
        ({"输入": "Sky?", "输出": "Blue."}, "输入/输出"),
        ({"input": "Sky?", "output": "Blue."}, "input/output"),
        ({"inputs": "Sky?", "targets": "Blue."}, "inputs/targets"),
        ({"prompt": "Sky?", "response": "Blue."}, "prompt/response"),
        ({"instruction": "Sky?", "response": "Blue."}, "instruction/response"),
        ({"instruction": "Sky?", "input": float("nan"), "output": "Blue."}, "alpaca"),  # what pandas makes of nothing
        ({"instruction": "Sky?", "input": None, "output": "Blue."}, "alpaca"),
        ({"conversation": [{"human": "Sky?", "assistant": "Blue."}]}, "conversation"),
        ({"conversation": [{"input": "Sky?", "output": "Blue."}]}, "conversation"),
        ({"dialog": [["Sky?", "Blue."]]}, "dialog"),
        ({"dialogue": ["Sky?", "Blue."]}, "dialogue"),
        ({"data": ["Sky?", "Blue."], "id": None}, "data"),
        ({"data": [["Sky?", "Blue."]]}, "data"),
        ({"messages": [["user", "Sky?"], ["assistant", "Blue."]]}, "messages"),
        ({"chat": [{"role": "human", "content": "Sky?"}, {"role": "bot", "content": "Blue."}]}, "chat"),
        ({"messages": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]}, "messages"),
        ({"messages": [{"role": "user", "value": "Sky?"}, {"role": "model", "text": "Blue."}]}, "messages"),
        ({"conversations": [{"role": "用户", "content": "Sky?"}, {"role": "助手", "content": "Blue."}]}, "sharegpt"),
    ],
)
def test_the_words_of_others_are_understood(row: dict[str, Any], name: str) -> None:
    conversation = convert(row)
    assert conversation.messages == PLAIN
    assert conversation.format == name
    assert [column for column in unused(row, name, {}) if column != "id"] == []


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Sky?", "response": "Blue.", "history": [["Hi", "Hello"]], "system": "s"},
        {"question": "Sky?", "answer": "Blue.", "history": json.dumps([["Hi", "Hello"]]), "system_prompt": "s"},
        {
            "prompt": "Sky?",
            "response": "Blue.",
            "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "system": "s",
        },
        {"指令": "Sky?", "输出": "Blue.", "历史": [["Hi", "Hello"]], "系统": "s"},
        {
            "system": "s",
            "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Sky?", "assistant": "Blue."}],
        },
    ],
)
def test_history_and_system_of_others(row: dict[str, Any]) -> None:
    before = (Message("system", "s"), Message("user", "Hi"), Message("assistant", "Hello"))
    conversation = convert(row)
    assert conversation.messages == (*before, *PLAIN)
    assert unused(row, conversation.format, {}) == []


def call(city: str) -> str:
    return json.dumps({"name": "clock", "arguments": {"city": city}})


@pytest.mark.parametrize("result", ["tool", "tool_response", "function", "observation", "ipython"])
def test_calls_in_turns_of_their_own_are_one_answer(result: str) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Time?"},
        {"role": "tool_call", "content": call("Rome"), "loss": False},
        {"role": "tool_call", "content": call("Oslo")},
        {"role": result, "content": "10:05"},
        {"role": result, "content": {"time": "10:06"}},
        {"role": "assistant", "content": "Both."},
    ]
    calls = (ToolCall("clock", '{"city": "Rome"}'), ToolCall("clock", '{"city": "Oslo"}'))
    assert convert({"messages": turns}).messages[1:] == (
        Message("assistant", "", tool_calls=calls, weight=0),
        Message("tool", "10:05"),
        Message("tool", '{"time": "10:06"}'),
        Message("assistant", "Both."),
    )
    turns[2] |= {"loss": 0.5}
    assert "messages[2]: the calls of one answer have different weights" in refused({"messages": turns})


def test_text_before_a_call_belongs_to_the_answer_that_calls() -> None:
    turns = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "name": "clock", "parameters": {"city": "Rome"}, "observation": "10:05"},
        {"role": "assistant", "content": "10:05"},
        {"role": "assistant", "content": "Anything else?"},
    ]
    assert convert({"conversations": turns}).messages[1:] == (
        Message("assistant", "Let me look.", tool_calls=(ToolCall("clock", '{"city": "Rome"}'),)),
        Message("tool", "10:05", name="clock"),
        Message("assistant", "10:05"),
        Message("assistant", "Anything else?"),  # two answers of text stay two
    )
    assert unused({"conversations": turns}, "sharegpt", {}) == []
    del turns[1]  # without text before it
    assert convert({"conversations": turns}).messages[1].content == ""


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            {**TALK, "images": ["cat.png"]},
            ["images: pictures, sound and films", "received: ['cat.png']", "images=ign"],
        ),
        ({**TALK, "audios": "a.wav"}, ["audios: pictures, sound and films"]),
        ({"query": "q", "response": "r", "videos": ["v.mp4"]}, ["videos: pictures, sound and films"]),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": kind}]}, *TALK["messages"]]},
                ["messages[0].content[0]: pictures, sound and films", f"received: '{kind}'"],
            )
            for kind in ("image_url", "image", "input_audio", "video", "file")
        ),
        ({**TALK, "label": False}, ["label: the answer is marked as a bad one (false)", "--skip-bad", "label=ignore"]),
        ({"prompt": "a", "completion": "b", "label": "False"}, ["label: the answer is marked"]),  # a cell of CSV
        ({**TALK, "kto_tag": False}, ["kto_tag: the answer is marked"]),
        ({**TALK, "weight": -1}, ["weight: no weight of the loss", "received: -1", "--map weight=ignore"]),
        ({**TALK, "weight": 75.5}, ["weight: no weight of the loss", "0 (context only) to 10", "--map weight=ignore"]),
        ({"instruction": "Count", "output": 42}, ["output: not a text", "received: 42", 'expected: a string ("42")']),
        ({"instruction": "J", "input": {"k": 1}, "output": "b"}, ["input: not a text", "received: {'k': 1}"]),
        ({"instruction": "J", "output": {"k": 1}}, ["output: not a text", "received: {'k': 1}"]),
        ({"instruction": "", "input": "", "output": "b"}, ["instruction: the prompt is empty", "--map output=text"]),
        ({"instruction": "  ", "output": "b"}, ["instruction: the prompt is empty"]),
        ({"question": " ", "answer": "b"}, ["question: the prompt is empty"]),
        (
            {"question": "a", "reply": "b"},
            ["answer: missing (a row of question/answer)", "--map question=prompt rep"],
        ),
    ],
)
def test_what_has_another_meaning_is_refused_by_name(row: dict[str, Any], parts: list[str]) -> None:
    text = refused(row)
    assert text.startswith("f:7:")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("columns", "unused_"),
    [
        ({"label": 3}, ["label"]),  # a class, not a mark
        ({"images": []}, ["images"]),
        ({"weight": "heavy"}, ["weight"]),
        ({"loss": 2.31}, ["loss"]),  # a loss that somebody measured
        ({"category": "x"}, ["category"]),
    ],
)
def test_what_is_only_unused_stays_a_note(tmp_path: Path, columns: dict[str, Any], unused_: list[str]) -> None:
    rows, report = read(tmp_path, [{**TALK, **columns}])
    assert rows[0].messages == PLAIN
    assert list(report.unused_columns) == unused_
    assert report.notes == []


def test_a_column_that_means_something_else_can_be_left_alone() -> None:
    row = {**TALK, "weight": 75.5, "label": False, "images": ["x"]}
    ignored = {"weight": "ignore", "label": "ignore", "images": "ignore"}
    assert convert(row, columns=ignored).messages == PLAIN
    assert unused(row, "messages", ignored) == []


def test_an_empty_instruction_with_an_input_is_a_prompt() -> None:
    assert convert({"instruction": "", "input": "only", "output": "b"}).messages[0] == Message(
        "user", "", context="only"
    )


def test_rows_have_weights_too_and_notes_say_what_was_taken(tmp_path: Path) -> None:
    flags: list[dict[str, Any]] = [{}, {"weight": 0.5}, {"sample_weight": "2"}, {"loss": False}, {"label": True}]
    rows, report = read(tmp_path, [{**TALK, **flag} for flag in flags])
    assert [row.messages[1].weight for row in rows] == [1, 0.5, 2, 1]  # the row with loss: false trains nothing
    assert report.notes == [
        "1 row with a column 'weight': taken as the row's weight in the loss, or --map weight=ignore",
        "2 rows with weights: the loss is divided by their sum",
        "1 row with a column 'sample_weight': taken as the row's weight in the loss, or --map sample_weight=ignore",
        "1 row with a column 'loss': taken as the row's weight in the loss, or --map loss=ignore",
        "1 row without an answer of weight above 0: left out",
        "1 row with label true: trained as good answers",
    ]
    assert report.unused_columns == {}
    turns = [*TALK["messages"], {"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0}]
    (row,), report = read(tmp_path, [{"messages": turns, "weight": 0.5}])
    assert [m.weight for m in row.messages] == [1, 0.5, 1, 0]
    assert "1 row with answers of weight 0: context only" in report.notes


@pytest.mark.parametrize(
    "row", [["Sky?", "Blue."], [["Sky?", "Blue."]], TALK["messages"], [{"human": "Sky?", "assistant": "Blue."}]]
)
def test_a_list_alone_is_a_conversation(row: list[Any]) -> None:
    assert convert(row).messages == PLAIN


def test_a_thought_in_a_turn_goes_to_the_answer_after_it() -> None:
    turns = [TALK["messages"][0], {"role": "reasoning", "content": "It is day."}, TALK["messages"][1]]
    assert convert({"messages": turns}).messages == (PLAIN[0], Message("assistant", "Blue.", thought="It is day."))
    assert "messages[1]: a thought without an answer after it" in refused({"messages": turns[:2]})


def test_columns_can_be_mapped_to_thoughts_and_weights() -> None:
    row = {"Question": "Sky?", "CoT": "It is day.", "Answer": "Blue.", "quality": 0.5}
    columns = {"Question": "question", "Answer": "answer", "CoT": "reasoning_content", "quality": "weight"}
    assert convert(row, columns=columns).messages[1] == Message("assistant", "Blue.", thought="It is day.", weight=0.5)
    assert unused(row, "question/answer", columns) == []


def test_a_thought_in_a_column_goes_to_the_answer(tmp_path: Path) -> None:
    (row,), report = read(tmp_path, [{"question": "Sky?", "answer": "Blue.", "reasoning_content": "It is day."}])
    assert row.messages[1] == Message("assistant", "Blue.", thought="It is day.")
    assert report.notes == ["1 row with a column 'reasoning_content': taken as the thought before the answer"]


def test_bad_labels_are_skipped_by_name(tmp_path: Path) -> None:
    rows, report = read(tmp_path, [{**TALK, "label": False}, {**TALK, "label": True}], skip_bad=True)
    assert len(rows) == report.skipped_bad == 1
    (reason,) = report.bad_reasons
    assert "marked as a bad one" in reason
    assert report.bad_first[reason].endswith("rows.jsonl:1:label")


@pytest.mark.parametrize(
    ("lengths", "proposal"),
    [
        ({"标题": 5, "正文": 90}, "--map 标题=prompt 正文=completion"),  # the longest is the answer
        ({"reply": 5, "ask": 90}, "--map ask=prompt reply=completion"),  # unless names say something
        ({"摘要": 5, "正文": 90}, "--map 正文=prompt 摘要=completion"),
        ({"my reply": 5, "b": 3}, "--map b=prompt 'my reply'=completion"),
        ({"body": 90}, "--map body=text"),
        ({"article": 90, "highlights": 9}, "--map article=prompt highlights=completion"),
        ({"sentence": 90, "sentiment": 9}, "--map sentence=prompt sentiment=completion"),
        ({"q_text": 90, "a_text": 9}, "--map q_text=prompt a_text=completion"),
        ({"a text": 90, "q text": 9}, "--map 'q text'=prompt 'a text'=completion"),
        ({"a": 1, "b": 9, "c": 3}, "--map c=prompt b=completion"),
        ({}, "--map COLUMN=prompt COLUMN=completion"),
    ],
)
def test_a_map_is_proposed_from_names_and_contents(lengths: dict[str, int], proposal: str) -> None:
    assert propose(lengths) == proposal


@pytest.mark.parametrize("skip_bad", [False, True])
def test_the_proposal_looks_at_all_rows_and_inspect_says_the_same(tmp_path: Path, skip_bad: bool) -> None:
    rows = [{"b": "short" * 3, "a": "x"}, *({"b": "s", "a": "long " * 30} for _ in range(5))]
    with pytest.raises(Problems) as caught:
        read(tmp_path, rows, skip_bad=skip_bad)
    assert "rows.jsonl:1: no known format\n  received: the columns b, a" in str(caught.value)
    assert "fix:      say what your columns are: --map b=prompt a=completion" in str(caught.value)


def test_of_a_pair_of_answers_it_is_reported_that_one_alone_is_trained(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "Say hi.", "chosen": "Hello!", "rejected": "Go away."}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    report = load([str(data)]).report
    assert any("1 row of preference: the chosen answer alone is trained" in note for note in report.notes)
