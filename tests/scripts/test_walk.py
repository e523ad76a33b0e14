"""The way of one row in ARCHITECTURE.md is the one that it takes."""

from __future__ import annotations

import importlib
import io
import re
import sys
from itertools import groupby
from pathlib import Path
from types import FrameType

import pytest

from support import command, tiny

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fitune"
TITLE = "## The way of one row, from JSONL to chat"


def walk(text: str) -> list[str]:
    """The functions of the walk, `room.module:function` each, in order."""
    section = text.split(TITLE)[1].split("\n## ")[0]
    return re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*:[A-Za-z_.]+)`", section)


def faults(functions: list[str]) -> list[str]:
    """What is wrong with a walk: functions that do not exist or stand there twice, rooms that are entered twice."""
    found = [f"{name} stands there twice" for name in sorted(set(functions)) if functions.count(name) > 1]
    rooms = [room for room, _ in groupby(name.partition(".")[0] for name in functions)]
    found += [f"{room} is entered twice" for room in sorted(set(rooms)) if rooms.count(room) > 1]
    for name in functions:
        module, _, path = name.partition(":")
        try:
            place: object = importlib.import_module(f"fitune.{module}")
            for part in path.split("."):
                place = getattr(place, part)
        except (ImportError, AttributeError):
            found.append(f"{name} does not exist")
    return found


def out_of_order(functions: list[str], calls: list[str]) -> str | None:
    """The first function that is not called after those before it; None: all are."""
    after = iter(calls)
    return next((name for name in functions if name not in after), None)


@pytest.fixture(scope="module")
def functions() -> list[str]:
    return walk((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def test_each_function_of_the_walk_exists_once_and_each_room_is_entered_once(functions: list[str]) -> None:
    assert not faults(functions)
    rooms = {name.partition(".")[0] for name in functions}
    assert rooms == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}


def test_faults_of_a_walk_are_found() -> None:
    assert faults(["cli.train:train", "cli.train:train"]) == ["cli.train:train stands there twice"]
    assert faults(["cli.train:train", "data.rows:load", "cli.use:chat"]) == ["cli is entered twice"]
    assert faults(["cli.train:tarin", "engine.step_runner:StepRunner.leap", "data.row:load"]) == [
        "cli.train:tarin does not exist",
        "engine.step_runner:StepRunner.leap does not exist",
        "data.row:load does not exist",
    ]
    assert out_of_order(["a", "b"], ["b", "a", "c"]) == "b"
    assert out_of_order(["a", "b"], ["b", "a", "b"]) is None


def test_a_row_takes_that_way(
    functions: list[str],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, data, calls = tmp_path / "run", tiny.write_rows(tmp_path / "rows.jsonl", 8), list[str]()
    named, names = set(functions), dict[object, str]()

    def called(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        if code not in names:
            module = Path(code.co_filename).relative_to(PACKAGE).with_suffix("").parts
            names[code] = f"{'.'.join(module).removesuffix('.__init__')}:{code.co_qualname}"
        if names[code] in named:
            calls.append(names[code])

    settings = ("--method", "lora", "--max-steps", "2", "--cache", "none")
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is 1 plus 1?\n"))
    before = sys.getprofile()
    sys.setprofile(called)
    try:
        trained = command.run(
            ["train", "--model", model_folder, "--data", data, "--output", run, *settings], capsys, monkeypatch
        )
        talked = command.run(["chat", run, "--max-tokens", "4"], capsys, monkeypatch)
    finally:
        sys.setprofile(before)
    assert (trained[0], talked[0]) == (0, 0), trained[2] + talked[2]
    assert set(calls) == named
    assert out_of_order(functions, calls) is None
