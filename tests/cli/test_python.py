"""fitune from Python: rows in memory, silence, callbacks, history."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fitune
from fitune.commands.inspect import inspect as look
from fitune.core.config import build
from fitune.core.errors import ConfigError, DataError
from fitune.data import given
from fitune.data.cache import Cache
from support import tiny

ROWS = [{"prompt": f"{n} plus {n}?", "completion": f"{2 * n}"} for n in range(24)]


def read(value: Any, name: str = "data") -> list[Any]:
    """The rows of the one file that a value becomes."""
    cache = Cache()
    (path,) = given.sources(value, name, cache)
    assert Path(path).name == f"{name}.jsonl"
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Dataset:
    """What `datasets.Dataset` can do, as far as it matters."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def to_dict(self) -> dict[str, list[Any]]:
        return {name: [row[name] for row in self.rows] for name in self.column_names}


class Frame:
    """What a pandas.DataFrame can do: iterating gives names of columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.columns = rows, list(rows[0])

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def keys(self) -> list[str]:
        return self.columns

    def to_dict(self, orient: str = "dict") -> list[dict[str, Any]]:
        assert orient == "records"
        return self.rows


class Polars:
    """What a polars.DataFrame can do: iterating gives columns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([[row[name] for row in self.rows] for name in self.rows[0]])

    def iter_rows(self, named: bool = False) -> Iterator[dict[str, Any]]:
        assert named
        return iter(self.rows)


def as_csv(rows: list[dict[str, Any]]) -> Any:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    text.seek(0)
    return csv.DictReader(text)


def arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def pandas(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows)


