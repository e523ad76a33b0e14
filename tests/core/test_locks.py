"""Locks on run folders, and sums of large files: what the system does not have, and what is not to be believed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fitune.commands import train as training
from fitune.core import files, locks
from fitune.core.config import RunConfig, build
from fitune.core.errors import RunFolderError
from fitune.core.events import Silent
from fitune.data import sums
from fitune.models import weights


def test_a_folder_with_nothing_begun_in_it_is_gone_again(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with locks.held(folder, print):
        files.check_new(folder)  # the lock alone is nothing of the user's
    assert not (tmp_path / "runs").exists()
    with locks.held(folder, print):
        (folder / "config.yaml").write_text("")
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_two_runs_without_an_output_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"model": "m", "data": ["d"]})
    names = iter(["first", "second"])  # what is free when they look: the first is taken in between

    def checked(wanted: RunConfig) -> SimpleNamespace:
        output = wanted.output or str(tmp_path / next(names))
        return SimpleNamespace(config=wanted.model_copy(update={"output": output}))

    monkeypatch.setattr(training, "to_train", checked)
    with locks.held(tmp_path / "first", print), contextlib.ExitStack() as stack:
        taken, run = training._take_folder(config, stack, Silent())
        assert run.path == Path(str(taken.config.output)) == tmp_path / "second"
        assert locks.holder(run.path)
        with pytest.raises(locks.InUseError):
            training._take_folder(config.model_copy(update={"output": str(tmp_path / "first")}), stack, Silent())


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo] if hasattr(os, "mkfifo") else [Path.mkdir])
def test_what_is_no_file_and_has_the_locks_name_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "run.lock")
    with pytest.raises(RunFolderError, match=re.escape(str(tmp_path / "run.lock"))), locks.held(tmp_path, print):
        pass
    assert locks.holder(tmp_path) is None


def test_a_path_that_cannot_be_a_folder_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"), locks.held(tmp_path / "file" / "run", print):
        pass
    (tmp_path / "run" / files.LOCK).mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"run\.lock: not a file"), locks.held(tmp_path / "run", print):
        pass


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"steps\.jsonl: cannot be written"), files.disk(tmp_path):
        (tmp_path / "steps.jsonl").open("ab")
    (tmp_path / "made").write_text("")
    with pytest.raises(RunFolderError, match=r"steps\.jsonl: cannot be written"), files.disk(tmp_path):
        (tmp_path / "made").replace(tmp_path / "steps.jsonl")


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int) -> bool:
        raise locks._NoLocksError(95, "Operation not supported")

    monkeypatch.setattr(locks, "_lock", none)
    messages: list[str] = []
    with locks.held(tmp_path / "run", messages.append):
        (tmp_path / "run" / "config.yaml").write_text("")
    assert "this file system has no locks" in messages[0]
    assert locks.holder(tmp_path / "run") is None


def test_sums_of_large_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    monkeypatch.setattr(sums, "SETTLED", -1)
    monkeypatch.setenv("FITUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    content = random.Random(0).randbytes(3500)
    file.write_bytes(content)
    made: list[Path] = []
    real = files.tree
    monkeypatch.setattr(files, "tree", lambda path: (made.append(path), real(path))[1])
    first = weights.summed(tmp_path)
    assert weights.summed(tmp_path) == first
    assert len(made) == 1
    file.write_bytes(content[:-1] + b"x")  # of the same length
    assert weights.summed(tmp_path) != first
    file.write_bytes(content)
    assert sums.matches(file, first["model.safetensors"])
    known = tmp_path / "cache" / sums.NAME
    for broken in (
        known.read_text().replace(first["model.safetensors"]["sha256_tree"], "0" * 64),
        "[",
        "[]",
        '{"a": 1}',
    ):
        known.write_text(broken)
        assert sums.matches(file, first["model.safetensors"])  # what was kept is not believed against the file
    pieces = b"".join(hashlib.sha256(content[n : n + 1000]).digest() for n in range(0, 3500, 1000))
    assert first["model.safetensors"] == {"bytes": 3500, "sha256_tree": hashlib.sha256(pieces).hexdigest()}
