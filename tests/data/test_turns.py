"""Calls, channels, flags, tools and pictures as other toolkits write them: obeyed, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.core.errors import DataError
from fitune.core.records import Conversation, DataReport, Message, Source, ToolCall
from fitune.data.conversations import to_conversation, unused
from fitune.data.rows import load

pytestmark = pytest.mark.unit

USER, ANSWER = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "10:05"}
ANSWERED = Message("assistant", "10:05")
TALK = [USER, ANSWER, USER, ANSWER]
TOOL = {"name": "clock", "parameters": {}}
FRAMED = ({"type": "function", "function": TOOL},)


def convert(*turns: object, **columns: Any) -> Conversation:
    return to_conversation({"messages": list(turns), **columns}, Source("f", 7))


def refused(*turns: object, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        convert(*turns, **columns)
    return str(caught.value)


def notes(tmp_path: Path, **columns: Any) -> tuple[list[Conversation], DataReport]:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ({"messages": TALK, **columns}, {"messages": TALK})), encoding="utf-8"
    )
    found = load([str(tmp_path / "rows.jsonl")])
    return list(found.rows), found.report


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args", "kwargs"])
@pytest.mark.parametrize("framed", [True, False])
def test_arguments_of_calls_have_many_names(key: str, framed: bool) -> None:
    call: dict[str, Any] = {"name": "clock", key: {"city": "Rome"}}
    call = {"id": "1", "type": "function", "function": call} if framed else {"id": "1", **call}
    messages = convert(USER, {"role": "assistant", "content": None, "tool_calls": [call]}, ANSWER).messages
    assert messages[1].tool_calls == (ToolCall("clock", '{"city": "Rome"}', "1"),)


def test_a_call_without_arguments_has_none_and_unknown_keys_are_named() -> None:
    turn: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "name": "clock"}]}
    assert convert(USER, turn).messages[1].tool_calls[0].arguments == "{}"
    turn["tool_calls"][0]["params"] = {"city": "Rome"}
    text = refused(USER, turn)
    assert "messages[1].tool_calls[0]: a call whose arguments are not found\n  received: params" in text
    assert "name them arguments" in text


def test_parts_of_calls_and_results_become_turns() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "clock", "input": {"city": "Rome"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "10:05"}
    asked = {"type": "text", "text": "So?"}
    call = (ToolCall("clock", '{"city": "Rome"}', "t1"),)
    calling = {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]}
    found = convert(USER, calling, {"role": "user", "content": [result, asked]}, ANSWER).messages[1:]
    assert found == (
        Message("assistant", "I look.", tool_calls=call),
        Message("tool", "10:05", call_id="t1"),
        Message("user", "So?"),
        ANSWERED,
    )
    alone = {**result, "content": [{"type": "text", "text": "10:05"}]}
    bare = {"role": "assistant", "content": [use]}
    found = convert(USER, bare, {"role": "user", "content": [alone]}, ANSWER).messages[1:]
    assert found == (Message("assistant", "", tool_calls=call), Message("tool", "10:05", call_id="t1"), ANSWERED)
    assert "text before a tool's result" in refused(USER, calling, {"role": "user", "content": [asked, result]}, ANSWER)
    pictured = {**result, "content": [{"type": "image"}]}
    assert "messages[2].content[0].content[0]: pictures" in refused(
        USER, calling, {"role": "user", "content": [pictured]}, ANSWER
    )
    assert "not a part with text" in refused({"role": "user", "content": [use]}, ANSWER)


@pytest.mark.parametrize("key", ["image", "images", "img", "audio", "videos", "image_path", "imageUrl"])
def test_pictures_inside_turns_are_refused_by_name(key: str) -> None:
    assert f"messages[0].{key}: pictures, sound and films" in refused({**USER, key: ["a.png"]}, ANSWER)
    assert (
        convert({**USER, key: []}, ANSWER).messages[1] == convert({**USER, key: None}, ANSWER).messages[1] == ANSWERED
    )


@pytest.mark.parametrize(
    "name",
    ["image_paths", "image_file", "img", "imgs", "picture", "pictures", "photo", "pixel_values", "audio_path",
     "audio_file", "video_path", "video_url", "image_base64", "Images"],
)  # fmt: skip
def test_columns_of_pictures_are_refused_by_name(name: str) -> None:
    text = refused(*TALK, **{name: "a"})
    assert f"{name}: pictures, sound and films" in text
    assert f"--map {name}=ignore" in text
    assert len(convert(*TALK, **{name: None}).messages) == 4
    assert len(convert(*TALK, image_caption="a cat", videogame="chess").messages) == 4


def test_channels_are_thoughts_calls_and_answers() -> None:
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "channel": "analysis", "content": "I need"},
        {"role": "assistant", "channel": "analysis", "content": "a clock."},
        {"role": "assistant", "channel": "commentary", "recipient": "functions.clock", "content": '{"city": "Rome"}'},
        {"role": "tool", "name": "clock", "channel": "commentary", "recipient": "assistant", "content": "10:05"},
        {"role": "assistant", "channel": "analysis", "content": "Good."},
        {"role": "assistant", "channel": "final", "content": "10:05"},
    ]
    assert convert(*turns).messages[1:] == (
        Message("assistant", "", tool_calls=(ToolCall("clock", '{"city": "Rome"}'),), thought="I need\na clock."),
        Message("tool", "10:05", name="clock"),
        Message("assistant", "10:05", thought="Good."),
    )
    assert unused({"messages": turns}, "messages", {}) == []
    assert "messages[1]: a thought without an answer after it" in refused(*turns[:2])
    assert "messages[1].channel: commentary to nobody" in refused(USER, {**turns[3], "recipient": None}, ANSWER)
    assert "messages[1]: a thought with a weight of its own" in refused(USER, {**turns[1], "weight": 0}, ANSWER)
    assert convert(USER, {**ANSWER, "channel": "e-mail"}).messages[1] == ANSWERED  # any other key


@pytest.mark.parametrize(
    "key", ["train_on_turn", "do_train", "calculate_loss", "learn", "supervise", "loss_mask", "weight"]
)
@pytest.mark.parametrize("value", [False, 0, "0"])
def test_flags_of_turns_have_many_names(key: str, value: object) -> None:
    turns = [USER, {**ANSWER, key: value}]
    assert convert(*turns).messages[1].weight == 0
    assert unused({"messages": turns}, "messages", {}) == []


@pytest.mark.parametrize(
    ("columns", "weights"),
    [
        ({"loss_mask": 0}, [0, 0]),
        ({"loss_mask": [0, 0, 0, 1]}, [0, 1]),  # of turns
        ({"loss_mask": [True, False]}, [1, 0]),  # of answers
        ({"weight": [0, 0.5]}, [0, 0.5]),
        ({"weight": False}, [0, 0]),
        ({"train_on_turn": [False, True]}, [0, 1]),
        ({"train": 0}, [0, 0]),
        ({"learn": "0", "weight": 2}, [0, 0]),
        ({"loss": [2.31, 0.7]}, [1, 1]),  # losses that somebody measured
        ({"loss_mask": None, "weight": []}, [1, 1]),
    ],
)
def test_rows_have_masks_and_flags(columns: dict[str, Any], weights: list[float]) -> None:
    assert [m.weight for m in convert(*TALK, **columns).messages if m.role == "assistant"] == weights


def test_masks_that_fit_nothing_and_weights_that_are_none_are_refused_by_name() -> None:
    text = refused(*TALK, loss_mask=[1, 0, 1])
    assert "loss_mask: a list of weights that fits neither the turns nor the answers\n  received: 3 entries" in text
    assert "expected: 4 (turns) or 2 (answers)" in text
    assert "--map loss_mask=ignore" in text
    assert "weight: no weight of the loss\n  received: nan" in refused(*TALK, weight=float("nan"))
    assert "weight: no weight of the loss" in refused(*TALK, weight=[-1, 1])


@pytest.mark.parametrize(
    "columns",
    [{"label": 0}, {"label": -1}, {"label": "0"}, {"label": 0.0}, {"label": "undesirable"}, {"label": "Bad"},
     {"label": "rejected"}, {"desirable": False}, {"is_good": False}, {"is_good": 0}, {"kto_label": 0},
     {"kto_tag": "false"}, {"undesirable": True}, {"is_bad": 1}],
)  # fmt: skip
def test_answers_that_are_marked_as_bad_are_refused_by_name(columns: dict[str, Any]) -> None:
    (name,) = columns
    text = refused(*TALK, **columns)
    assert f"{name}: the answer is marked as a bad one" in text
    assert f"--skip-bad; if the column means something else: --map {name}=ignore" in text


@pytest.mark.parametrize(
    ("columns", "note"),
    [
        ({"label": 1}, "1 row with label 1: trained as good answers"),
        ({"label": "desirable"}, "1 row with label desirable: trained as good answers"),
        ({"is_good": True}, "1 row with is_good true: trained as good answers"),
        ({"undesirable": False}, "1 row with undesirable false: trained as good answers"),
        (
            {"loss_mask": [0, 0, 0, 1]},
            "1 row with a column 'loss_mask': taken as the weights of its turns, or --map loss_mask=ignore",
        ),
    ],
)
def test_what_was_obeyed_is_noted(tmp_path: Path, columns: dict[str, Any], note: str) -> None:
    rows, report = notes(tmp_path, **columns)
    assert len(rows) == 2
    assert note in report.notes
    assert report.unused_columns == {}


def test_tools_stand_in_columns_or_in_the_systems_turn() -> None:
    system = {"role": "system", "content": "s", "tools": [TOOL]}
    for row in (
        {"messages": TALK, "functions": [TOOL]},
        {"messages": TALK, "functions": json.dumps([TOOL]), "tools": [TOOL]},
        {"messages": [system, *TALK]},
        {"conversations": json.dumps([{**system, "tools": json.dumps([TOOL])}, *TALK])},
        {"prompt": [system, USER], "completion": "10:05"},
    ):
        conversation = to_conversation(row, Source("f", 7))
        assert conversation.tools == FRAMED
        assert unused(row, conversation.format, {}) == []
    other = [{"name": "other"}]
    assert "functions: tools in two places" in refused(*TALK, functions=other, tools=[TOOL])
    assert "messages[0].tools: tools in two places" in refused(system, *TALK, tools=other)
    assert "messages[0].tools: tools in a turn\n  received: user" in refused({**USER, "tools": [TOOL]}, ANSWER)
    assert "functions[0]: not a function description" in refused(*TALK, functions=[{}])


DETAILS = [{"type": "reasoning.text", "text": "I look."}]


@pytest.mark.parametrize(
    "thought",
    [{"Complex_CoT": "I look."}, {"cot": "I look."}, {"chain_of_thought": "I look."}, {"reasoning_details": DETAILS},
     {"reasoning_details": [{"text": "I look."}], "reasoning": "I look."}],
)  # fmt: skip
def test_thoughts_have_many_names(thought: dict[str, Any]) -> None:
    row = {"question": "Time?", "answer": "10:05", **thought}
    assert to_conversation(row, Source("f", 7)).messages[1] == Message("assistant", "10:05", thought="I look.")
    assert unused(row, "question/answer", {}) == []
    assert convert(USER, {**ANSWER, **thought}).messages[1].thought == "I look."
    assert unused({"messages": [{**ANSWER, **thought}]}, "messages", {}) == []


def test_a_thought_that_is_hidden_is_refused_by_name() -> None:
    hidden = [{"type": "reasoning.encrypted", "data": "x"}]
    assert "messages[1].reasoning_details[0]: not a part" in refused(USER, {**ANSWER, "reasoning_details": hidden})


@pytest.mark.parametrize(
    ("turns", "fix"),
    [
        ([USER, ANSWER, USER], "end it with an answer, or leave such rows out with --skip-bad"),
        ([{**USER, "content": "\ud83d"}, ANSWER], "write the whole character, or leave such rows out with --skip-bad"),
    ],
)
def test_what_is_wrong_with_turns_has_a_fix(turns: list[Any], fix: str) -> None:
    assert f"fix:      {fix}" in refused(*turns)


def test_a_system_column_beside_a_systems_turn_has_a_fix() -> None:
    assert "fix:      join them in one" in refused({"role": "system", "content": "s"}, USER, ANSWER, system="t")
