"""The seal of a run folder, its checkpoints and its log, and the lock on it: each fault is planted, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fitune
from fitune.checks import early
from fitune.cli import main as cli
from fitune.commands import resuming
from fitune.commands.check_log import CheckLog
from fitune.commands.merge import merge
from fitune.commands.train import resume_config, train
from fitune.core import files, locks
from fitune.core.config import build
from fitune.core.errors import FituneError, ModelError, RunFolderError, TrainingError
from fitune.core.events import Silent, Watcher
from fitune.engine import integrity
from fitune.engine.checkpoint import RunFolder
from fitune.engine.loading import load
from support import tiny
from support.runs import Crash, CrashAt

STEPS = {"max_steps": 6, "batch_size": 4, "save_every": 2, "eval_every": 2, "sample_prompts": 0, "lr": 1e-2,
         "keep_last": 3, "lora": {"rank": 2}, "final": "best"}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one that ended after step 5, and one of another seed, with their base and their rows."""
    folder = tmp_path_factory.mktemp("sealed")
    data = tiny.write_rows(folder / "rows.jsonl", 24)
    values = {"model": str(tiny.save("llama", folder / "model")), "data": [str(data)], **STEPS}
    train(build({**values, "output": str(folder / "done")}))
    with pytest.raises(Crash):
        train(build({**values, "output": str(folder / "stopped")}), watch=CrashAt(5))
    return folder


@pytest.fixture
def done(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "done", tmp_path / "done"))


@pytest.fixture
def stopped(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "stopped", tmp_path / "stopped"))


def resume(run: Path, watch: Watcher | None = None) -> Any:
    return train(resume_config(str(run), {}), resume=True, watch=watch)


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "resume": lambda run, out: resume(run).held_out_loss_after,
    "chat": lambda run, out: fitune.generate(run, "what is 3 plus 3?", max_new_tokens=3),
    "eval": lambda run, out: fitune.evaluate(run, [str(out / "few.jsonl")], answer=False).scores.loss,
    "merge": lambda run, out: files.sha256(Path(merge(run, out / "merged").folder) / "model.safetensors"),
    "adapter": lambda run, out: resume_from(run, out),
}


def resume_from(run: Path, out: Path) -> Any:
    """The settings of a run that goes on from another one's adapter."""
    from fitune.commands.request import to_train

    data, owner = tiny.write_rows(out / "more.jsonl", 4), run if (run / "config.yaml").is_file() else run.parent
    return to_train(
        build({"model": str(RunFolder(owner).read_config().model), "data": [str(data)], "adapter": str(run)})
    )


