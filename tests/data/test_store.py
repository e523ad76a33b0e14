"""Rows and samples on disk, the cache that keeps them, and what happens when several runs want it at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from fitune.checks import datachecks
from fitune.core.config import build
from fitune.core.files import TEMPORARY, is_whole, seal
from fitune.core.records import Conversation, Finding, Message, Sample, Source, ToolCall
from fitune.data import cache as cache_module
from fitune.data import fitting, pipeline, rows, store, tokenizer
from fitune.data.cache import Cache, code_version, default_folder, key
from fitune.data.encode import Encoder
from fitune.data.store import Samples, blocks, lengths_of, write_samples
from fitune.data.templates import TABLE, PieceTemplate, choose
from support import tiny
from support.encoding import sample_of

TALK = (
    Message("system", "简短"),
    Message("user", "1 + 1?", context="in words"),
    Message("assistant", "", tool_calls=(ToolCall("add", '{"a": 1}'),)),
    Message("tool", "2"),
    Message("assistant", "two\u2028lines", thought="想", weight=0.25),
)


def some_rows(count: int = 9) -> list[Conversation]:
    """Rows of all shapes: conversations, tools, plain text, none of the same length."""
    made = [Conversation(TALK, Source("a.jsonl", 1), "messages", ({"type": "function", "function": {"name": "add"}},))]
    for n in range(1, count):
        turns = [Message("user", f"question {n} " * n), Message("assistant", f"答 {n} " * (count - n))]
        made.append(Conversation(tuple(turns), Source("b.jsonl", 2 * n), "alpaca" if n % 2 else "prompt/completion"))
    return [*made, Conversation((Message("assistant", "plain"),), Source("c.txt", 7), "text")]


# ---- rows and samples on disk ----


def test_rows_come_back_as_they_were() -> None:
    given = some_rows()
    there = tiny.as_rows(given)
    assert list(there) == given
    assert [there[n] for n in range(len(there))] == given
    assert there[2:8:3] == given[2:8:3]
    assert [there.source(n) for n in range(len(there))] == [row.source for row in given]
    assert there.formats() == {"messages": 1, "alpaca": 4, "prompt/completion": 4, "text": 1}
    again = there.view(np.array([3, 3, 0])).view(np.array([2, 1]))
    assert list(again) == [given[0], given[3]]
    assert list(again.base()) == given


@pytest.mark.parametrize("shard_tokens", [1, 40, 1 << 20])
def test_samples_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_tokens: int) -> None:
    monkeypatch.setattr(store, "SHARD_TOKENS", shard_tokens)
    random = np.random.default_rng(0)
    there = tiny.as_rows(some_rows())
    made: list[list[Sample]] = []
    for n in range(len(there)):
        samples = []
        for _ in range(n % 3):
            ids = random.integers(0, 1 << 20, random.integers(1, 60)).astype(np.int32)
            mask = random.random(len(ids)) < 0.5
            facts = random.integers(0, 99, 4).tolist()
            samples.append(Sample(ids, mask, there[n].source, facts[0], facts[1], bool(n % 2), facts[2], facts[3]))
        made.append(samples)
    write_samples(tmp_path, made)
    found = Samples(tmp_path, there)
    expected = [sample for samples in made for sample in samples]
    for got in (list(found), [found[n] for n in range(len(found))], found[:]):
        assert [same(a, b) for a, b in zip(got, expected, strict=True)] == [True] * len(expected)
    assert same(found.view(np.array([4, 1]))[1], expected[1])
    assert found.column("row").tolist() == [n for n, samples in enumerate(made) for _ in samples]
    assert lengths_of(found).tolist() == [len(sample) for sample in expected]
    ids = np.concatenate([block.ids for block in blocks(found)])
    assert np.array_equal(ids, np.concatenate([sample.ids for sample in expected]))
    swapped = found.without(np.array([4])).joined(
        found.view(np.flatnonzero(found.column("row") == 1)), np.arange(9) + 3
    )
    assert swapped.column("row").tolist() == [1, 2, 2, 4, 5, 5, 7, 8, 8]


def same(a: Sample, b: Sample) -> bool:
    facts = [(s.source, s.cut_prompt, s.cut_answer, s.ends_whole, s.prompt_length, s.needed) for s in (a, b)]
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.mask, b.mask) and facts[0] == facts[1]


def _unthinking(row: Conversation) -> Conversation:
    """Without thoughts, for which this vocabulary has no tags."""
    return replace(row, messages=tuple(replace(message, thought="") for message in row.messages))


@pytest.mark.parametrize("name", ["chat_template", "qwen", "alpaca", "plain"])
@pytest.mark.parametrize("limit", [None, 30])
def test_rows_encoded_together_are_the_rows_encoded_one_by_one(
    tokenizer: PreTrainedTokenizerFast, name: str, limit: int | None
) -> None:
    given = [_unthinking(row) for row in some_rows() if name == "qwen" or not row.tools]
    encoder = Encoder(tokenizer, choose(name, tokenizer), limit)
    together = encoder.samples_of(given)
    for row, made in zip(given, together, strict=True):
        alone = encoder.sample(row)
        assert [same(a, b) for a, b in zip(made, [] if alone is None else [alone], strict=True)] in ([], [True])


@pytest.mark.shared
@pytest.mark.parametrize(
    ("words", "template"), [("llama2", "llama2"), ("llama2", "alpaca"), ("qwen2", "auto"), ("chatglm1", "auto"),
                            ("chatglm2", "auto"), ("gpt2", "plain")],
)  # fmt: skip
def test_real_tokenizers_give_the_same_ids_together(shared: Path, words: str, template: str) -> None:
    loaded = tokenizer.load(shared / "tokenizers" / words)
    encoder = Encoder(loaded, choose(template, loaded))
    given = rows.load([str(shared / "data" / "alpaca_zh_demo.json")]).rows[:60]
    for row, made in zip(given, encoder.samples_of(given), strict=True):
        assert same(made[-1], sample_of(encoder, row))


# ---- the cache ----


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", 30)


def prepare(model: Path, data: Path, cache: Path | str, **changes: Any) -> tuple[pipeline.Data, Finding]:
    config = build({"model": str(model), "data": [str(data)], "cache": str(cache), **changes})
    found = datachecks.read(config, model, tokenizer.load(model), limit=256, vocabulary=400)
    return found, next(finding for finding in found.findings if finding.rule == "stale-cache")


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def ids(found: pipeline.Data) -> list[list[int]]:
    return [sample.ids.tolist() for sample in found.samples]


def test_the_second_run_finds_what_the_first_one_made(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, finding = prepare(model_folder, data, cache)
    assert finding.text == "the data was read and encoded anew"
    before = names(cache)
    second, finding = prepare(model_folder, data, cache)
    assert finding.level == "ok"
    assert finding.text.startswith("from the cache; 30 of its rows encoded again")
    assert ids(first) == ids(second)
    assert first.report.as_dict() == second.report.as_dict()
    assert names(cache) == before
    assert all(is_whole(cache / name) for name in before)
    other, _ = prepare(model_folder, data, "none")
    assert ids(other) == ids(first)


def test_whatever_decides_the_content_makes_another_entry(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare(model_folder, data, cache)
    seen = set(names(cache))
    other = tmp_path / "model"
    tiny.save("llama", other)
    (other / "special_tokens_map.json").write_text("{}")
    changes: list[dict[str, Any]] = [
        {"template": "alpaca"}, {"train_on": "last"}, {"fill": {"name": "Ada"}}, {"format": "messages"}, {"take": 7},
        {"max_length": 20, "max_lost": 1.0},
    ]  # fmt: skip
    for change in changes:
        prepare(model_folder, data, cache, **change)
        assert set(names(cache)) > seen, change
        seen = set(names(cache))
    prepare(other, data, cache)
    assert set(names(cache)) > seen
    seen = set(names(cache))
    data.write_text(data.read_text(encoding="utf-8") + json.dumps(tiny.rows(1)[0]) + "\n", encoding="utf-8")
    found, finding = prepare(model_folder, data, cache)
    assert set(names(cache)) > seen
    assert finding.text == "the data was read and encoded anew"
    assert found.report.rows == 31


@pytest.mark.parametrize("changed", ["data/templates/base.py", "data/encode.py", "core/records.py", "data/new.py"])
def test_the_code_is_part_of_the_key(changed: str, tmp_path: Path) -> None:
    """Every file that prepares data counts, in folders too; so does one that comes new."""
    for room in ("data", "core"):
        shutil.copytree(Path(cache_module.__file__).parents[1] / room, tmp_path / room)
    before = code_version(tmp_path / "data")
    assert before == code_version(tmp_path / "data") == code_version()
    with (tmp_path / changed).open("a") as file:
        file.write("# changed")
    assert code_version(tmp_path / "data") != before


def replant(cache: Path, kind: str, change: Callable[[Path], object]) -> None:
    """Change an entry and seal it again, as if another version had written it under the same key."""
    (folder,) = (path for path in cache.iterdir() if path.name.startswith(kind))
    change(folder)
    (folder / "MANIFEST.json").unlink()
    seal(folder)


def test_stale_tokens_are_found_and_made_anew(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good = ids(prepare(model_folder, data, cache)[0])  # before its files are changed
    old = names(cache)

    def change(folder: Path) -> None:
        file = next(folder.glob("samples-*"))
        tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
        tensors["ids"][-1] += 1
        save_file(tensors, file)

    replant(cache, "samples", change)
    found, finding = prepare(model_folder, data, cache)
    assert finding.level == "fixed"
    assert "the cached tokens of" in finding.text
    assert ids(found) == good
    assert [found.samples[n].ids.tolist() for n in range(len(found.samples))] == good  # one by one, as batches do
    assert prepare(model_folder, data, cache)[1].level == "ok"
    assert set(names(cache)) > set(old)  # what another run may be reading stays where it was


def test_stale_rows_are_found_and_made_anew(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good, _ = prepare(model_folder, data, cache)

    def change(folder: Path) -> None:
        file = folder / "rows.jsonl"
        file.write_text(file.read_text(encoding="utf-8").replace("what is 1 plus", "what is 9 plus"), encoding="utf-8")

    replant(cache, "rows", change)
    found, finding = prepare(model_folder, data, cache)
    assert finding.level == "fixed"
    assert "is not what the file holds now" in finding.text
    assert ids(found) == ids(good)


def test_a_damaged_entry_is_made_anew(model_folder: Path, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good, _ = prepare(model_folder, data, cache)
    for path in cache.glob("*/*.safetensors"):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(bytes(raw))
    found, finding = prepare(model_folder, data, cache)
    assert finding.text.startswith("the data was read and encoded anew") or finding.level == "ok"
    assert ids(found) == ids(good)
    assert sum(is_whole(path) for path in cache.iterdir()) == 2


def test_rows_that_were_skipped_are_reported_to_the_next_run_that_wants_none(
    model_folder: Path, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "a"}\n')
    first, _ = prepare(model_folder, data, tmp_path / "cache", skip_bad=True)
    second, _ = prepare(model_folder, data, tmp_path / "cache", skip_bad=True)
    assert first.report.skipped_bad == second.report.skipped_bad == 1
    assert first.report.skipped == second.report.skipped
    with pytest.raises(Exception, match=":31:completion: missing"):
        prepare(model_folder, data, tmp_path / "cache")


def test_data_that_changes_while_it_is_read_is_not_kept(data: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")

    def change(done: int) -> None:
        if done == 3:
            data.write_text(data.read_text(encoding="utf-8") + "\n", encoding="utf-8")

    with pytest.raises(Exception, match="changed while it was read"):
        rows.load([str(data)], cache=cache, on_row=change)
    assert names(cache.folder) == []


def test_old_entries_go_and_leftovers_too(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name, days in (("rows-old", 31), ("rows-new", 29), (f"{TEMPORARY}dead", 2), (f"{TEMPORARY}live", 0), ("x", 99)):
        (tmp_path / name).mkdir()
        at = time.time() - days * 86400
        os.utime(tmp_path / name, (at, at))
    cache.entry("rows", key("a"), lambda folder: None)
    assert names(tmp_path) == sorted([f"{TEMPORARY}live", f"rows-{key('a')}-1", "rows-new", "x"])


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("FITUNE_CACHE")
    if sys.platform != "linux":
        return
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fitune" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "fitune" / "data"


# ---- real processes ----


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without a model, so that a process which reads data with it does not load torch."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(str(folder))
    return folder


PREPARE = """
import sys
from pathlib import Path
from fitune.checks import datachecks
from fitune.data import tokenizer
from fitune.core.config import build
folder, data, cache = sys.argv[1:]
config = build({"model": folder, "data": [data], "cache": cache})
found = datachecks.read(config, Path(folder), tokenizer.load(folder), limit=256, vocabulary=400)
print(len(found.samples), int(found.samples.column("length").sum()))
"""


def start(folder: Path, data: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(folder), str(data), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_runs_at_once_make_one_entry(tokenizer_folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "many.jsonl", 1000)
    both = [start(tokenizer_folder, data, tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(names(tmp_path / "cache")) == 2
    assert all(is_whole(path) for path in (tmp_path / "cache").iterdir())


# by itself, at the second file that it opens in a folder which is not whole yet
KILLED = f"""
import os, signal, sys
seen = []
def kill(name, arguments):
    if name == "open" and "{TEMPORARY}" in str(arguments[0]):
        seen.append(arguments[0])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_preparation_does_no_harm(tokenizer_folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "many.jsonl", 1000)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED + PREPARE, str(tokenizer_folder), str(data), str(cache)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert [name for name in names(cache) if name.startswith(TEMPORARY)]
    again = start(tokenizer_folder, data, cache)
    shown, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors
    assert shown.startswith("950 ")


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_reported_and_leaves_nothing(tokenizer_folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "many.jsonl", 300)
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n" + PREPARE
    command = [sys.executable, "-c", code, str(tokenizer_folder), str(data), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the disk is full" in done.stderr
    assert "--cache" in done.stderr
    assert names(tmp_path / "cache") == []


def test_what_is_held_grows_by_a_few_bytes_a_row(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns of rows and samples, not their texts and ids: 20 numbers of 8 bytes, twice while they are written."""
    monkeypatch.setattr(store, "SHARD_TOKENS", 2_500)  # what is held however many rows there are is small
    monkeypatch.setattr(store, "BLOCK", 64)
    monkeypatch.setattr(fitting, "CHUNK", 64)
    words = tokenizer.load(model_folder)

    def peak(count: int) -> int:
        data = tiny.write_rows(tmp_path / f"{count}.jsonl", count)
        values = {"model": str(model_folder), "data": [str(data)], "cache": "none", "max_length": 24, "max_lost": 1.0}
        config = build(values)  # with rows that are cut: they lie in another folder than the rest
        tracemalloc.start()
        datachecks.read(config, model_folder, words, limit=256, vocabulary=400)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(70)
    assert (peak(370) - peak(130)) / 240 < 400


def test_templates_that_want_a_sample_per_answer_keep_their_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """The rows of samples stay right where rows have none, one or several, and some are cut."""
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d " * 40))
    given = [Conversation(turns, Source("f", n)) for n in range(3)]
    values = {name: value for name, value in TABLE["chatml"].as_dict().items() if name != "kind"}
    template = type("PerAnswer", (PieceTemplate,), {"one_answer_per_sample": lambda *_: True})(**values)
    samples, of = tiny.encoded(given, Encoder(tokenizer, template, 60))
    assert of.tolist() == [0, 0, 1, 1, 2, 2]
    assert [sample.ends_whole for sample in samples] == [True, False] * 3
    assert [str(sample.source) for sample in samples] == ["f:0", "f:0", "f:1", "f:1", "f:2", "f:2"]
