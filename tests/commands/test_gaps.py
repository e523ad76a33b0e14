"""A run from its first file to its last: broken off at any write, by a kill, Ctrl-C or a full disk, it completes.

Every rename, fsync and file opened for writing of a whole run is a point. At each the run is broken off, and then asked
for again: by the same command, and by `--resume`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from fitune.commands.train import resume_config, train
from fitune.core import begun
from fitune.core.config import build
from fitune.core.errors import FituneError, Interrupted, RunFolderError
from fitune.core.events import Watcher
from fitune.core.records import StepRecord
from fitune.engine.checkpoint import RunFolder
from support import tiny
from support.faults import How, Killed, Seam, seam, some
from support.folders import content, leftovers

SEED = int.from_bytes(os.urandom(4), "big")  # another choice each time; a failure names it
SETTINGS = {"max_steps": 3, "batch_size": 2, "save_every": 2, "eval_every": 2, "lr": 1e-2, "sample_prompts": 1,
            "sample_tokens": 4}  # fmt: skip
BEST = {"final": "best"}
MEASURED = {
    "result.json", "steps.jsonl", "checks.json", "report.html", "measured.json", "seal.json", "README.md", "plan.json",
    "plan.html", "MANIFEST.json", "config.yaml", "data.json",
}  # fmt: skip
NO_CONFIG = "not a run folder (no config.yaml)"


class Place:
    """A model, data, and runs of it."""

    def __init__(self, root: Path, model: Path, **changes: object) -> None:
        self.root = root
        self.rows = tiny.write_rows(root / "rows.jsonl", 24)
        self.values = {"model": str(model), "data": [str(self.rows)], **SETTINGS, **changes}

    def run(self, name: str, **changes: object) -> Path:
        """The command, whatever lies in the folder."""
        folder = self.root / name / "run"
        folder.parent.mkdir(exist_ok=True)
        train(build({**self.values, "output": str(folder), **changes}))
        return folder

    def resume(self, name: str) -> Path:
        folder = self.root / name / "run"
        train(resume_config(str(folder), {}), resume=True)
        return folder


def losses(run: Path) -> list[tuple]:
    return [(r.step, r.loss, r.lr, r.grad_norm, r.held_out_loss) for r in RunFolder(run).read_steps()]


def bits(run: Path) -> dict[str, str]:
    """Every file by its name; the bits of those that hold no times."""
    return {name: "" if name.rpartition("/")[2] in MEASURED else digest for name, digest in content(run).items()}


def broken(place: Place, name: str, at: int, how: How) -> Seam:
    with seam(place.root / name, at, how) as here:
        try:
            place.run(name)
        except (Killed, Interrupted, KeyboardInterrupt):
            pass
        except FituneError as error:
            if "the disk is full" not in str(error):
                raise
    return here


def check(place: Place, whole: Path, points: list[int], hows: tuple[How, ...], *, both: bool) -> None:
    """Break a run off at each of the points, ask for it again; the folder is the unbroken run's."""
    for number, (at, how) in enumerate((at, how) for at in points for how in hows):
        for resume in (False, True) if both else ((number + SEED) % 2 == 0,):
            name = f"{how}-{at}-{resume}"
            here = broken(place, name, at, how)
            case = f"{name} ({here.log[-1]}), seed {SEED}"
            run = place.root / name / "run"
            if resume and (run / "config.yaml").is_file():
                place.resume(name)
            elif begun_and_finished(run):
                with pytest.raises(RunFolderError, match="holds a finished run"):
                    place.run(name)
            else:
                place.run(name)
            assert bits(run) == bits(whole), case
            assert losses(run) == losses(whole), case
            assert not leftovers(run.parent), case


def begun_and_finished(run: Path) -> bool:
    try:
        begun.check(run)
    except RunFolderError as error:
        return "holds a finished run" in str(error)
    return False


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Place:
    return Place(tmp_path_factory.mktemp("gaps"), model_folder, **BEST)


@pytest.fixture(scope="module")
def whole(place: Place) -> tuple[Path, Seam]:
    """The unbroken run, and all its writes."""
    (place.root / "whole").mkdir()
    with seam(place.root / "whole") as here:
        run = place.run("whole")
    return run, here


