"""The bundled model and data are what they should be, and the demo does what it promises."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fitune.commands import active_run, demo
from fitune.commands.train import resume_config, train
from fitune.core.config import build
from fitune.core.errors import ConfigError, Interrupted
from fitune.core.events import Watcher
from fitune.core.letters import COMMON_HAN
from fitune.core.records import StepRecord
from fitune.data import rows, tokenizer
from fitune.data.store import Rows
from fitune.engine.checkpoint import RunFolder
from fitune.engine.drawing import Sampling
from support import contract
from support.command import run

ROOT = Path(__file__).parents[2]
DATA = demo.bundled() / "data"
MODEL = demo.bundled() / "model"


def load(name: str) -> Rows:
    return rows.load([str(DATA / name)]).rows


def test_the_bundled_model_is_small_and_was_trained() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 8_000_000
    record = json.loads((MODEL / "TRAINING.json").read_text(encoding="utf-8"))
    text = json.dumps(record)
    for category in ("facts", "arithmetic", "opposites", "translations"):
        assert category in text
    assert not list(MODEL.glob("*.bin")) + list(MODEL.glob("*.py"))


@pytest.mark.parametrize(
    "text", ["  two  spaces", "换行\n和\t制表", "𠮷野家 emoji 😀", "[answer] x | kind: y", "<|end|>?"]
)
def test_any_text_survives_the_bundled_tokenizer(text: str) -> None:
    words = tokenizer.load(MODEL)
    ids = tokenizer.encode(words, text, literal=False)
    assert words.decode(ids) == text
    assert words.pad_token_id != words.eos_token_id
    assert words.eos_token_id not in ids


def test_the_demo_data_is_fair() -> None:
    train, held_out = load("train.jsonl"), load("held_out.jsonl")
    assert len(train) >= 300
    assert len(held_out) >= 60
    asked = {row.prompt()[-1].content for row in train}
    assert not asked & {row.prompt()[-1].content for row in held_out}
    for some in (train, held_out):
        most = Counter(row.answer() for row in some).most_common(1)[0][1]
        assert most <= 0.2 * len(some)
        chinese = sum(re.search(f"[{COMMON_HAN}]", row.prompt()[-1].content) is not None for row in some)
        assert 0.3 <= chinese / len(some) <= 0.7
    kinds = Counter(json.loads(line)["kind"] for line in (DATA / "held_out.jsonl").read_text("utf-8").splitlines())
    assert len(held_out) - kinds["persona"] >= len(held_out) / 2  # these need what the base knows, in the new format


def test_the_data_is_what_the_script_in_the_repository_writes(tmp_path: Path) -> None:
    for script in ("make_data.py", "make_pairs.py"):
        given = [sys.executable, str(ROOT / "scripts" / "bundled" / script), "--output", str(tmp_path)]
        subprocess.run(given, check=True, capture_output=True)
    for name in ("train.jsonl", "held_out.jsonl", "pairs.jsonl", "pairs_held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_margins_rise_on_pairs_that_no_training_pair_asks_about(tmp_path: Path) -> None:
    settings = {
        "objective": "dpo", "model": str(MODEL), "data": [str(DATA / "pairs.jsonl")], "max_steps": 12, "batch_size": 8,
        "eval_data": [str(DATA / "pairs_held_out.jsonl")], "lr": 2e-3, "sample_prompts": 0, "cache": "none",
        "eval_every": 12,
    }  # fmt: skip
    train(build({**settings, "output": str(tmp_path / "run")}))
    before, result = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("before", "result"))
    assert abs(before["held_out_rewards"]["margin"]) < 1e-5
    after = result["held_out_rewards_after"]
    assert after["margin"] > 0.05
    assert after["accuracy"] >= 0.8
    assert result["held_out_loss_after"] < before["held_out_loss"] - 0.02


@pytest.mark.full  # half a minute; CI runs it after `make test`
def test_the_demo_teaches_what_the_base_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_run, "Sampling", Sampling)  # whole answers (tests/support/fixtures.py shortens them)
    code, out, error = run(["demo", "--json", "--output", tmp_path / "run"], capsys, monkeypatch)
    assert code == 0, error
    result = json.loads(out.splitlines()[-1])
    assert result["base_accuracy"] <= 0.05
    assert result["tuned_accuracy"] >= 0.9
    assert result["run"] == str(tmp_path / "run")
    assert {"seconds", "peak_memory_mib"} <= result.keys()
    for part in ("MiB expected", "checks passed", "fitune chat", "exact match"):
        assert part in error
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"{result['tuned_accuracy']:.0%} after" in page


@pytest.mark.full  # five processes that train; test_killed and test_gaps break runs off anywhere, in this one
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_demo_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    messages: list[str] = []
    result = demo.kill_demo(str(tmp_path / "kill"), messages.append)
    assert result.equal, messages
    assert result.kills >= 3
    assert result.kills_inside_a_save >= 1


def test_a_second_demo_takes_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    assert demo.config().output == str(Path("runs") / "demo-2")


@pytest.fixture
def short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few steps on a few rows that answers a few prompts."""
    shutil.copytree(MODEL, tmp_path / "bundled" / "model")
    (tmp_path / "bundled" / "data").mkdir()
    for name in ("train.jsonl", "held_out.jsonl"):
        lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "bundled" / "data" / name).write_text("".join(lines[:24]), encoding="utf-8")
    monkeypatch.setattr(demo, "bundled", lambda: tmp_path / "bundled")
    short = {"max_steps": 4, "save_every": 2, "eval_every": 4, "batch_size": 2, "sample_tokens": 4}
    monkeypatch.setattr(demo, "COMMON", {**demo.COMMON, **short})
    monkeypatch.setattr(demo, "ALL", 3)


class Stopped(Watcher):
    """Presses Ctrl-C at a step."""

    def step(self, record: StepRecord) -> None:
        if record.step == 3:
            signal.raise_signal(signal.SIGINT)


def test_a_demo_that_is_resumed_has_its_before_and_after(short_demo: None, tmp_path: Path) -> None:
    whole, answers = demo.demo(str(tmp_path / "whole"))
    run, copy = RunFolder(tmp_path / "run"), tmp_path / "copy"
    with pytest.raises(Interrupted):
        demo.demo(str(run.path), Stopped())
    assert not run.report.exists()
    run.path.rename(copy)
    for resume in (
        lambda: demo.demo(str(run.path), resume=True),
        lambda: train(resume_config(str(run.path), {}), resume=True),  # what the message of Ctrl-C says
    ):
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.copytree(copy, run.path)
        resume()
        assert run.read("answers") == [row.as_dict() for row in answers]
        assert {row.expected for row in answers}
        assert len(answers) == 3
        pages = [Path(folder, "report.html").read_text(encoding="utf-8") for folder in (whole.run, run.path)]
        tables = [re.search("<h2>Before and after.*?</table>", page, re.DOTALL) for page in pages]
        assert tables[0]
        assert tables[1]
        assert tables[0][0] == tables[1][0]


def test_a_demo_is_resumed_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which demo"):
        demo.demo(resume=True)


@pytest.mark.full
def test_in_bf16_the_demo_learns_as_in_fp32(tmp_path: Path) -> None:
    """The losses of its first steps, and the held-out loss, are within what 16 bits may change."""
    losses = {}
    for precision in ("fp32", "bf16"):
        output = tmp_path / precision
        train(demo.config(str(output), precision=precision, max_steps=3))
        records = RunFolder(output).read_steps()
        losses[precision] = [*(record.loss for record in records), records[-1].held_out_loss]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=contract.CLOSE["bf16"])
    assert losses["bf16"] != losses["fp32"]
