"""lm-eval's tasks: the same log-likelihoods as its own model, and task files of a folder, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fitune.commands import harness
from fitune.commands.demo import bundled
from fitune.commands.harness import Tasks, on_tasks
from fitune.core.errors import ConfigError
from fitune.core.events import Silent
from fitune.engine.loading import load
from support import command

MODEL = bundled() / "model"
WHY = "lm-eval is not installed: pip install 'fitune[eval]'"
TASK = """
task: world
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


def _requests() -> list[Any]:
    """Texts of mixed lengths: with and without a context, with many answers of one question, with a trailing space."""
    from lm_eval.api.instance import Instance

    rows = [json.loads(line)["messages"] for line in (bundled() / "data" / "general.jsonl").open(encoding="utf-8")]
    pairs = [(row[0]["content"], row[1]["content"]) for row in rows[:24]]
    answers = [answer for _, answer in pairs]
    asked = [("", answers[0]), ("What is ", "7 + 5?"), *pairs[:8]]
    asked += [
        ("\n".join(f"{q} {a}" for q, a in pairs[:n]) + "\n" + pairs[n][0], " " + a)
        for n in (1, 3, 9)
        for a in answers[:5]
    ]
    return [Instance("loglikelihood", {}, one, n) for n, one in enumerate(asked)]


@pytest.mark.parametrize("share", [True, False])
def test_log_likelihoods_are_those_of_lm_evals_own_model(share: bool) -> None:
    pytest.importorskip("lm_eval", reason=WHY)
    from lm_eval.models.huggingface import HFLM

    from fitune.commands.harness_model import FlatLM

    ours, theirs = FlatLM(load(MODEL, device="cpu", precision="fp32"), "flat", Silent()), HFLM(
        pretrained=str(MODEL), device="cpu", dtype="float32", batch_size=4
    )  # fmt: skip
    ours.share = share
    requests = _requests()
    mine, others = (model.loglikelihood(requests, disable_tqdm=True) for model in (ours, theirs))
    assert [one[0] for one in mine] == pytest.approx([one[0] for one in others], rel=1e-6, abs=1e-6)
    assert [one[1] for one in mine] == [bool(one[1]) for one in others]
    texts = [type(requests[0])("loglikelihood_rolling", {}, (one.args[0] + one.args[1],), 0) for one in requests[-3:]]
    rolled = [model.loglikelihood_rolling(texts, disable_tqdm=True) for model in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], rel=1e-6)
    asked = [type(requests[0])("generate_until", {}, ("2 + 2 =", {"until": ["\n"], "max_gen_toks": 8}), 0)]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_a_task_file_of_a_folder_is_measured_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=WHY)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"What is {n} + 1?", "choices": [f" {n + 1}.", f" {n}.", " no."]} for n in range(2, 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "world.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    arguments = ["eval", MODEL, "--tasks", "world", "--task-files", folder, "--limit", 6, "--json"]
    code, out, err = command.run(arguments, capsys, monkeypatch)
    assert code == 0, err
    (score,) = [one for one in json.loads(out)["scores"] if one["metric"] == "acc"]
    assert (score["task"], score["base"]) == ("world", None)
    assert 0 <= score["tuned"] <= 1
    with pytest.raises(ConfigError, match="no such task"):
        on_tasks(MODEL, Tasks(["word"], folder))


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        on_tasks(MODEL, Tasks(["world"]))
    assert "fitune[eval]" in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [["--tasks", "a", "--verdict"], ["--tasks", "a", "--data", "f"], ["--tasks", "a", "--task-files", "none"]]
)
def test_what_does_not_go_with_tasks_is_refused(
    wrong: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = command.run(["eval", MODEL, *wrong], capsys, monkeypatch)
    assert code == 2
    assert "--task" in err
