"""Verbs that write a model, downloads and prepared data: killed at any write, run again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fitune.commands import convert as converting
from fitune.commands import export as exporting
from fitune.commands import merge as merging
from fitune.commands import quantize as quantizing
from fitune.commands.train import train
from fitune.core import scratch
from fitune.core.config import build
from fitune.core.errors import RunFolderError
from fitune.core.files import write_atomic
from fitune.core.scratch import TEMPORARY, Scratch
from fitune.data.cache import Cache, key
from support import tiny
from support.faults import How, Killed, seam, some
from support.folders import content, leftovers

Work = Callable[[Path], object]
SEED = int.from_bytes(os.urandom(4), "big")  # another choice each time; a failure names it


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished run on a base in 4 bits."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = tiny.write_rows(folder / "rows.jsonl", 12)
    values = {"max_steps": 1, "batch_size": 2, "sample_prompts": 0, "max_length": 64, "max_lost": 1.0}
    train(build({"model": str(model_folder), "data": [str(rows)], "output": str(folder / "run"), **values}))
    return folder / "run"


@pytest.fixture(scope="module")
def works(run: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """What each verb does, by its target."""
    old = tmp_path_factory.mktemp("old") / "model"
    old.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (old / file.name).write_bytes(file.read_bytes())
    torch.save(tiny.make_model("llama").state_dict(), old / "pytorch_model.bin")
    glm = tiny.save("glm", tmp_path_factory.mktemp("glm"))

    def prepared(target: Path) -> None:
        cache = Cache(target)
        cache.entry("rows", key("a"), lambda folder: (folder / "rows.jsonl").write_text("{}\n" * 9))
        cache.entry("samples", key("b"), lambda folder: (folder / "ids").write_bytes(bytes(99)))

    return {
        "merge": lambda target: merging.merge(run, target, dtype="fp32"),
        "quantize": lambda target: quantizing.quantize(model_folder, target, quant="int8"),
        "convert": lambda target: converting.convert(old, target),
        "export": lambda target: exporting.export(glm, target, shard=20_000),
        "cache": prepared,
        "page": lambda target: write_atomic(target, "page " * 99),
    }


KINDS = ("merge", "quantize", "convert", "export", "cache", "page")


def attempt(work: Work, target: Path, at: int, how: How) -> bool:
    """The work with one write that fails; False: it went on without."""
    with seam(target.parent, at, how) as here:
        try:
            work(target)
        except (Killed, KeyboardInterrupt):
            return True
        except RunFolderError as error:
            return "the disk is full" in str(error)
    assert not here.struck or how == "full"
    return False


def check(kind: str, work: Work, place: Path, points: int | None, hows: tuple[How, ...] = ("kill", "full")) -> int:
    """Let writes fail, run the same again; what is there in the end is what an unbroken one writes. How many failed."""
    unbroken = place / "unbroken" / "out"
    unbroken.parent.mkdir(parents=True)
    with seam(unbroken.parent) as here:
        work(unbroken)
    assert not leftovers(unbroken.parent)
    whole = content(unbroken) if unbroken.is_dir() else {"": unbroken.read_text()}
    failed = 0
    for how in hows:
        for at in some(here.count, points or here.count, SEED):
            target = place / f"{how}-{at}" / "out"
            target.parent.mkdir()
            failed += attempt(work, target, at, how)
            case = f"{kind}, {how} at {at} of {here.count} ({here.log[at - 1]}), seed {SEED}"
            assert how == "kill" or not leftovers(target.parent), case
            if kind in ("cache", "page") or not target.exists():
                work(target)
            assert (content(target) if target.is_dir() else {"": target.read_text()}) == whole, case
            if kind == "cache" or at < here.count:
                assert not leftovers(target.parent), case
    return failed


@pytest.mark.parametrize("kind", KINDS)
def test_killed_or_on_a_full_disk_and_run_again(kind: str, works: dict[str, Work], tmp_path: Path) -> None:
    assert check(kind, works[kind], tmp_path, points=3 if kind in ("cache", "page") else 2) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)  # on a machine with much else to do
def test_sixty_kills(works: dict[str, Work], tmp_path: Path) -> None:
    kills = sum(check(kind, works[kind], tmp_path / kind, None, ("kill", "full", "stop")) for kind in KINDS)
    assert kills >= 180


def test_leftovers_of_the_dead_go_and_of_nobody_else(tmp_path: Path) -> None:
    living = Scratch(tmp_path / "out")
    dead = tmp_path / living.path.name.replace(living.path.name[-8:], "00000000")
    dead.mkdir()
    (dead / "model.safetensors").write_text("half")
    users = [f"{TEMPORARY}out", f"{TEMPORARY}out.mine", "out.1-00000000", f"{TEMPORARY}link.1-0000000a"]
    for name in users[:3]:
        (tmp_path / name).mkdir()
    (tmp_path / users[3]).symlink_to(tmp_path / users[0], target_is_directory=True)
    scratch.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*users, living.path.name}
    path = living.path
    living.close()
    assert not path.exists()
    with Scratch(tmp_path / ("长" * 80), file=True) as named:
        assert len(named.name.encode()) < 255


SLEEPS = """
import sys, time
from pathlib import Path
from fitune.core.files import whole_folder
with whole_folder(Path(sys.argv[1])) as place:
    (place / "model.safetensors").write_text("half")
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_living_process_keeps_what_it_writes_and_a_killed_one_does_not(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLEEPS, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        mine = leftovers(tmp_path)
        scratch.sweep(tmp_path)
        assert leftovers(tmp_path) == mine != []
        process.send_signal(signal.SIGKILL)
        process.wait()
    scratch.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_real_kills(run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Some at random moments while the folder is being written."""
    drawn = random.Random(SEED)
    for number in range(6):
        place = tmp_path / str(number)
        place.mkdir()
        words = ["merge", str(run)] if number % 2 else ["quantize", str(model_folder)]
        command = [sys.executable, "-m", "fitune", *words, "--output", str(place / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not leftovers(place):
            time.sleep(0.001)
        time.sleep(drawn.random() * 0.05)
        process.kill()
        process.wait()
        if not (place / "out").exists():
            subprocess.run(command, check=True, capture_output=True)
        assert [path.name for path in place.iterdir()] == ["out"], f"seed {SEED}"
        other = tmp_path / f"{number}-again" / "out"
        subprocess.run([*command[:-1], str(other)], check=True, capture_output=True)
        assert content(place / "out") == content(other)