def polars(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("polars").DataFrame(rows)


def datasets(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def dataset_dict(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").DatasetDict({"test": datasets(rows[:1]), "train": datasets(rows)})


KINDS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "list": list, "tuple": tuple, "iterator": iter, "generator": lambda rows: (row for row in rows),
    "columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]}, "csv": as_csv, "arrow": arrow,
    "Dataset": Dataset, "DatasetDict": lambda rows: {"test": Dataset(rows[:1]), "train": Dataset(rows)},
    "one split": lambda rows: {"all": Dataset(rows)}, "DataFrame": Frame, "polars-like": Polars, "pandas": pandas,
    "polars": polars, "datasets": datasets, "dataset_dict": dataset_dict,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_the_same_rows(kind: str) -> None:
    assert read(KINDS[kind](ROWS)) == ROWS


@pytest.mark.parametrize("kind", ["list", "Dataset", "arrow", "pandas", "datasets"])
def test_rows_with_turns(kind: str) -> None:
    assert read(KINDS[kind](tiny.rows(5))) == tiny.rows(5)


def test_values_as_json_has_them() -> None:
    row = {"a": np.int64(3), "b": np.array([1.5]), "c": math.nan, "d": None, "e": date(2026, 1, 2), "f": ("x", "y")}
    assert read([row]) == [{"a": 3, "b": [1.5], "e": "2026-01-02", "f": ["x", "y"]}]
    assert read([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])[0]["messages"][1] == {
        "role": "assistant", "content": "b",
    }  # fmt: skip


def test_paths_stay_paths_and_tables_stand_beside_them(tmp_path: Path) -> None:
    cache = Cache()
    assert given.sources("a.json", "data", cache) == ["a.json"]
    assert given.sources(["a.json", {"path": "b", "take": 3}], "data", cache) == ["a.json", {"path": "b", "take": 3}]
    mixed = given.sources([tmp_path, Dataset(ROWS), ROWS], "data", cache)
    assert mixed[0] == tmp_path
    assert mixed[1] == mixed[2]  # the same rows are the same file
    assert given.sources({"path": "x.json"}, "data", cache) == [{"path": "x.json"}]


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([*ROWS[:2], "rows.jsonl"], r"data\[2\]: not a row"),
        (["rows.jsonl", ROWS[0]], "rows and files in one list"),
        (iter([]), "no rows"),
        (3, "data: no rows"),
        ({"prompt": "a", "completion": "b"}, "data: no rows"),
        ([{"prompt": object()}], r"data\[0\]: cannot be written as JSON"),
        ({"a": Dataset(ROWS), "b": Dataset(ROWS)}, "which split"),
    ],
)
def test_what_is_no_rows_is_reported(value: Any, part: str) -> None:
    with pytest.raises(DataError, match=part):
        given.sources(value, "data", Cache())


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> dict[str, Any]:
    return {
        "model": str(model_folder), "max_steps": 4, "eval_every": 2, "save_every": 2, "batch_size": 4,
        "sample_prompts": 0, "lora": {"rank": 2},
    }  # fmt: skip


def test_rows_train_as_their_file_does_and_the_folder_is_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = fitune.train(data=str(file), output=tmp_path / "file", **settings)
    seen: list[fitune.StepRecord] = []
    done = fitune.train(
        data=iter(ROWS), eval_data=Frame(ROWS[:4]), output=tmp_path / "rows", on_step=seen.append, **settings
    )
    assert [one.step for one in seen] == [1, 2, 3, 4]
    assert tuple(seen) == done.history
    assert list(done.held_out_losses) == [2, 4]
    assert done.held_out_losses[4] == done.held_out_loss_after
    assert "history" not in done.as_dict()
    assert json.loads((tmp_path / "rows" / "result.json").read_text()) == done.as_dict()
    assert of_file.steps == 4
    same = fitune.train(data=ROWS, output=tmp_path / "same", **settings)
    assert [one.loss for one in same.history] == [one.loss for one in of_file.history]
    config = (tmp_path / "rows" / "config.yaml").read_text()
    kept = sorted((tmp_path / "rows" / "data").iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["data", "eval_data"]
    for path in kept:
        assert str(path) in config
    again = fitune.train(resume=True, output=tmp_path / "rows")
    assert again == done


def test_what_a_callback_raises_comes_through_and_the_run_goes_on(
    settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole = fitune.train(data=ROWS, output=tmp_path / "whole", **settings)
    cache: Path = request.getfixturevalue("other_cache")

    class Enough(Exception):
        pass

    def stop(record: fitune.StepRecord) -> None:
        if record.step == 3:
            raise Enough(record.step)

    with pytest.raises(Enough):
        fitune.train(data=ROWS, output=tmp_path / "run", on_step=stop, **settings)
    import shutil

    shutil.rmtree(cache)  # the run's folder needs nothing else
    done = fitune.train(resume=True, output=tmp_path / "run")
    assert [(one.step, one.loss, one.held_out_loss) for one in done.history] == [
        (one.step, one.loss, one.held_out_loss) for one in whole.history
    ]


def test_python_is_silent_unless_asked_and_asks_nothing_of_the_network(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """In a process of its own: what dependencies do while they are imported counts too. A row longer than the model
    makes transformers warn, gradient checkpointing a class of it, and loading draws a bar."""
    long = [*ROWS, {"prompt": "one " * 400, "completion": "two"}]
    code = (
        "import json, socket, sys, warnings\nasked = []\n"
        "def refuse(*arguments, **named):\n    asked.append(arguments)\n    raise OSError('no network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import fitune\ngiven = json.loads(sys.argv[1])\n"
        "fitune.plan(given['model'], method='lora', max_length=32)\n"  # imports bitsandbytes, which complains
        "try:\n    fitune.merge(given['output'] + '-none', given['output'] + '-merged')\n"
        "except fitune.FituneError as error:\n    assert 'no such folder' in str(error), error\n"
        "else:\n    raise AssertionError\n"
        "run = fitune.train(**given)\n"
        "fitune.generate(run.run, 'one', max_new_tokens=3)\n"
        "fitune.evaluate(run.run, given['data'][:3], max_new_tokens=3)\n"
        "fitune.merge(run.run, given['output'] + '-merged')\n"
        "assert asked == []\n"
        "sys.stdout.flush()\nsys.stderr.flush()\n"
        "open(given['output'] + '.ok', 'w').write(repr(len(warnings.filters)))\n"
        "from transformers.utils import logging\n"
        "assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING\n"
        "warnings.warn('mine')\n"
        "fitune.train(**{**given, 'output': given['output'] + '-2', 'verbose': True})\n"
        "import atexit\nfrom fitune.cli import main as cli\nfrom fitune.core import quiet\n"
        "atexit.register(quiet.at_the_end)\nsys.stderr = sys.stdout\n"  # as __main__ does; and a command may report
        "sys.argv = ['fitune', 'chat', run.run, '--max-tokens', '3']\n"
        "try:\n    cli.main()\nexcept SystemExit as done:\n    assert not done.code\n"
        "assert asked == []\n"
    )
    values = {**settings, "data": long, "output": str(tmp_path / "run"), "checkpointing": True}
    import os

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(values)], input="one\n", capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    silent, _, asked = done.stdout.partition("model  ")
    assert silent == ""
    assert "step 4/4" in asked
    before, _, after = done.stderr.partition("UserWarning: mine")
    assert before.count("\n") == 0, before  # nothing but the place of that warning
    assert after.strip() == "warnings.warn('mine')" or after.strip() == ""


def test_wrong_paths_are_reported_before_torch_in_python() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nimport fitune\n"
        "for call in (lambda: fitune.train(model='no/x/y', data='n.json'), lambda: fitune.load('no/x/y'),\n"
        "             lambda: fitune.generate('no/x/y', 'hi'), lambda: fitune.evaluate('no/x/y', ['n.json']),\n"
        "             lambda: fitune.plan('no/x/y', data=['n.json']),\n"
        "             lambda: fitune.advise('no/x/y', data=['n.json']),\n"
        "             lambda: fitune.inspect(['n.json'], model='no/x/y')):\n"
        "    try:\n        call()\n    except fitune.FituneError as error:\n        assert 'nearest' in str(error)\n"
        "    else:\n        raise AssertionError\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_of_others_are_keywords_too(settings: dict[str, Any], tmp_path: Path) -> None:
    run = fitune.train(
        model_name_or_path=settings["model"], train_dataset=Dataset(ROWS), output_dir=tmp_path / "run", max_steps=1,
        per_device_train_batch_size=2, learning_rate=1e-3, lora_r=2, sample_prompts=0,
    )  # fmt: skip
    assert run.history[0].lr == pytest.approx(1e-3, rel=0.5)
    assert run.run == str(tmp_path / "run")


@pytest.mark.full  # the command line's is in the quick run
def test_python_advises_and_trains_with_what_fits(settings: dict[str, Any], tmp_path: Path) -> None:
    asked = {"model": settings["model"], "data": ROWS, "method": "lora", "max_length": 64}
    asked |= {"quant": "none", "checkpointing": True}  # fewer ways to look through
    found = fitune.advise(**asked)
    best = found.suggestions[0]
    assert best.plan.fits
    assert f"--data {found.command.split('--data ')[1].split()[0]}" in found.command
    assert ".jsonl" in found.command
    done = fitune.train(**asked, fit=True, max_steps=1, sample_prompts=0, output=tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    defaults = {"batch_size": 8, "accumulation": 1, "method": "lora"}
    assert {name: config[name] for name in defaults} == {n: best.settings.get(n, d) for n, d in defaults.items()}
    assert done.steps == 1
    with pytest.raises(ConfigError, match="fit with resume"):
        fitune.train(resume=True, fit=True, output=tmp_path / "run")
    with pytest.raises(ConfigError, match="with which data"):
        fitune.advise(settings["model"])


def test_python_inspects_what_the_command_line_does(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    seen = fitune.inspect(ROWS, model=settings["model"], samples=1, compare=[settings["model"]], train_on="last")
    of_file = look(build({"model": settings["model"], "data": [str(file)], "train_on": "last"}), samples=1)
    assert isinstance(seen, fitune.Inspection)
    assert (seen.rows, seen.lengths, seen.label_share) == (of_file.rows, of_file.lengths, of_file.label_share)
    assert len(seen.samples) == 1
    assert len(seen.tokenizers) == 2
