"""inspect: what is counted is what is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fitune.cli import main as cli
from fitune.commands.inspect import Texts, duplicates, histogram, inspect, language, padding_wasted, page
from fitune.core.config import build
from fitune.core.records import Conversation, Message, Source
from fitune.data.encode import Encoder
from fitune.data.templates import choose
from fitune.views.tokens import token_views, tokenizer_view
from support import tiny
from support.encoding import sample_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好，世界", "zh"),
        ("Hello, world", "en"),
        ("你好 world", "mixed"),
        ("用 Python 写一个函数，计算两个数的和", "zh"),
        ("こんにちは", "ja"),
        ("안녕하세요", "ko"),
        ("123", "other"),
    ],
)
def test_languages(text: str, expected: str) -> None:
    assert language(text) == expected


def test_padding_and_histogram_by_hand() -> None:
    assert padding_wasted([10, 10, 10, 10], 2) == 0
    assert padding_wasted([1, 3], 2) == pytest.approx(1 / 3)
    bins = histogram([5, 6, 20, 100])
    assert sum(count for _, _, count in bins) == 4
    assert bins[0] == (0, 7, 2)


def test_duplicates_are_found_whole_and_by_prompt() -> None:
    seen = Texts()
    for question, answer in (("a", "b"), ("a", "b"), ("a", "c"), ("d", "e")):
        seen.add(Conversation((Message("user", question), Message("assistant", answer))))
    found = duplicates(seen.whole, seen.prompts, lambda number: Source("f", number + 1))
    assert found == {"rows": 1, "prompts": 2, "examples": [["f:1", "f:2"]]}


def test_tokens_show_every_character_once_and_the_border(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Conversation((Message("user", "你好 😀"), Message("assistant", "很好 ok")))
    sample = sample_of(Encoder(tokenizer, choose("auto", tokenizer)), row)
    views = token_views(tokenizer, sample)
    assert "".join(view.text for view in views) == "<|user|>你好 😀<|assistant|>很好 ok<|end|>"
    assert [i for view in views for i in view.ids] == sample.ids.tolist()
    assert next(view.text for view in views if view.trained).startswith("很")
    assert sum(view.border for view in views) == 1
    assert any(len(view.ids) > 1 for view in views)  # 😀 needs several tokens of this vocabulary


def test_the_tokenizer_view_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    view = tokenizer_view("tiny", tokenizer, ["北国的首都是米拉", "Hello, world!"])
    assert view.kind == "byte-level BPE"
    assert view.characters == 21
    assert view.tokens == sum(len(tokenizer(t)["input_ids"]) for t in ("北国的首都是米拉", "Hello, world!"))
    assert view.unknown_tokens == 0
    assert view.several_tokens


def test_inspect_counts_bad_rows_and_works_with_a_tokenizer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "words"
    tiny.make_tokenizer().save_pretrained(str(folder))
    lines = [json.dumps(row, ensure_ascii=False) for row in tiny.rows(30)]
    lines += [lines[0], '{"prompt": "a", "completion": ""}', "{broken"]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    seen = inspect(build({"model": str(folder), "data": [str(data)]}), samples=2)
    assert seen.rows == {
        "read": 33, "kept": 31, "dropped": 0, "bad": 2, "prompts cut": 0, "answers cut": 0, "duplicates": 1,
        "empty answers": 1,
    }  # fmt: skip
    assert seen.by_source == {"rows.jsonl": 31}
    reasons = [(reason.partition(" (")[0], count, first) for reason, count, first in seen.bad]
    assert reasons == [("the answer is empty", 1, f"{data}:32:completion"), ("not JSON", 1, f"{data}:33")]
    assert len(seen.samples) == 2
    html = page(seen)
    assert "<svg" in html
    assert "等于" in html
    assert ">the answer is empty</td>" in html
    assert "http" not in html

    target = tmp_path / "page.html"
    arguments = ["inspect", data, "--model", folder, "--json", "--html", target, "--ids", "--compare", folder]
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"]["bad"] == 2
    assert "▶" in err
    assert "bad rows, left out" in err
    assert "the answer is empty" in err
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "nothing of yours is overwritten" in capsys.readouterr().err