def test_a_run_that_is_broken_off_anywhere_completes(place: Place, whole: tuple[Path, Seam]) -> None:
    run, here = whole
    assert here.count > 60
    check(place, run, some(here.count, 2, SEED), ("kill", "full"), both=False)


@pytest.mark.full
@pytest.mark.timeout(3600)  # on a machine with much else to do
@pytest.mark.parametrize("part", range(3))
def test_at_every_rename(part: int, place: Place, whole: tuple[Path, Seam]) -> None:
    """By a kill at each rename and each file of tensors, asked again in both ways."""
    run, here = whole
    points = [at for at, what in enumerate(here.log, 1) if what.startswith(("rename", "save"))]
    assert len(points) > 30
    check(place, run, points[part::3], ("kill",), both=True)


@pytest.mark.full
@pytest.mark.timeout(3600)  # on a machine with much else to do
@pytest.mark.parametrize("how", ["full", "stop"])
def test_at_many_writes(how: How, place: Place, whole: tuple[Path, Seam]) -> None:
    run, here = whole
    check(place, run, some(here.count, 25, SEED), (how,), both=False)


def test_the_same_command_takes_no_other_run_for_its_own(place: Place, whole: tuple[Path, Seam]) -> None:
    broken(place, "other", 160, "kill")
    assert any((place.root / "other" / "run" / "checkpoints").glob("step-*"))
    (place.root / "other" / "run" / "run.lock").unlink()
    before = content(place.root / "other")
    with pytest.raises(RunFolderError, match=r"with other settings.*\n.*seed 7 \(the run has 42\)"):
        place.run("other", seed=7)
    with pytest.raises(RunFolderError, match="holds a finished run"):
        place.run("whole")
    mine = place.root / "mine" / "run"
    mine.mkdir(parents=True)
    (mine / "config.yaml").write_text("seed: 3\n")
    with pytest.raises(RunFolderError, match="is not empty"):
        place.run("mine")
    assert (mine / "config.yaml").read_text() == "seed: 3\n"
    assert content(place.root / "other") == before


def test_a_finished_run_gets_its_pages_again(place: Place, whole: tuple[Path, Seam]) -> None:
    run, _ = whole
    for page in ("report.html", "plan.html"):
        (run / page).unlink()
    place.resume("whole")
    assert "<svg" in (run / "report.html").read_text(encoding="utf-8")
    assert (run / "plan.html").is_file()


class Signals(Watcher):
    """Two of them: while a step is made, and while what the first one asked for goes on."""

    def __init__(self, number: int, again: bool) -> None:
        self.number, self.again = number, again

    def step(self, record: StepRecord) -> None:
        if record.step == 2:
            signal.raise_signal(self.number)

    def stopping(self) -> None:
        if self.again:
            signal.raise_signal(self.number)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGHUP is POSIX")
def test_the_end_of_the_terminal_saves_and_nohup_ignores_it(place: Place, whole: tuple[Path, Seam]) -> None:
    values = {**place.values, "output": str(place.root / "hup")}
    with pytest.raises(Interrupted, match="stopped after step 2 of 3, saved"):
        train(build(values), watch=Signals(signal.SIGHUP, again=False))
    assert [path.name for path in RunFolder(place.root / "hup").whole_checkpoints()] == ["step-000002"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(build(values), watch=Signals(signal.SIGHUP, again=True))  # the same command goes on
    finally:
        signal.signal(signal.SIGHUP, before)
    assert losses(place.root / "hup") == losses(whole[0])


def test_what_a_start_left_that_was_killed_is_free_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "data").mkdir()
    for name in ("run.lock", ".tmp-config.yaml.12-0123abcd", "data/data-0123abcd.jsonl"):
        (run / name).write_text("")
    assert not begun.check(run)
    for name in ("notes.txt", "data/rows.jsonl", "checkpoints/x", ".tmp-mine"):
        (run / name).write_text("mine")
        with pytest.raises(RunFolderError, match="is not empty"):
            begun.check(run)
        (run / name).unlink()
