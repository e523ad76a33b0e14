"""Runs on preferences: their reference, exact resume, the plan, what is measured and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fitune.checks import leak
from fitune.commands import reference
from fitune.commands.train import resume_config, train
from fitune.commands.verify import verify
from fitune.core.config import build
from fitune.core.errors import ConfigError, TrainingError
from fitune.core.files import sha256
from fitune.core.records import Finding
from fitune.engine.checkpoint import RunFolder
from fitune.engine.objectives.base import log_probabilities
from support import tiny
from support.command import run as command
from support.stops import Crash, StopAt, crash

STEPS = {"max_steps": 6, "batch_size": 3, "save_every": 2, "eval_every": 3, "lr": 1e-2, "sample_prompts": 1,
         "sample_tokens": 4}  # fmt: skip


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values = {"objective": "dpo", "model": str(model), "data": [str(data)], "output": str(output), "val_share": 0.2}
    return {**values, **STEPS, "lora": {"dropout": 0.2}, **changes}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a right and a wrong answer."""
    return tiny.write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 30)


@pytest.fixture(scope="module")
def unbroken(model_folder: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    train(build(settings(model_folder, pairs, folder / "run")))
    return folder / "run"


def digest(run: Path) -> str:
    return sha256(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple[object, ...]]:
    records = RunFolder(run).read_steps()
    return [(r.step, r.loss, r.grad_norm, r.held_out_loss, r.rewards, r.held_out_rewards) for r in records]


class Messages(StopAt):
    """Keeps what is reported until the first step ends the run."""

    def __init__(self) -> None:
        super().__init__(1, crash)
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_a_run_begins_at_its_reference_and_learns_what_was_chosen(unbroken: Path) -> None:
    records = RunFolder(unbroken).read_steps()
    before, result = (json.loads((unbroken / f"{name}.json").read_text()) for name in ("before", "result"))
    assert before["held_out_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(before["held_out_rewards"]["margin"]) < 1e-6
    assert all(record.rewards is not None for record in records)
    assert [record.step for record in records if record.held_out_rewards is not None] == [3, 6]
    after = result["held_out_rewards_after"]
    assert after["margin"] > 0.01
    assert after["accuracy"] == 1.0
    assert result["held_out_loss_after"] < before["held_out_loss"]
    found = json.loads((unbroken / "data.json").read_text())["findings"]
    start = next(finding for finding in found if finding["rule"] == "preference-start")
    assert start["level"] == "ok"
    assert f"{math.log(2):.6f}" in start["text"]


def test_the_report_shows_margins_and_accuracy(unbroken: Path) -> None:
    page = (unbroken / "report.html").read_text(encoding="utf-8")
    for text in (
        "Loss per row",
        "Reward margin",
        "Reward accuracy",
        "Log-probability",
        "held-out reward margin",
        "DPO",
    ):
        assert text in page, text


def test_plain_runs_have_nothing_of_it(model_folder: Path, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "rows.jsonl", 10)
    train(build({**settings(model_folder, data, tmp_path / "run"), "objective": "sft", "max_steps": 1}))
    for name in ("steps.jsonl", "result.json", "before.json"):
        assert "rewards" not in (tmp_path / "run" / name).read_text()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Loss per target token" in page
    assert "Reward margin" not in page


@pytest.mark.parametrize(("step", "cache"), [(4, "auto"), pytest.param(1, "none", marks=pytest.mark.full)])
def test_a_resumed_run_equals_the_unbroken_one(
    unbroken: Path, model_folder: Path, pairs: Path, tmp_path: Path, step: int, cache: str
) -> None:
    """With the reference from the cache, and computed once more."""
    config = build(settings(model_folder, pairs, tmp_path / "run", cache=cache))
    with pytest.raises(Crash):
        train(config, watch=StopAt(step, crash))
    train(resume_config(str(tmp_path / "run"), {}), resume=True)
    assert digest(tmp_path / "run") == digest(unbroken)
    assert losses(tmp_path / "run") == losses(unbroken)


def test_full_tuning_is_compared_with_the_model_before_it(model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """Its reference is read on resume, when the weights are others."""
    values = settings(model_folder, pairs, tmp_path / "whole", method="full", lr=1e-3)
    del values["lora"]
    train(build(values))
    with pytest.raises(Crash):
        train(build({**values, "output": str(tmp_path / "run")}), watch=StopAt(4, crash))
    train(resume_config(str(tmp_path / "run"), {}), resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert RunFolder(tmp_path / "run").read_steps()[0].loss == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_is_found_again_by_all_that_decides_it(
    unbroken: Path, model_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    def found(**changes: Any) -> bool:
        watch = Messages()
        output = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(Crash):
            train(build({**settings(model_folder, pairs, output), "sample_prompts": 0, **changes}), watch=watch)
        return any("from the cache" in text for text in watch.texts if text.startswith("reference"))

    assert found(dpo={"beta": 0.5}, lr=1e-3)  # what is made of it decides nothing
    other = tiny.write_pairs(tmp_path / "other.jsonl", 31)
    assert not found(data=[str(other)])
    changed = tiny.save("llama", tmp_path / "model")
    assert found(model=str(changed))  # the same weights in another place
    tiny.make_model("llama", seed=1).save_pretrained(str(changed))
    assert not found(model=str(changed))


def test_a_wrong_reference_ends_the_run(
    model_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = log_probabilities
    monkeypatch.setattr(reference, "log_probabilities", lambda *given: real(*given) + 0.1)
    with pytest.raises(TrainingError, match="preference-start: the loss of the first 3 rows"):
        train(build(settings(model_folder, pairs, tmp_path / "run", cache="none")))


def test_a_model_that_needs_a_prompt_for_each_answer_trains_the_same(
    unbroken: Path, model_folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = RunFolder(unbroken).read_steps()
    found = json.loads((unbroken / "data.json").read_text())["findings"]
    assert "tokens of prompts stand once" in next(one["text"] for one in found if one["rule"] == "shared-prompt")
    fixed = Finding("shared-prompt", "fixed", "planted")
    monkeypatch.setattr(leak, "shared_prompt", lambda *_: fixed)
    train(build(settings(model_folder, pairs, tmp_path / "run", lora={"dropout": 0}, max_steps=2)))
    apart = RunFolder(tmp_path / "run").read_steps()
    assert apart[0].tokens > before[0].tokens
    assert apart[0].loss == pytest.approx(before[0].loss, abs=1e-6)


def test_padded_rows_have_a_prompt_each(unbroken: Path, model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    """As models have them whose layers carry a state from token to token."""
    before = RunFolder(unbroken).read_steps()
    train(build(settings(model_folder, pairs, tmp_path / "run", layout="padded", max_steps=1, eval_every=1)))
    apart = RunFolder(tmp_path / "run").read_steps()
    assert "shared-prompt" not in (tmp_path / "run" / "data.json").read_text()
    assert apart[0].loss == pytest.approx(before[0].loss, abs=1e-6)


def test_only_rows_that_are_met_are_given_to_the_reference() -> None:
    steps = [[np.array([4, 2])], [np.array([1, 0])], [np.array([3])]]
    assert reference.met(steps, 2).tolist() == [0, 1, 2, 4]
    assert reference.met(steps, 9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("changes", [{"method": "full"}, {"objective": "kto", "quant": "nf4"}], ids=str)
def test_the_plan_is_what_is_allocated(changes: dict[str, Any], model_folder: Path, pairs: Path) -> None:
    values = {"objective": "dpo", "model": str(model_folder), "data": [str(pairs)], "batch_size": 24, "device": "cpu"}
    found = verify(build({**values, **changes}))
    assert abs(found.error) <= 0.005, found.error
    for row in [*found.rows, *found.phases]:
        assert row.predicted == pytest.approx(row.measured, rel=0.005, abs=4096), row


def test_a_run_plans_and_shows_pairs(
    model_folder: Path, pairs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    given = ["--objective", "orpo", "--data", pairs, "--max-steps", "2", "--device", "cpu", "--sample-prompts", "0"]
    code, out, err = command(["train", "--model", model_folder, *given, "--output", "run"], capsys, monkeypatch)
    assert code == 0, err
    for text in ("28 pairs, 2 held out", "orpo with lora", "margin ", "% right", "held-out reward margin"):
        assert text in out, text
    code, out, err = command(["plan", model_folder, *given[:4], "--method", "lora", "--json"], capsys, monkeypatch)
    assert code == 0, err
    assert json.loads(out)["how"] == "trace"
    code, out, err = command(["inspect", pairs, "--model", model_folder, "--objective", "dpo"], capsys, monkeypatch)
    assert code == 0, err
    assert "as 30 pairs of samples" in " ".join(out.split())


@pytest.mark.parametrize(
    "objective", ["kto", *(pytest.param(n, marks=pytest.mark.full) for n in ("ipo", "orpo", "simpo"))]
)
def test_every_objective_trains_and_resumes(objective: str, model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    def run(name: str) -> Callable[..., object]:
        values = settings(model_folder, pairs, tmp_path / name, objective=objective, max_steps=4, save_every=2)
        return lambda **how: train(build(values), **how)

    run("whole")()
    with pytest.raises(Crash):
        run("run")(watch=StopAt(3, crash))
    train(resume_config(str(tmp_path / "run"), {}), resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    records = RunFolder(tmp_path / "whole").read_steps()
    assert records[-1].loss < records[0].loss


def test_settings_of_another_objective_are_refused(model_folder: Path, pairs: Path, tmp_path: Path) -> None:
    values = settings(model_folder, pairs, tmp_path / "run")
    with pytest.raises(ConfigError, match="settings of simpo are given, but the objective is dpo"):
        train(build({**values, "simpo": {"gamma": 0.3}}))
