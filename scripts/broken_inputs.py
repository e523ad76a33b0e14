"""A hundred kinds of broken data: `python scripts/broken_inputs.py FOLDER` writes a file for each.

Each case says what is to become of it: how many rows are good, how many bad ones are reported with file:line:field (or
counted, with --skip-bad), or that the file cannot be read at all. Some look broken and are not.
tests/scripts/test_broken.py runs `fitune train` and `fitune inspect` on every one of them.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

GOOD = {"instruction": "加 1 2", "output": "3"}
TURNS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@dataclass(frozen=True)
class Case:
    """A file and what is to become of it.

    name: of the file. make: writes it. good, bad: rows; good None: nothing of the file can be used. says: a part of
    the message.
    """

    name: str
    make: Callable[[Path], None]
    good: int | None
    bad: int = 0
    says: str = ""


def line(value: Any) -> str:
    """A row as a line of JSON."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def text(content: str | bytes) -> Callable[[Path], None]:
    """Writes this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda path: _bytes(path, data)


def _bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def table(
    rows: list[dict[str, Any]] | pa.Table, cut: int | None = None, spoil: int | None = None
) -> Callable[[Path], None]:
    """Writes Parquet, cut off after so many bytes, or with a byte changed."""

    def write(path: Path) -> None:
        sink = io.BytesIO()
        parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
        data = bytearray(sink.getvalue())
        if spoil is not None:
            data[spoil] ^= 0xFF
        path.write_bytes(bytes(data[:cut]))

    return write


def folder(path: Path) -> None:
    """A directory where a file is expected."""
    path.mkdir()


def dead_link(path: Path) -> None:
    """A link to nothing."""
    path.symlink_to(path.with_name("nowhere.jsonl"))


def zipped(path: Path) -> None:
    """A ZIP archive, which is no gzip."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("rows.jsonl", line(GOOD))


def row(name: str, value: Any, says: str = "") -> Case:
    """One bad row between two good ones."""
    return Case(f"{name}.jsonl", text(line(GOOD) + line(value) + line(GOOD)), 2, 1, says or ":2")


def raw(name: str, content: str | bytes, says: str = ":2") -> Case:
    """One line that is no JSON between two good ones."""
    data = content.encode() if isinstance(content, str) else content
    return Case(f"{name}.jsonl", text(line(GOOD).encode() + data + b"\n" + line(GOOD).encode()), 2, 1, says)


def whole(name: str, content: str | bytes, says: str = "") -> Case:
    """A file that is refused as it is."""
    return Case(name, text(content), None, says=says or name)


def fine(name: str, content: str | bytes, good: int = 1) -> Case:
    """Looks broken, and is not."""
    return Case(name, text(content), good)


def turns(*given: Any) -> dict[str, Any]:
    """A conversation of these turns."""
    return {"messages": list(given)}


def call(arguments: str) -> dict[str, Any]:
    """An answer that calls a tool."""
    return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}


USER, ANSWER = TURNS["messages"]
NESTED = "[" * 100_000 + "]" * 100_000
LONG = "你好, world! " * 800_000  # more than 10 MB

