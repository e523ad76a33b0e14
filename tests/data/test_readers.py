"""Files to rows: every kind of file, and every way in which one can be broken."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from pyarrow import parquet

from fitune.core.errors import DataError
from fitune.core.records import Message
from fitune.data import readers
from fitune.data.readers import files, locate, read, read_rows
from fitune.data.rows import load

pytestmark = pytest.mark.unit

ROWS = [{"prompt": "加 1 2", "completion": "3"}, {"prompt": 'say "hi",\nplease', "completion": "hi"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'prompt,completion\n加 1 2,3\n"say ""hi"",\nplease",hi\n'


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


def save_to_disk(folder: Path, rows: list[dict], shards: int = 1) -> Path:
    """What `datasets` writes: Arrow streams, and state.json that lists them."""
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    names = [f"data-{n:05}-of-{shards:05}.arrow" for n in range(shards)]
    size = -(-len(rows) // shards)
    for n, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.slice(n * size, size))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write(path: Path, content: bytes | str | list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        parquet.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def found(path: Path) -> list[tuple[Any, int]]:
    """Rows and lines; a file without mistakes."""
    items = list(read_rows(path))
    assert not [item for item in items if isinstance(item, DataError)]
    return [(item[0], item[1].line) for item in items if not isinstance(item, DataError)]


KINDS: list[tuple[str, bytes | str | list[dict], list[int]]] = [
    ("a.jsonl", JSONL, [1, 2]),
    ("a.ndjson", "\n" + JSONL.replace("\n", "\r\n"), [2, 3]),
    ("mac.jsonl", JSONL.replace("\n", "\r"), [1, 2]),
    ("mac.json", json.dumps(ROWS, indent=1).replace("\n", "\r"), [2, 6]),
    ("mac.csv", CSV.replace("\n", "\r").replace(",\r", ",\n"), [2, 3]),
    ("a.json", json.dumps(ROWS), [1, 1]),
    ("rows.json", JSONL, [1, 2]),  # lines in a .json file, a list in a .jsonl file: the content decides
    ("rows.jsonl", "\n" + json.dumps(ROWS, indent=1), [3, 7]),
    ("no_ending", JSONL, [1, 2]),
    ("rows.data", json.dumps(ROWS), [1, 1]),
    ("a.jsonl.gz", packed(JSONL), [1, 2]),
    ("packed.json", packed(JSONL), [1, 2]),
    ("bom.jsonl", b"\xef\xbb\xbf" + JSONL.encode(), [1, 2]),
    ("wide.jsonl", JSONL.encode("utf-16"), [1, 2]),
    ("big.json", json.dumps(ROWS).encode("utf-16-be").join([b"\xfe\xff", b""]), [1, 1]),
    ("wider.jsonl", JSONL.encode("utf-32"), [1, 2]),
    ("a.csv", CSV, [2, 3]),
    ("A.CSV", b"\xef\xbb\xbf" + CSV.encode(), [2, 3]),
    ("windows.csv", CSV.replace("\n", "\r\n").replace(",\r\n", ",\n"), [2, 3]),
    ("wide.csv", CSV.encode("utf-16"), [2, 3]),
    ("gaps.csv", "\n" + CSV.replace("加", "\n加"), [4, 5]),
    ("a.csv.gz", packed(CSV), [2, 3]),
    ("a.tsv", 'prompt\tcompletion\n加 1 2\t3\n"say ""hi"",\nplease"\thi\n', [2, 3]),
    ("a.parquet", ROWS, [1, 2]),
    ("gbk.jsonl", JSONL.encode("gbk"), [1, 2]),
    ("gbk.csv", CSV.encode("gb18030"), [2, 3]),
    ("gbk.json.gz", gzip.compress(json.dumps(ROWS, ensure_ascii=False).encode("gbk")), [1, 1]),
    ("wide_without_mark.csv", CSV.encode("utf-16-le"), [2, 3]),
    ("big_without_mark.jsonl", JSONL.encode("utf-16-be"), [1, 2]),
    ("marks.jsonl", JSONL.encode("utf-8-sig").replace(b"\n", b"\n\xef\xbb\xbf"), [1, 2]),
    ("wrapped.json", json.dumps({"version": 1, "data": ROWS}), [1, 1]),
    ("wrapped.jsonl", json.dumps({"rows": ROWS}, indent=1), [3, 7]),
    ("train.json", json.dumps({"test": ROWS[:1], "train": ROWS}), [1, 1]),
    ("columns.json", json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}), [1, 2]),
    ("numbers.json", json.dumps({str(n): row for n, row in enumerate(ROWS)}), [1, 2]),
    ("lists.json", json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), [1, 2]),
    ("tabs.csv", CSV.replace(",hi", "\thi").replace(",3", "\t3").replace("prompt,", "prompt\t"), [2, 3]),
    ("semicolons.csv", CSV.replace(",hi", ";hi").replace(",3", ";3").replace("prompt,", "prompt;"), [2, 3]),
    ("named.json", "\n\n" + json.dumps({"my_rows": ROWS}), [3, 3]),
    ("viewer.json", json.dumps({"features": [], "rows": [{"row_idx": 0, "row": row} for row in ROWS]}), [1, 1]),
    (
        "pandas.json",
        json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
        [1, 1],
    ),
]


@pytest.mark.parametrize(("name", "content", "lines"), KINDS, ids=[name for name, *_ in KINDS])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str, content: bytes | str | list, lines: list) -> None:
    assert found(write(tmp_path / name, content)) == list(zip(ROWS, lines, strict=True))


def test_a_cell_may_be_longer_than_the_csv_module_likes(tmp_path: Path) -> None:
    long = "字" * 300_000
    assert found(write(tmp_path / "a.csv", f"prompt,completion\n{long},x\n"))[0][0]["prompt"] == long


def test_parquet_leaves_out_what_a_row_does_not_have(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "a"}, call], "text": "t"},
        {"messages": [{"role": "user", "content": "b"}]},
    ]
    assert [row for row, _ in found(write(tmp_path / "a.parquet", rows))] == rows


@pytest.mark.parametrize("shards", [1, 2])
def test_a_data_set_that_was_saved(tmp_path: Path, shards: int) -> None:
    folder = save_to_disk(tmp_path / "saved", ROWS, shards)
    assert [row for row, _ in found(folder)] == ROWS
    assert [row for row, _ in found(folder / "data-00000-of-00001.arrow")] == ROWS if shards == 1 else True


def test_an_arrow_file_too(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert [row for row, _ in found(tmp_path / "a.arrow")] == ROWS


def test_of_saved_splits_train_is_read_or_the_only_one(tmp_path: Path) -> None:
    for name in ("train", "test"):
        save_to_disk(tmp_path / "both" / name, [{"text": name}])
    splits = tmp_path / "both" / "dataset_dict.json"
    for listed, read_split in ((["train", "test"], "train"), (["test"], "test")):
        splits.write_text(json.dumps({"splits": listed}))
        assert found(tmp_path / "both") == [({"text": read_split}, 1)]
    splits.write_text('{"splits": ["a", "test"]}')
    with pytest.raises(DataError, match=r"which split\?\n  received: a, test\n  expected: train\n  fix: .*both.a"):
        files(tmp_path / "both")


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    for name, content in (
        ("b.csv", CSV), ("a.jsonl", JSONL), ("deep/c.parquet", ROWS), ("d.jsonl.gz", packed(JSONL)),
        ("SOURCE.txt", "no data"), ("dataset_infos.json", "{}"), (".cache/x.json", "broken"), ("cache.arrow", "broken"),
    ):  # fmt: skip
        write(tmp_path / name, content)
    assert [path.name for path in files(tmp_path)] == ["a.jsonl", "b.csv", "d.jsonl.gz", "c.parquet"]
    assert [row for row, _ in found(tmp_path)] == ROWS * 4


def test_of_a_data_set_from_the_hub_the_test_rows_stay_out(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--org--name" / "snapshots" / "0123abc"
    for name in ("data/train-00000.jsonl", "data/test-00000.jsonl", "dev.json", "latest.jsonl"):
        write(snapshot / name, JSONL)
    assert [path.name for path in files(snapshot)] == ["train-00000.jsonl", "latest.jsonl"]
    (snapshot / "data" / "train-00000.jsonl").unlink()
    assert len(files(snapshot)) == 3


FAILURES: dict[str, tuple[Any, ...]] = {
    "empty.jsonl": ("", "the file is empty", "expected: rows to train on"),
    "blank.json": (" \n\n", "the file is empty", "expected: rows to train on"),
    "empty.parquet": (b"", "the file is empty", "expected: rows to train on"),
    "blank.csv": ("\n\n", "the file is empty", "expected: rows to train on"),
    "latin.jsonl": (
        b'{"text": "a"}\n' + '{"text": "café"}'.encode("latin-1"),
        ":2: not UTF-8", "received: byte 0xe9", "expected: UTF-8 text", "fix:      save it as UTF-8; from another",
    ),
    "western.csv": ("text\nna\xefve, p\xe8re\n".encode("latin-1"), ":2: not UTF-8", "received: byte 0xef"),
    "broken_utf8.csv": (f"text\n{'一个人在路上走' * 9}\n".encode()[:-2] + b"\n", ":2: not UTF-8"),
    "korean.csv": (f"text\n{'안녕하세요 반갑습니다 ' * 9}\n".encode("euc-kr"), ":2: not UTF-8"),
    "odd.jsonl": ('{"text": "a"}'.encode("utf-16") + b"\n", ": not UTF-16"),
    "nul.jsonl": (
        '{"text": "a"}\n' + "\0" * 500,
        ":2: a NUL character: this is no text", "received: '\\x00", "expected: text in UTF-8", "fix:      the file is",
    ),
    "nul.csv": ("text\na\0b\n", ":2: a NUL character"),
    "wide_without_bom.json": ("{}\n".encode("utf-16-le"), ":1: a NUL character"),
    "parquet_in_disguise.json": (b"PAR1\0\0\0", ":1: a NUL character"),
    "cut.jsonl.gz": (packed(JSONL * 999)[:-20], "the gzip file is cut off or broken", "fix:"),
    "broken.jsonl.gz": (b"\x1f\x8b" + b"x" * 50, "the gzip file is cut off or broken", "fix:      download or pack"),
    "cut.parquet": (b"PAR1" + b"x" * 99, "cannot be read as Parquet", "expected: a whole Parquet file", "fix:"),
    "text.parquet": ("hello", "cannot be read as Parquet", "received: "),
    "text.arrow": ("hello", "cannot be read as Arrow", "received: ", "expected: a whole Arrow file"),
    "pointer.json": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS", "git lfs pull",
    ),
    "book.xls": (b"\xd0\xcf\x11", "unknown kind of file", "received: .xls", "expected: .json, .jsonl", "as .xlsx, or"),
    "book.xlsx": (b"PK\x03\x04", "cannot be read as Excel", "expected: a whole .xlsx file", "fix:      open it"),
    "notes": ("once upon a time", "unknown kind of file", "received: a name without an ending"),
    "pretty.json": (
        '{\n "text": "a"\n}\n', ":1: an object over several lines", "expected: one object a line", "fix:      put [",
    ),
    "open.json": ('[{"text": "a"}', ":1: the list is not closed: the file is cut off", "expected: ]"),
    "broken.json": ('[{"text": "a"},\n {"text"', ":2: broken JSON", "expected: a list of objects", "fix:      nothing"),
    "two.json": ('[{"text": "a"}]\n[{"text": "b"}]', "text behind the end of the list", "received: '[{", "one list"),
    "deep.json": ("[" * 100_000, "broken JSON (nested too deeply)"),
    "quote.csv": ('text\n"a\nb\nc', ":2: broken CSV (unexpected end of data)", 'expected: closed "quotes"', "fix:"),
    "twice.csv": ("text,text\na,b\n", ":1: two columns of one name", "received: 'text'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path, name: str) -> None:
    content, *parts = FAILURES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read(path))
    assert str(caught.value).startswith(str(path))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', [":2: not JSON", "received: '{\"a\":'", "expected: one object a"]),
        ("deep.jsonl", '{"a": 1}\n' + "[" * 99_999 + '1\n{"a": 2}\n', [":2:", "nested too deeply"]),
        ("a.csv", 'a\n1\n"x\ny",2\n2\n', [":3: another number of cells", "received: 2: [", "expected: 1: a", "fix:"]),
    ],
)
def test_a_row_that_cannot_be_parsed_does_not_hide_the_next(
    tmp_path: Path, name: str, content: str, parts: list[str]
) -> None:
    if name == "deep.jsonl":  # a list at the start of a line would be a list of rows at the start of the file
        content = content.replace("[" * 99_999, '{"a": ' + "[" * 99_999)
    good, bad, last = read(write(tmp_path / name, content))
    assert isinstance(bad, DataError)
    for part in parts:
        assert part in str(bad)
    assert not isinstance(good, DataError)
    assert not isinstance(last, DataError)


@pytest.mark.parametrize("listed", [False, True])
def test_a_key_that_stands_twice_is_an_error_of_its_row(tmp_path: Path, listed: bool) -> None:
    """Python keeps the last of two values, so an answer would be gone and nobody would see it."""
    lines = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": "b", "completion": "c"}']
    lines += ['{"prompt": "a", "completion": {"x": 1, "x": 2}}', '{"prompt": "d", "completion": "e"}']
    path = tmp_path / "rows.json"
    path.write_text(f"[{', '.join(lines)}]" if listed else "\n".join(lines))
    found: list[Any] = list(read(path, print))
    assert [one[0]["completion"] for one in found if not isinstance(one, DataError)] == ["b", "e"]
    wrong = [str(one) for one in found if isinstance(one, DataError)]
    assert len(wrong) == 2
    assert all("two values of one key" in one for one in wrong)
    assert "'completion'" in wrong[0]


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", JSONL + "\0" * 100_000)
    rows: Any = read(path)  # a generator: it can be closed
    assert next(rows)[0] == ROWS[0]  # what is broken behind has not been looked at
    rows.close()


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: no such file\n  fix:      nothing like it in "):
        files(tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data in this folder\n  expected: files named \.json, \.jsonl"):
        files(tmp_path / "empty")
    folder = save_to_disk(tmp_path / "saved", ROWS)
    (folder / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match="a part of this data set is missing\n  expected: data-00000-of-00001"):
        files(folder)
    for text in ("", "[]", "{}", '{"_data_files": 1}', '{"_data_files": [1]}'):
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError, match="broken: not what `datasets` writes"):
            files(folder)
    with pytest.raises(DataError, match="cannot be read"):
        files(Path("x" * 5000))


def test_standard_input_is_refused_and_a_file_of_its_name_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"standard input .*\n  received: -\n  expected: a path.*\n  fix:      write"):
        locate("-")
    write(tmp_path / "-", JSONL)
    assert locate("-") == Path("-")


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no such device here")
def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        files(Path("/dev/null"))


def test_what_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows", "a/b.jsonl", "a/b.csv.gz", "a/b/c", "../a", "./a", "E:\\d\\a.json", "a\\b", "/a/b"):
        assert locate(name) == Path(name)  # a path, whether it is there or not
    with pytest.raises(DataError) as caught:
        locate("no-such-org/no-such-data")
    text = str(caught.value)
    for part in ("no-such-org/no-such-data: no such file or folder, and the hub does not give it", "received: ",
                 "expected: a file, a folder, or the id of a data set on the hub (org/name)", "fix: "):  # fmt: skip
        assert part in text
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "org" / "name", JSONL)
    assert locate("org/name") == Path("org/name")  # what is here comes first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", CSV.encode("gbk"), "read as GB18030"),
        ("a.jsonl", JSONL.encode("utf-16"), "read as UTF-16"),
        ("a.txt", "今天天气很好".encode("gbk"), "read as GB18030"),
        ("a.json", json.dumps({"test": ROWS, "data": ROWS}), "the rows are the list 'data'"),
        ("b.json", json.dumps({"data": ROWS, "examples": ROWS}), "the list 'data'; left alone: examples"),
    ],
)
def test_what_no_file_says_of_itself_gets_a_notice(tmp_path: Path, name: str, content: bytes | str, says: str) -> None:
    path = write(tmp_path / name, content)
    notes: list[str] = []
    assert all(not isinstance(item, DataError) for item in read(path, notes.append))
    assert len(notes) == 1
    assert notes[0].startswith(f"{path}: ")
    assert says in notes[0]
    report = load([str(path)]).report
    assert report.notes == notes


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversation": [{"human": "a", "assistant": "b"}]},
        {"data": ["a", "b"]},
        {"data": [["a", "b"]]},
        {"data": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b", "tools": []},
    ],
)
def test_one_row_alone_in_a_file_is_no_wrapper(tmp_path: Path, line: dict) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(line))
    assert found(path) == [(line, 1)]
    assert load([str(path)]).rows[0].messages == (Message("user", "a"), Message("assistant", "b"))


def test_a_list_of_turns_a_line_is_a_conversation_a_line(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "b"}] for n in range(3)]
    lines = write(tmp_path / "a.jsonl", "".join(json.dumps(talk) + "\n" for talk in talks))
    whole = write(tmp_path / "a.json", json.dumps(talks))
    assert [row for row, _ in found(lines)] == [row for row, _ in found(whole)] == talks
    assert [line for _, line in found(lines)] == [1, 2, 3]
    assert [row.messages[0].content for row in load([str(lines)]).rows] == ["0", "1", "2"]


def book(path: Path, sheets: dict[str, list[list]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, rows in sheets.items():
        sheet = made.create_sheet(title)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


def test_a_spreadsheet_is_its_first_sheet_with_rows(tmp_path: Path) -> None:
    day = datetime.date(2024, 5, 1)
    rows: list[list[Any]] = [
        [None, None],
        ["prompt", "completion", None],
        ["加", 42],
        [None, None],
        ["除", 0.5],
        [day, True],
        ["x", None],
    ]
    path = book(tmp_path / "a.xlsx", {"notes": [["about"]], "rows": rows, "more": rows})
    notes: list[str] = []
    items: list[Any] = list(read(path, notes.append))
    assert [(item[0], item[1].line) for item in items] == [
        ({"prompt": "加", "completion": "42"}, 3),
        ({"prompt": "除", "completion": "0.5"}, 5),
        ({"prompt": "2024-05-01", "completion": True}, 6),
        ({"prompt": "x"}, 7),
    ]
    assert notes == [f"{path}: the rows are those of the sheet 'rows'; left alone: more"]
    with pytest.raises(DataError, match="the file is empty"):
        list(read(book(tmp_path / "b.xlsx", {"a": [["prompt"]]})))
    with pytest.raises(DataError, match="two columns of one name"):
        list(read(book(tmp_path / "c.xlsx", {"a": [["p", "p"], ["a", "b"]]})))


def test_a_file_of_text_is_a_document_and_a_folder_of_them_many(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "# 标题\r\n\r\ntext\n")
    write(tmp_path / "a.txt", b"\xef\xbb\xbfonce upon a time")
    write(tmp_path / "deep" / "c.markdown", "天气".encode("gbk"))
    write(tmp_path / "d.rst", "not read")
    texts = ["once upon a time", "# 标题\n\ntext\n", "天气"]
    assert found(tmp_path) == [({"text": text}, 1) for text in texts]
    loaded = load([str(tmp_path)])
    rows, report = loaded.rows, loaded.report
    assert [row.messages for row in rows] == [(Message("assistant", text),) for text in texts]
    assert report.formats == {"text": 3}
    (error,) = read(write(tmp_path / "e.txt", " \n"))
    assert str(error).startswith(f"{tmp_path / 'e.txt'}:1: the document is empty")


@pytest.mark.parametrize(
    "content", [JSONL, "\n" + JSONL.replace("\n", "\n\n"), '[\n {"text": "a"},\n {"text": "b"}\n]\n']
)
def test_rows_in_json_under_the_name_of_a_text_are_rows(tmp_path: Path, content: str) -> None:
    notes: list[str] = []
    items = list(read(write(tmp_path / "rows.txt", content), notes.append))
    rows = [(item[0], item[1].line) for item in items if not isinstance(item, DataError)]
    assert rows == found(write(tmp_path / "rows.jsonl", content))
    assert len(rows) == 2
    assert notes == [f"{tmp_path / 'rows.txt'}: read as rows in JSON, which it holds, not as plain text"]


@pytest.mark.parametrize("content", ['{"a": 1}\nand more', "[1, 2]", "[]", '{"a": 1}\n[1]', '{"a": '])
def test_other_text_stays_a_document(tmp_path: Path, content: str) -> None:
    assert found(write(tmp_path / "a.txt", content)) == [({"text": content}, 1)]


def test_texts_beside_rows_are_left_alone_with_a_note(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", JSONL), ("README.md", "#"), ("LICENSE.txt", "x"), ("one.txt", "story")):
        write(tmp_path / name, content)
    assert [path.name for path in files(tmp_path)] == ["a.jsonl"]
    found = load([str(tmp_path)])
    report = found.report
    assert len(found.rows) == 2
    assert report.notes == [f"{tmp_path}: 1 text files beside the rows are left alone; name them to read"]
    (tmp_path / "one.txt").unlink()
    report = load([str(tmp_path)]).report
    assert report.notes == []


def test_every_kind_is_tried() -> None:
    texts, tables = {".txt", ".md", ".markdown"}, {".csv", ".tsv", ".xlsx", ".parquet", ".arrow"}
    assert set(readers.READERS) == {".json", ".jsonl", ".ndjson"} | texts | tables
