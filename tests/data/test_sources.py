"""Several sources: what is drawn of each, how often it is trained, and that the same files give the same run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import prepare as preparing
from fitune.commands.prepare import prepare
from fitune.commands.request import to_train
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError, DataError, Problems
from fitune.core.events import Silent
from fitune.core.options import DataSource
from fitune.core.records import Conversation
from fitune.data.rows import load, weigh
from fitune.data.store import Rows, documents_of
from support import tiny


def rows(path: Path, count: int, name: str = "") -> str:
    lines = [json.dumps({"prompt": f"{name}{n}", "completion": "x"}) + "\n" for n in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def prompts(conversations: Iterable[Conversation]) -> list[str]:
    return [row.messages[0].content for row in conversations]


def drawn(path: str, seed: int, **how: Any) -> list[str]:
    return prompts(load([DataSource(path=path, **how)], seed=seed).rows)


def test_take_draws_with_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 100)
    first = drawn(path, 1, take=10)
    assert first == drawn(path, 1, take=10)
    assert first != drawn(path, 2, take=10)
    assert len(set(first)) == 10
    assert first == sorted(first, key=int)
    report = load([DataSource(path=path, take=10)]).report
    assert (report.rows, report.formats, report.files[path]) == (10, {"prompt/completion": 10}, 100)


def test_every_row_is_as_likely_to_be_taken(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 10)
    counts = Counter(row for seed in range(200) for row in drawn(path, seed, take=3))
    assert len(counts) == 10
    assert all(32 < count < 88 for count in counts.values())  # 60 expected, standard deviation 6.5


def test_take_of_more_than_there_is_takes_all_and_says_so(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 3)
    found = load([DataSource(path=path, take=5)])
    assert len(found.rows) == 3
    assert found.report.notes == [f"{path}: take 5, but it has 3 rows: all are taken"]


def test_rows_that_are_not_taken_are_checked_too(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 50)
    with Path(path).open("a") as file:
        file.write('{"prompt": "bad"}\n')
    with pytest.raises(DataError, match=":51:completion: missing"):
        drawn(path, 0, take=1)


@pytest.mark.parametrize(("weight", "expected"), [(2.0, 20), (0.5, 5), (2.5, 25), (0.01, 1), (1.26, 13)])
def test_weight_is_rows_times_weight(tmp_path: Path, weight: float, expected: int) -> None:
    a, b = rows(tmp_path / "a.jsonl", 10, "a"), rows(tmp_path / "b.jsonl", 7, "b")
    sources = [DataSource(path=a, weight=weight), DataSource(path=b)]
    conversations = load(sources).rows
    assert len(conversations) == 17

    def mix(seed: int) -> Rows:
        return conversations.view(weigh(conversations.column("source"), sources, seed)[0])

    mixed = mix(3)
    counts = Counter(prompts(mixed))
    assert len(mixed) == expected + 7
    assert all(counts[f"b{n}"] == 1 for n in range(7))
    assert {counts[f"a{n}"] for n in range(10)} <= {int(weight), int(weight) + 1}
    note = weigh(conversations.column("source"), sources, 3)[1]
    assert note == f"weights: 17 rows to train on become {expected + 7}"
    assert prompts(mix(3)) == prompts(mixed)
    if weight % 1:
        assert any(prompts(mix(seed)) != prompts(mixed) for seed in range(9))


def test_without_weights_nothing_changes(tmp_path: Path) -> None:
    source = DataSource(path=rows(tmp_path / "a.jsonl", 5))
    drawn, note = weigh(load([source]).rows.column("source"), [source], 1)
    assert drawn.tolist() == [0, 1, 2, 3, 4]
    assert not note


def test_each_source_has_its_own_format_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,prompt,completion\nq1,a1,p1,c1\n")
    path = str(tmp_path / "a.csv")
    sources: list[str | DataSource] = [
        DataSource(path=path, map={"q": "prompt", "a": "completion"}),
        path,
        DataSource(path=path, format="text", map={"a": "text"}),
    ]
    assert [(row.messages[0].content, row.answer()) for row in load(sources).rows] == [
        ("q1", "a1"), ("p1", "c1"), ("a1", "a1"),
    ]  # fmt: skip


def test_what_stands_in_a_source_wins_over_what_is_set_for_all() -> None:
    own = {"path": "b", "take": 5, "weight": 2, "format": "alpaca", "map": {"x": "output"}}
    config = build(
        {"model": "m", "data": ["a", own, "c"], "eval_data": ["e", {"path": "f", "format": "text"}],
         "take": [1, 2, 3], "weight": 0.5, "format": "messages", "map": {"x": "messages", "y": "tools"}}
    )  # fmt: skip
    found = [(s.path, s.take, s.weight, s.format, s.map) for s in config.sources()]
    assert found == [
        ("a", 1, 0.5, "messages", {"x": "messages", "y": "tools"}),
        ("b", 5, 2.0, "alpaca", {"x": "output", "y": "tools"}),
        ("c", 3, 0.5, "messages", {"x": "messages", "y": "tools"}),
    ]
    assert [(s.path, s.take, s.format) for s in config.eval_sources()] == [("e", None, "messages"), ("f", None, "text")]
    assert build(config.model_dump(mode="json")) == config
    assert build({"model": "m", "data": ["a", "b"], "take": 7}).sources()[1].take == 7


def test_plain_paths_stay_plain_strings() -> None:
    config = build({"model": "m", "data": ["a.json", "E:\\d\\a.json"]})
    assert config.data == ["a.json", "E:\\d\\a.json"]
    assert config.sources()[1] == DataSource(path="E:\\d\\a.json", weight=1.0, format="auto")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"data": [{"path": "a", "tkae": 5}]}, ["unknown setting 'data[0].tkae'", "did you mean 'take'?"]),
        ({"data": ["a", {"take": 5}]}, ["data[1].path is missing"]),
        ({"data": [{"path": "a", "take": 0}]}, ["data[0].take: wrong value", "received: 0", "greater than or"]),
        ({"data": [{"path": "a", "weight": -1}]}, ["data[0].weight: wrong value", "received: -1", "greater than 0"]),
        ({"data": [5]}, ["data[0]: wrong value", "received: 5", "expected: a valid string"]),
        ({"data": []}, ["data: wrong value"]),
        ({"data": ["a", "b", "c"], "take": [1, 2]}, ["take: wrong value", "received: [1, 2]", "each of the 3 sources"]),
        ({"data": ["a"], "weight": 0}, ["weight[0]: wrong value", "greater than 0"]),
        ({"data": ["a"], "map": {"a": 5}}, ["map: wrong value", "received: 5"]),
    ],
)  # fmt: skip
def test_a_wrong_source_says_which(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": "m", **values})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["E:\\d\\a.json", "行 1.jsonl", "a=b:c,d.jsonl", "..hidden.json"])
def test_any_name_is_just_a_path(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_rows(tmp_path / name, 4)
    monkeypatch.chdir(tmp_path)
    config = to_train(build({"model": str(model_folder), "data": [name, {"path": name, "take": 2}]})).config
    assert config.data == [str(tmp_path / name), DataSource(path=str(tmp_path / name), take=2)]
    assert len(load(config.sources()).rows) == 6


def job(config: dict[str, Any], model_folder: Path, folder: Path) -> preparing.Job:
    settings = {"model": str(model_folder), "output": str(folder / "out"), "batch_size": 2, **config}
    return prepare(to_train(build(settings)), Silent())


def test_every_file_that_is_read_is_fingerprinted(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl", "readme.txt"):
        tiny.write_rows(folder / name, 4)
    made = job({"data": [str(data_file), {"path": str(folder), "weight": 2}]}, model_folder, tmp_path)
    assert list(made.data_sha256) == [str(data_file), str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    assert made.report.rows == made.report.kept + made.report.held_out
    assert made.report.notes[-1].startswith("weights: 23 rows to train on become ")


def test_no_copy_of_a_held_out_row_is_trained(model_folder: Path, tmp_path: Path) -> None:
    path = str(tiny.write_rows(tmp_path / "a.jsonl", 20))
    made = job({"data": [{"path": path, "weight": 3}], "val_share": 0.2}, model_folder, tmp_path)
    held_out = {str(sample.source) for sample in made.held_out}
    trained = [str(sample.source) for sample in made.loader.samples]
    assert len(held_out) == 4
    assert len(trained) == 48
    assert not held_out & set(trained)


def test_plain_text_takes_the_plain_template(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"two plus three is {n}"}) + "\n" for n in range(20)))
    made = job({"data": [str(path)]}, model_folder, tmp_path)
    assert made.tuned.template.name == "plain"
    assert made.held_out
    assert made.held_out_rows == []
    assert made.report.formats == {"text": 20}
    chat = job({"data": [str(tiny.write_rows(tmp_path / "b.jsonl", 9))]}, model_folder, tmp_path)
    assert chat.tuned.template.name == "chat_template"


def test_cheap_mistakes_in_sources_are_reported_together(model_folder: Path, data_file: Path) -> None:
    values = {"model": str(model_folder), "data": [str(data_file), "no.csv", {"path": "no-org/no-data"}],
              "eval_data": [{"path": str(data_file), "format": "alpacca"}], "map": {"a": "promt"}}  # fmt: skip
    with pytest.raises(Problems) as caught:
        to_train(build(values))
    for part in ("no.csv: no such file", "no-org/no-data: no such file or folder, and the hub does not give it",
                 "unknown format 'alpacca'", "unknown field 'promt'"):  # fmt: skip
        assert part in str(caught.value)


def _ids(made: preparing.Job) -> list[list[int]]:
    return [sample.ids.tolist() for sample in documents_of(made.loader.samples)]


def test_the_same_sources_and_seed_give_the_same_samples(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    config = {"data": [str(data_file), {"path": str(data_file), "take": 9, "weight": 1.5}]}
    first, second = (job(config, model_folder, tmp_path) for _ in range(2))
    assert _ids(first) == _ids(second)
    other = job({**config, "seed": 7}, model_folder, tmp_path)
    assert [str(s.source) for s in first.loader.samples] != [str(s.source) for s in other.loader.samples]


def test_the_sources_are_part_of_what_a_run_stores() -> None:
    config = RunConfig(model="m", data=["a", DataSource(path="b", take=3)])
    assert config.model_dump(mode="json")["data"] == [
        "a", {"path": "b", "take": 3, "weight": None, "format": None, "map": {}},
    ]  # fmt: skip


def test_bad_held_out_rows_are_listed_too(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", 4)
    with held_out.open("a") as file:
        file.write('{"prompt": "a"}\n')
    config = {"data": [str(data_file)], "eval_data": [str(held_out)], "skip_bad": True}
    report = job(config, model_folder, tmp_path).report
    assert (report.rows, report.skipped_bad) == (tiny.DATA_ROWS, 1)
    assert report.skipped == [f"{held_out}:5:completion: missing (a row of prompt/completion)"]


def test_a_link_is_known_by_its_own_name(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0123abc").write_text("prompt,completion\na,b\n")
    try:
        (tmp_path / "a.csv").symlink_to(tmp_path / "0123abc")
    except OSError:
        pytest.skip("no links here")
    assert to_train(build({"model": str(model_folder), "data": [str(tmp_path / "a.csv")]})).config.data == [
        str(tmp_path / "a.csv")
    ]