def flip(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# a fault, and the file that every verb names; those of `train --adapter` are in the adapter alone
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "rslora": (lambda run: edit(run / "config.yaml", "rslora: false", "rslora: true"), "config.yaml"),
    "take": (lambda run: edit(run / "config.yaml", "take: []", "take: [9]"), "config.yaml"),
    "template": (lambda run: flip(run / "template.json"), "template.json"),
    "data": (lambda run: (run / "data.json").write_text("{}"), "data.json"),
    "tokenizer": (lambda run: flip(run / "tokenizer" / "tokenizer.json", 40), "tokenizer/tokenizer.json"),
    "no tokenizer": (lambda run: shutil.rmtree(run / "tokenizer"), "tokenizer/tokenizer.json"),
    "more of it": (lambda run: (run / "tokenizer" / "vocab.json").write_text("{}"), "tokenizer/vocab.json"),
    "bits": (lambda run: flip(run / "adapter" / "adapter_model.safetensors"), "adapter/adapter_model.safetensors"),
    "cut": (lambda run: os.truncate(run / "adapter" / "adapter_model.safetensors", 99), "adapter_model.safetensors"),
    "its settings": (lambda run: flip(run / "adapter" / "adapter_config.json", 30), "adapter/adapter_config.json"),
    "added": (lambda run: (run / "adapter" / "new_tokens.json").write_text("[7]"), "adapter/new_tokens.json"),
    "a folder": (lambda run: ((run / "data.json").unlink(), (run / "data.json").mkdir()), "data.json"),
    "the seal": (lambda run: flip(run / "seal.json", 60), "seal.json"),
    "no seal": (lambda run: (run / "seal.json").unlink(), "seal.json"),
    "an empty one": (lambda run: (run / "seal.json").write_text("{}"), "seal.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_finished_run_is_refused_by_every_verb(fault: str, done: Path, tmp_path: Path) -> None:
    plant, named = FAULTS[fault]
    plant(done)
    tiny.write_rows(tmp_path / "few.jsonl", 4)
    of_adapter = fault in ("bits", "cut", "its settings", "added", "the seal", "an empty one")
    for verb, use in VERBS.items():
        if verb == "adapter" and not of_adapter:
            continue
        with pytest.raises(FituneError) as caught:
            use(done, tmp_path)
        assert named in str(caught.value), verb
        assert f"fitune reseal {done}" in str(caught.value), verb
    assert not (tmp_path / "merged").exists()


def test_what_is_free_and_what_is_not_read_changes_no_answer(done: Path, place: Path, tmp_path: Path) -> None:
    wanted = VERBS["chat"](place / "done", tmp_path)
    (done / "adapter" / "README.md").write_text("my card")
    (done / "adapter" / ".gitattributes").write_text("*.safetensors filter=lfs")
    (done / "report.html").unlink()
    shutil.rmtree(done / "checkpoints")
    assert VERBS["chat"](done, tmp_path) == wanted
    assert resume(done).steps == 6  # it is finished
    assert (done / "report.html").is_file()
    (done / "plan.html").unlink()
    (done / "plan.html").mkdir()
    with pytest.raises(RunFolderError, match=r"plan\.html: is a folder"):
        resume(done)


def test_a_change_on_purpose_is_accepted_by_name(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = json.loads((done / "template.json").read_text())
    (done / "template.json").write_text(json.dumps(template, indent=3))
    monkeypatch.setattr(sys, "argv", ["fitune", "reseal", str(done)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "template.json has" in shown
    assert "sealed as it is now" in shown
    assert integrity.check(RunFolder(done)) is None
    (done / "seal.json").unlink()
    before = RunFolder(done)
    assert integrity.reseal(before) == ["seal.json was not there, or damaged"]
    assert before.identity == integrity.carried(before)  # its checkpoints are still of this run
    (done / "result.json").unlink()
    integrity.reseal(before)
    assert not integrity.was_finished(before)  # --resume makes it again


def test_settings_that_were_changed_and_accepted_do_not_go_with_the_checkpoints(stopped: Path) -> None:
    edit(stopped / "config.yaml", "seed: 42", "seed: 43")
    with pytest.raises(RunFolderError, match=r"not as the run left it: config\.yaml"):
        resume_config(str(stopped), {})
    assert integrity.reseal(RunFolder(stopped)) == [f"config.yaml {how(stopped)}"]
    with pytest.raises(RunFolderError) as caught:
        resuming.newest(checked(stopped), with_best=False)
    assert "the checkpoint of another run" in str(caught.value)
    assert "other settings" in str(caught.value)


def how(run: Path) -> str:
    return "has other bytes"


def checked(run: Path) -> RunFolder:
    folder = RunFolder(run)
    integrity.check(folder, (*integrity.BEGIN, *integrity.END), missing=integrity.END)
    return folder


def test_what_a_finished_run_lacks_is_made_again(done: Path) -> None:
    digest = files.sha256(done / "adapter" / "adapter_model.safetensors")
    (done / "adapter" / "adapter_model.safetensors").unlink()
    (done / "result.json").unlink()
    with pytest.raises(RunFolderError, match="is missing") as caught:
        load(done)
    assert "--resume" in str(caught.value)
    resume(done)
    assert files.sha256(done / "adapter" / "adapter_model.safetensors") == digest
    assert (done / "result.json").is_file()
    assert integrity.check(RunFolder(done), (*integrity.BEGIN, *integrity.END)) is None


def test_a_finished_run_that_was_moved_is_shown_where_it_is(done: Path) -> None:
    """`fitune chat` is to be typed with that name."""
    assert resume(done).run == str(done)


def test_a_run_from_before_there_were_seals_is_used_with_a_warning(
    done: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unseal(done)
    load(done)
    assert any("no seal.json: made before runs were sealed" in record.message for record in caplog.records)
    assert resume(done).steps == 6


def test_a_run_without_a_seal_goes_on_and_is_sealed_at_its_end(stopped: Path, place: Path) -> None:
    unseal(stopped)
    with pytest.raises(RunFolderError, match="not finished"):
        integrity.reseal(RunFolder(stopped))
    resume(stopped)
    name = "adapter/adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (place / "done" / name).read_bytes()
    assert integrity.check(RunFolder(stopped), (*integrity.BEGIN, *integrity.END)) is None


def unseal(run: Path) -> None:
    """As fitune wrote runs before."""
    (run / "seal.json").unlink()
    for folder in (run / "checkpoints").iterdir():
        found = files.read_summed(folder / files.MANIFEST)
        assert found is not None
        (folder / files.MANIFEST).write_text(json.dumps(found["files"]))


def test_the_adapter_folder_by_itself_is_checked_too(done: Path, tmp_path: Path) -> None:
    """That of a full tuning is a model folder, which can be talked to."""
    (done / "adapter" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"adapter/config\.json is there and was not sealed"):
        load(done / "adapter")
    with pytest.raises(RunFolderError, match=r"adapter/config\.json is there and was not sealed"):
        resume_from(done / "adapter", tmp_path)


# ---- checkpoints ----


def faulty(path: Path, manifest: dict[str, Any]) -> None:
    (path / files.MANIFEST).write_text(json.dumps(files.with_own_sum(manifest)))


def test_a_manifest_lists_exactly_the_files_that_are_there(stopped: Path) -> None:
    path = stopped / "checkpoints" / "step-000004"
    manifest = files.whole(path)
    assert manifest is not None
    assert {"run", "step", "log", "files"} == set(manifest)
    assert manifest["run"] == checked(stopped).identity
    listed = manifest["files"]
    for some in ({}, {name: one for name, one in listed.items() if name != "rng.safetensors"}):
        faulty(path, {**manifest, "files": some})
        assert files.whole(path) is None
    (path / files.MANIFEST).write_text("{}")
    assert files.whole(path) is None
    faulty(path, manifest)
    assert files.whole(path) is not None
    (path / "extra.safetensors").write_bytes(b"x")
    assert files.whole(path) is None


def test_a_checkpoint_of_another_run_or_step_is_refused(stopped: Path, place: Path) -> None:
    run = checked(stopped)
    path = stopped / "checkpoints" / "step-000004"
    shutil.rmtree(path)
    shutil.copytree(place / "done" / "checkpoints" / "step-000004", path)
    with pytest.raises(RunFolderError, match="step-000004: the checkpoint of another run") as caught:
        resume(stopped)
    assert "the same settings and data, but not this one" in str(caught.value)
    assert "remove it" in str(caught.value)
    shutil.rmtree(path)
    shutil.copytree(stopped / "checkpoints" / "step-000002", path)
    found, reasons = resuming.newest(run, with_best=False)
    assert found == stopped / "checkpoints" / "step-000002"
    assert reasons == ["step-000004 that of step 2"]


def test_the_best_checkpoint_is_verified_before_it_is_the_result(stopped: Path, place: Path) -> None:
    run, loss = checked(stopped), 2.0
    path = run.checkpoint(4)
    parameters = {name: torch.nn.Parameter(t) for name, t in run.load(path).trainable.items()}
    checks = CheckLog(run, Silent())
    best = resuming.Best(4, loss, torch.float32, partial(resuming.put, parameters=parameters), lambda: loss)
    assert resuming.back_to_best(checks, best) == loss
    with pytest.raises(TrainingError, match="read back, has a held-out loss of"):
        resuming.back_to_best(checks, replace(best, measure=lambda: loss * 1.01))
    for plant in (lambda: flip(path / "trainable.safetensors"), lambda: os.truncate(path / "trainable.safetensors", 9)):
        plant()
        with pytest.raises(RunFolderError, match="step-000004: the best checkpoint") as caught:
            resuming.back_to_best(checks, best)
        assert "--resume" in str(caught.value)
    # and a run that goes on does not count on it: it goes on from before
    state = {"best": [4, 1.0]}
    later = stopped / "checkpoints" / "step-000005"
    shutil.copytree(run.checkpoint(2), later)
    (later / "state.json").write_text(json.dumps({**json.loads((later / "state.json").read_text()), **state}))
    (later / files.MANIFEST).unlink()
    log = hashlib.sha256(b"".join(run.steps.read_bytes().splitlines(keepends=True)[:5])).hexdigest()
    files.seal(later, step=5, run=run.identity, log=log)
    assert resuming.newest(run, with_best=False)[0] == later
    found, reasons = resuming.newest(run, with_best=True)
    assert found == run.checkpoint(2)
    assert "the best so far, step-000004, is not complete" in reasons[0]


def test_the_loss_of_a_finished_run_is_that_of_its_best_weights(place: Path) -> None:
    run = RunFolder(place / "done")
    rules = {check["rule"]: check for check in run.read("checks")}
    best = min(r.held_out_loss for r in run.read_steps() if r.held_out_loss is not None)
    assert run.read("result")["held_out_loss_after"] == best
    last = run.read_steps()[-1].held_out_loss
    assert last == best or rules["best-reloaded"]["level"] == "ok"


def test_a_later_checkpoint_that_does_not_count_pushes_no_good_one_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (2, 4, 5, 6):
        run.checkpoint(step).mkdir(parents=True)
    run.prune(1, 2, 5)  # the run went on from step 4, because that of step 6 is damaged
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000005", "step-000006"]


# ---- the log ----


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (lambda lines: lines[:3], "step-000002"),
        (lambda lines: lines[:1], None),
        (lambda lines: [], None),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "step-000002"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "step-000002"),
        (lambda lines: [*lines[:3], lines[3].replace(b'"loss": ', b'"loss": 1'), *lines[4:]], "step-000002"),
        (lambda lines: [*lines[:4], b"{}\n"], "step-000004"),
        (lambda lines: [*lines[:4], lines[4][:9]], "step-000004"),
    ],
)
def test_a_log_that_is_short_or_changed_falls_back(lines: Any, found: str | None, stopped: Path) -> None:
    run = checked(stopped)
    run.steps.write_bytes(b"".join(lines(run.steps.read_bytes().splitlines(keepends=True))))
    path, reasons = resuming.newest(run, with_best=False)
    assert (path.name if path else None) == found
    assert bool(reasons) == (found != "step-000004")
    assert all("steps.jsonl has" in reason for reason in reasons)


def test_a_log_that_was_changed_before_the_first_checkpoint_is_refused(stopped: Path) -> None:
    run = checked(stopped)
    edit(run.steps, '"step": 1,', '"step": 1, ')
    with pytest.raises(RunFolderError, match="no checkpoint is from before the change") as caught:
        resuming.newest(run, with_best=False)
    assert f"remove {run.checkpoints}" in str(caught.value)


def test_a_resume_after_a_short_log_is_the_unbroken_run(stopped: Path, place: Path) -> None:
    run = RunFolder(stopped)
    run.steps.write_bytes(b"".join(run.steps.read_bytes().splitlines(keepends=True)[:3]))
    resume(stopped)
    name = "adapter/adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (place / "done" / name).read_bytes()
    assert [r.loss for r in run.read_steps()] == [r.loss for r in RunFolder(place / "done").read_steps()]


def test_a_line_that_stands_twice_goes_with_the_checkpoint_behind_it(stopped: Path, place: Path) -> None:
    """The step of the older checkpoint stands twice: its second line lies behind what that checkpoint vouches for."""
    run = RunFolder(stopped)
    lines = run.steps.read_bytes().splitlines(keepends=True)
    run.steps.write_bytes(b"".join([*lines[:2], lines[1], *lines[2:]]))
    resume(stopped)
    assert [r.step for r in run.read_steps()] == [r.step for r in RunFolder(place / "done").read_steps()]


def test_a_log_that_is_changed_while_the_run_goes_on_is_not_sealed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.truncate_steps(0)
    run.check_log()
    run.steps.write_text("{}\n")
    with pytest.raises(RunFolderError, match="was changed during the run"):
        run.check_log()


def test_what_is_changed_while_the_run_goes_on_is_not_sealed_at_its_end(stopped: Path) -> None:
    run = checked(stopped)
    run.truncate_steps(6)
    flip(stopped / "template.json")
    with pytest.raises(RunFolderError, match=r"not as the run left it: template\.json"):
        integrity.end(run)
    flip(stopped / "template.json")
    integrity.end(run)
    assert integrity.was_finished(run)


# ---- base weights ----


def test_another_base_in_place_is_refused_by_every_verb(place: Path, done: Path, tmp_path: Path) -> None:
    """Of the same names, shapes and length: one number in it is another."""
    base = place / "model" / "model.safetensors"
    content = base.read_bytes()
    tiny.write_rows(tmp_path / "few.jsonl", 4)
    try:
        tensors = load_file(base)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 3] += 1e-3
        save_file(tensors, base, metadata={"format": "pt"})
        assert base.stat().st_size == len(content)
        for verb in ("chat", "eval", "merge"):
            with pytest.raises(RunFolderError, match="the base's tensors changed since the run"):
                VERBS[verb](done, tmp_path)
        with pytest.raises(RunFolderError, match="the base's tensors changed since the run"):
            resume_config(str(place / "stopped"), {})
    finally:
        base.write_bytes(content)


# ---- the lock ----

HOLD = """
import sys, time
from pathlib import Path
from fitune.core import locks
with locks.held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def working(stopped: Path) -> Any:
    """Another process works in the folder of a run that is not finished."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(stopped)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_living_run_is_refused_until_its_process_is_gone(
    working: subprocess.Popen[str], stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["train", "--resume"], ["train", "--model", "m", "--data", "d"], ["reseal", str(stopped)]):
        output = [] if arguments[0] == "reseal" else ["--output", str(stopped)]
        monkeypatch.setattr(sys, "argv", ["fitune", *arguments, *output])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert f"process {working.pid} on " in capsys.readouterr().err
    with pytest.raises(locks.InUseError, match="another process works"):
        resume(stopped)
    with pytest.raises(RunFolderError, match="still goes on") as caught:
        load(stopped)
    assert f"process {working.pid}" in str(caught.value)
    working.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    working.wait()
    assert (stopped / files.LOCK).is_file()  # it stays behind, and locks nothing
    assert locks.holder(stopped) is None
    with locks.held(stopped, print):
        assert f"process {os.getpid()}" in str(locks.holder(stopped))
    assert not (stopped / files.LOCK).exists()


def test_of_a_run_that_begins_chat_eval_and_merge_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before its config is written its folder has the lock alone, and is taken for no model without a tokenizer."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(locks.InUseError, match=f"process {process.pid}"):
            load(tmp_path)
        with pytest.raises(locks.InUseError, match=f"process {process.pid}"):
            early.run_or_model(tmp_path)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ModelError, match="neither a run nor a model"):
        early.run_or_model(tmp_path)


