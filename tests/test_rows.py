"""Files to conversations: formats, and where a bad row stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fitune.errors import DataError, Problems
from fitune.records import DataReport, Message
from fitune.rows import load


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_format_becomes_the_same_turns(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]], "extra": 1}
    path = write(tmp_path / "a.json", json.dumps([alpaca, {"prompt": "p", "completion": "c"}]))
    report = DataReport()
    first, second = load([path], report)
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
    assert [c.source.line for c in load([path], DataReport())] == [2, 6, 10]


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
        load([path], DataReport())
    assert f"{path}{message}" in str(caught.value) or message in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_bad_rows_are_told_at_once_up_to_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' * 30)
    with pytest.raises(Problems) as caught:
        load([path], DataReport())
    assert ":20:completion" in str(caught.value)
    assert "and 10 more bad rows" in str(caught.value)


def test_missing_file_folder_and_wrong_encoding(tmp_path: Path) -> None:
    (tmp_path / "gbk.json").write_bytes('[{"prompt": "你好", "completion": "好"}]'.encode("gbk"))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(Problems) as caught:
        load([str(tmp_path / "none.json"), str(empty), str(tmp_path / "gbk.json")], DataReport())
    for part in ("no such file", "no data in this folder", "not UTF-8"):
        assert part in str(caught.value)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + b'[{"prompt": "a", "completion": "b"}]')
    assert len(load([str(tmp_path / "bom.json")], DataReport())) == 1