CASES: list[Case] = [
    # lines that are no JSON
    raw("truncated", '{"instruction": "a", "outp', ":2"),
    raw("truncated-in-escape", '{"instruction": "a\\u00'),
    raw("single-quotes", "{'instruction': 'a', 'output': 'b'}"),
    raw("trailing-comma", '{"instruction": "a", "output": "b",}'),
    raw("unquoted-key", '{instruction: "a", "output": "b"}'),
    raw("two-objects-on-a-line", '{"instruction": "a", "output": "b"} {"instruction": "c", "output": "d"}'),
    raw("comma-behind-object", '{"instruction": "a", "output": "b"},'),
    raw("comment", "// a comment"),
    raw("python-none", '{"instruction": "a", "output": None}'),
    raw("raw-tab-in-text", '{"instruction": "a\tb", "output": "c"}'),
    raw("control-character", '{"instruction": "a\x01b", "output": "c"}'),
    raw("bad-escape", '{"instruction": "C:\\data", "output": "c"}'),
    raw("html", "<html><body>502 Bad Gateway</body></html>"),
    raw("merge-conflict", "<<<<<<< HEAD"),
    raw("deep-nesting", '{"instruction": ' + NESTED + ', "output": "b"}', "nested too deeply"),
    raw("half-a-number", "12e"),
    # JSON that is no row
    row("a-list", [1, 2], "not a row"),
    row("a-text", "hello", "not a row"),
    row("a-number", 5, "not a row"),
    row("a-null", None, "not a row"),
    row("a-bool", True, "not a row"),
    row("empty-object", {}, "no known format"),
    row("unknown-columns", {"foo": "a", "bar": "b"}, "--map foo=prompt bar=completion"),
    row("wrong-case", {"Instruction": "a", "Out": "b"}, "no known format"),
    row("space-in-key", {"instruction ": "a", "out": "b"}, "no known format"),
    # fields of a wrong type
    row("number-as-answer", {"instruction": "a", "output": 3}, ":output: not a text"),
    row("list-as-answer", {"instruction": "a", "output": ["b"]}, ":output: not a text"),
    row("object-as-answer", {"instruction": "a", "output": {"text": "b"}}, ":output: not a text"),
    row("null-answer", {"instruction": "a", "output": None}, ":output"),
    row("bool-answer", {"instruction": "a", "output": False}, ":output: not a text"),
    row("nan-answer", {"instruction": "a", "output": float("nan")}, ":output: not a text"),
    row("null-instruction", {"instruction": None, "output": "b"}, ":instruction"),
    row("number-as-input", {"instruction": "a", "input": 5, "output": "b"}, ":input: not a text"),
    row("list-as-system", {"instruction": "a", "output": "b", "system": ["c"]}, ":system: not a text"),
    row("missing-answer", {"instruction": "a"}, "missing"),
    row("missing-question", {"output": "b"}, "missing"),
    row("empty-answer", {"instruction": "a", "output": ""}, ":output: the answer is empty"),
    row("blank-answer", {"instruction": "a", "output": " \n\t　"}, ":output: the answer is empty"),
    raw("lone-surrogate", '{"instruction": "a", "output": "\\ud83d"}', "half a character"),
    raw("surrogate-in-question", '{"instruction": "\\ude00", "output": "b"}', "half a character"),
    row("history-of-texts", {**GOOD, "history": ["a", "b"]}, ":history[0]"),
    row("history-of-triples", {**GOOD, "history": [["a", "b", "c"]]}, ":history[0]"),
    row("history-of-nulls", {**GOOD, "history": [[None, None]]}, ":history[0]"),
    row("history-as-number", {**GOOD, "history": 7}, ":history"),
    row("history-as-broken-json", {**GOOD, "history": '[["a"'}, ":history: not JSON"),
    # conversations
    row("messages-as-text", {"messages": "a"}, ":messages"),
    row("messages-as-object", {"messages": {"role": "user"}}, ":messages"),
    row("no-messages", {"messages": []}, ":messages"),
    row("null-messages", {"messages": None}, ":messages"),
    row("null-turn", turns(USER, None), ":messages[1]"),
    row("text-as-turn", turns("a", ANSWER), ":messages[0]"),
    row("list-as-turn", turns(["user", "a", "b"], ["assistant", "b", "c"]), ":messages[0]"),
    row("no-role", turns({"content": "a"}, ANSWER), ":messages[0].role"),
    row("unknown-role", turns({"role": "narrator", "content": "a"}, ANSWER), "unknown role"),
    row("null-role", turns({"role": None, "content": "a"}, ANSWER), ":messages[0].role"),
    row("number-as-role", turns({"role": 1, "content": "a"}, ANSWER), ":messages[0].role"),
    row("no-content", turns(USER, {"role": "assistant"}), ":messages[1].content"),
    row("null-content", turns(USER, {"role": "assistant", "content": None}), ":messages[1].content"),
    row("nested-nulls", turns(USER, {"role": "assistant", "content": [None, {"text": None}]}), ":messages[1].content"),
    row("picture-part", turns({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER), "no"),
    row("ends-with-question", turns(USER, ANSWER, USER), "no answer at the end"),
    row("only-a-question", turns(USER), "no answer at the end"),
    row("only-a-system-message", turns({"role": "system", "content": "a"}), "no answer at the end"),
    row("two-system-messages", {"system": "x", **turns({"role": "system", "content": "y"}, USER, ANSWER)}, ":system"),
    row("empty-turn", turns(USER, {"role": "assistant", "content": ""}), "the answer is empty"),
    row("sharegpt-no-value", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, ".content"),
    row("sharegpt-unknown", {"conversations": [{"from": "alien", "value": "a"}]}, ".from: unknown role"),
    row("sharegpt-ends-human", {"conversations": [{"from": "human", "value": "a"}]}, "no answer at the end"),
    row("call-without-name", turns(USER, {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}), "not a call"),
    row("call-as-text", turns(USER, {"role": "assistant", "tool_calls": "weather"}), ":messages[1].tool_calls"),
    row("call-arguments-list", turns(USER, call("[1]")), "not an object"),
    row("call-arguments-broken", turns(USER, call("{")), "not JSON"),
    row("user-calls", turns({"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, ANSWER), "only an answer"),
    row("tools-as-number", {**TURNS, "tools": 3}, ":tools"),
    row("tools-without-name", {**TURNS, "tools": [{"description": "d"}]}, ":tools[0]"),
    row("preference-without-prompt", {"chosen": "a", "rejected": "b"}, ":prompt"),
    row("preference-empty-chosen", {"prompt": "q", "chosen": "", "rejected": "b"}, ":chosen"),
    row("text-is-number", {"text": 3}, ":text"),
    # lists
    whole("list-cut-off.json", json.dumps([GOOD, GOOD])[:-9], "list-cut-off.json:1"),
    whole("list-not-closed.json", json.dumps([GOOD])[:-1], "cut off"),
    whole("list-twice.json", json.dumps([GOOD]) * 2, "behind the end"),
    whole("list-broken-inside.json", '[{"instruction": "a", "output": "b"}, {"instruction" "a"}]', "broken JSON"),
    whole("empty-list.json", "[]", "no rows"),
    whole("object-over-lines.json", json.dumps(GOOD, indent=1), "over several lines"),
    Case("list-of-mixed.json", text(json.dumps([GOOD, 3, TURNS, None, {"x": 1}])), 2, 3, "not a row"),
    # bytes
    whole("empty.jsonl", "", "empty"),
    whole("blank.jsonl", " \n\n\t\n", "empty"),
    whole("nul-bytes.jsonl", line(GOOD).encode() + b"\0\0\0\0\n", "NUL"),
    whole("only-nul.jsonl", b"\0" * 4096, "NUL"),
    whole("gbk-and-utf8.jsonl", line(GOOD).encode("gbk") + (line(GOOD) * 9).encode(), "not UTF-8"),
    whole("latin1.jsonl", line({"instruction": "é", "output": "è"}).encode("latin-1"), "not UTF-8"),
    whole("utf16-without-mark.jsonl", line(GOOD).encode("utf-16-le")[:-1], "utf16-without-mark"),
    whole("utf16-odd.jsonl", line(GOOD).encode("utf-16")[:-1], "UTF-16"),
    whole("utf8-cut-in-character.jsonl", line(GOOD).encode() + "字".encode()[:2], "not UTF-8"),
    whole("gzip-cut-off.jsonl.gz", gzip.compress(line(GOOD).encode() * 99)[:60], "gzip"),
    whole("gzip-broken.jsonl.gz", gzip.compress(line(GOOD).encode())[:-6] + b"abcdef", "gzip"),
    whole("not-a-gzip.jsonl.gz", b"\x1f\x8bnot gzip at all", "gzip"),
    whole("random.jsonl", bytes(range(128, 256)) * 20, "not UTF-8"),
    whole("lfs-pointer.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "Git LFS"),
    whole("a-picture.png", b"\x89PNG\r\n\x1a\n" + b"1" * 300, "unknown kind"),
    whole("a-document.docx", b"PK\x03\x04" + b"\0" * 300, "unknown kind"),
    whole("plain.rtf", "just some text\n", "unknown kind"),
    whole("blank.txt", " \n", "the document is empty"),
    Case("zip-as.jsonl", zipped, None, says="zip-as.jsonl"),
    Case("a-folder.json", folder, None, says="no data in this folder"),
    Case("dead-link.jsonl", dead_link, None, says="no such file"),
    Case("same-key-twice.jsonl", text(line(GOOD) + '{"instruction": "a", "output": "x", "output": "b"}\n'), 1, 1,
         "two values of one key"),
    # CSV and TSV
    whole("header-only.csv", "instruction,output\n", "no rows"),
    whole("empty.csv", "", "empty"),
    whole("open-quote.csv", 'instruction,output\na,"b\nc,d\n', "broken CSV"),
    whole("quote-inside.csv", 'instruction,output\n"a"b,c\n', "broken CSV"),
    whole("two-equal-columns.csv", "output,output\na,b\n", "two columns of one name"),
    whole("nul.csv", b"instruction,output\na,\0\n", "NUL"),
    whole("latin1.csv", "instruction,output\né,è\n".encode("latin-1"), "not UTF-8"),
    Case("book-of-bytes.xlsx", text("PK no book"), None, says="cannot be read as Excel"),
    whole("pipes.csv", "instruction|output\na|b\n", "pipes.csv:2"),
    whole("no-header.csv", "what is 1+1?,2\nwhat is 2+2?,4\n", "no-header.csv:2"),
    Case("too-many-cells.csv", text("instruction,output\na,b\na,b,c\na,b\n"), 2, 1, ":3"),
    Case("too-few-cells.csv", text("instruction,output\na,b\na\na,b\n"), 2, 1, ":3"),
    Case("empty-cell.csv", text("instruction,output\na,\na,b\n"), 1, 1, ":2:output"),
    Case("tabs-in-tsv.tsv", text("instruction\toutput\na\tb\na\tb\tc\n"), 1, 1, ":3"),
    # Parquet and Arrow
    whole("not-parquet.parquet", line(GOOD), "cannot be read as Parquet"),
    whole("empty.parquet", b"", "empty"),
    Case("cut-off.parquet", table([GOOD] * 50, cut=-40), None, says="cannot be read as Parquet"),
    Case("changed-byte.parquet", table([GOOD] * 50, spoil=-9), None, says="cannot be read as Parquet"),
    Case("no-rows.parquet", table(pa.Table.from_pylist([GOOD]).slice(0, 0)), None, says="no rows"),
    Case("no-columns.parquet", table(pa.table({})), None, says="no rows"),
    Case("numbers.parquet", table([{"instruction": 1, "output": 2}] * 2), None, says=":1:"),
    Case("nulls.parquet", table([GOOD, {"instruction": "a", "output": None}]), 1, 1, ":2:output"),
    Case("null-structs.parquet", table([TURNS, {"messages": [None]}]), 1, 1, ":2:messages"),
    whole("not-arrow.arrow", b"ARROW1\0\0" + b"x" * 50, "cannot be read as Arrow"),
    # mixtures
    Case("many-bad-rows.jsonl", text(line(GOOD) + line({**GOOD, "output": ""}) * 500), 1, 500, "more bad rows"),
    whole("all-bad.jsonl", line({"x": 1}) * 5, "no known format"),
    # looks broken, and is not
    fine("bom.jsonl", b"\xef\xbb\xbf" + line(GOOD).encode()),
    fine("utf16.jsonl", line(GOOD).encode("utf-16")),
    fine("utf32.jsonl", line(GOOD).encode("utf-32")),
    fine("windows-line-ends.jsonl", line(GOOD).replace("\n", "\r\n") * 2, 2),
    fine("no-last-line-end.jsonl", line(GOOD).rstrip()),
    fine("blank-lines-between.jsonl", f"\n{line(GOOD)}\n\n{line(GOOD)}\n", 2),
    fine("line-separator-in-text.jsonl", line({"instruction": "a\u2028b\u0085c", "output": "d"})),
    fine("ten-megabytes.jsonl", line({"instruction": LONG, "output": "b"}) + line(GOOD), 2),
    fine("mixed-formats.jsonl", line(GOOD) + line(TURNS) + line({"prompt": "a", "completion": "b"}), 3),
    fine("unused-columns.jsonl", line({**GOOD, "id": 1, "score": None, "tags": [[None]]})),
    fine("list-in-jsonl.jsonl", json.dumps([GOOD, GOOD], indent=1), 2),
    fine("lines-in-json.json", line(GOOD) * 3, 3),
    fine("quoted.csv", 'instruction,output\n"a, ""b""\nc","d\n\ne"\n'),
    fine("escaped-surrogates.jsonl", '{"instruction": "\\ud83d\\ude00", "output": "b"}\n'),
]  # fmt: skip


def write(root: Path) -> list[tuple[Case, Path]]:
    """Every case in a folder of its own, so that one name can be a file here and a folder there."""
    made = []
    for number, case in enumerate(CASES):
        path = root / f"{number:03d}" / case.name
        path.parent.mkdir(parents=True)
        case.make(path)
        made.append((case, path))
    return made


if __name__ == "__main__":
    print(f"{len(write(Path(sys.argv[1])))} files in {sys.argv[1]}")