# ---- drawn at random ----

READ_BY_CHAT = ("config.yaml", "template.json", "data.json", "tokenizer/", "adapter/", "seal.json")


def mutate(path: Path, draw: random.Random, others: list[Path]) -> str:
    """Change a file somehow; how."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "cut", "grow", "gone", "folder", "swap", "other", "zeros"])
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content[at:at] = draw.randbytes(draw.randint(1, 9))
    elif kind == "swap":
        content[at], content[-1 - at] = content[-1 - at], content[at]
    elif kind == "other":
        content = bytearray(draw.choice(others).read_bytes())
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(content)
    return f"{kind} at {at} of {path.name}"


def torn(place: Path, out: Path, seed: int, count: int, heavy: int) -> list[str]:
    """Mutations of a finished run: what each verb answers is as before, or an error that names the file.

    Args:
        place: of the runs.
        out: a folder to work in.
        seed: of what is drawn.
        count: of mutations.
        heavy: verbs that load a model though the mutation is in nothing that they read; more are left out.
    """
    draw, wrong = random.Random(seed), []
    every = sorted(path for path in (place / "done").rglob("*") if path.is_file() and path.stat().st_size)
    tiny.write_rows(out / "few.jsonl", 4)
    wanted = {verb: VERBS[verb](place / "done", out) for verb in ("resume", "chat", "eval", "merge")}
    for number in range(count):
        run = Path(shutil.copytree(place / "done", out / "run"))
        victim = draw.choice(every).relative_to(place / "done")
        same = (run / victim).read_bytes()
        how = mutate(run / victim, draw, every)
        unchanged = (run / victim).is_file() and (run / victim).read_bytes() == same
        for verb, answer in wanted.items():
            shutil.rmtree(out / "merged", ignore_errors=True)
            heavy -= (idle := verb != "resume" and (unchanged or not str(victim).startswith(READ_BY_CHAT)))
            if idle and heavy < 0:
                continue
            try:
                got = VERBS[verb](run, out)
                bad = "" if got == answer else f"answered {got}, not {answer}"
            except FituneError as error:
                bad = "" if victim.name in str(error) or victim.parts[0] in str(error) else f"does not name it: {error}"
            except Exception as error:
                bad = f"traceback: {error!r}"
            if bad:
                wrong.append(f"{number}: {how}, {verb}: {bad}")
        shutil.rmtree(run)
    return wrong


def test_mutations_of_a_finished_run_are_never_silent(place: Path, tmp_path: Path) -> None:
    assert torn(place, tmp_path, seed=7, count=36, heavy=3) == []


def half(place: Path, out: Path, seed: int, count: int, whole: int) -> list[str]:
    """Mutations of a run that is not finished: it is refused, and the file named, or goes on to the same end.

    Args:
        place, out, seed, count: as for `torn`.
        whole: so many are gone on with to their end; of the others the checkpoint that would be is looked at.
    """
    draw, wrong = random.Random(seed), []
    every = sorted(path for path in (place / "stopped").rglob("*") if path.is_file() and path.stat().st_size)
    name = "adapter/adapter_model.safetensors"
    for number in range(count):
        run = Path(shutil.copytree(place / "stopped", out / "run"))
        victim = draw.choice(every).relative_to(place / "stopped")
        how = f"{number}: {mutate(run / victim, draw, every)} ({victim})"
        try:
            resume_config(str(run), {})
            path, _ = resuming.newest(checked(run), with_best=True)
            CheckLog(RunFolder(run), Silent())._so_far()
            if path is not None and any(file.read_bytes() != (place / "stopped" / file.relative_to(run)).read_bytes()
                                        for file in path.iterdir()):  # fmt: skip
                wrong.append(f"{how}: goes on from what was damaged")
            whole -= 1
            if whole >= 0 and (resume(run), (run / name).read_bytes())[1] != (place / "done" / name).read_bytes():
                wrong.append(f"{how}: ends otherwise")
        except FituneError as error:
            if victim.name not in str(error) and victim.parts[0] not in str(error):
                wrong.append(f"{how}: does not name it: {error}")
        except Exception as error:
            wrong.append(f"{how}: traceback: {error!r}")
        shutil.rmtree(run)
    return wrong


def test_mutations_of_a_run_that_goes_on_are_never_silent(place: Path, tmp_path: Path) -> None:
    assert half(place, tmp_path, seed=7, count=60, whole=1) == []


@pytest.mark.full
def test_many_mutations_of_a_run_that_goes_on_are_never_silent(place: Path, tmp_path: Path) -> None:
    assert half(place, tmp_path, seed=1, count=400, whole=40) == []


@pytest.mark.full
def test_many_mutations_of_a_finished_run_are_never_silent(place: Path, tmp_path: Path) -> None:
    assert torn(place, tmp_path, seed=1, count=600, heavy=60) == []
