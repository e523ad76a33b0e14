"""Figures of held-out rows: by hand, beside the base, and for Chinese by character."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import fitune
import tiny
from fitune import cli
from fitune.config import build
from fitune.evaluation import bleu4, evaluate, rouge_l
from fitune.kernels import loss as loss_kernel
from fitune.records import Finding
from fitune.training import train


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    data = tiny.write_rows(folder / "rows.jsonl", 30)
    held_out = tiny.write_rows(folder / "held_out.jsonl", 9)
    values = {"model": str(model_folder), "data": [str(data)], "eval_data": [str(held_out)], "sample_prompts": 0}
    train(build({**values, "output": str(folder / "run"), "max_steps": 8, "lr": 1e-2}))
    return folder / "run"


def test_bleu_and_rouge_by_hand() -> None:
    assert bleu4(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    assert bleu4(["今天天气真好啊"], ["今天天气真好啊"]) == pytest.approx(100)
    assert 0 < bleu4(["今天天气真好啊"], ["今天天气很好啊"]) < 100  # by character: as words nothing would match
    assert bleu4(["x y z"], ["今天天气真好"]) == 0
    # longest common subsequence 3 of 4 and 3 of 3 units: P = 3/4, R = 1, F = 6/7
    assert rouge_l(["今天很好"], ["今天好"]) == pytest.approx(6 / 7)
    assert rouge_l(["the big cat"], ["the cat"]) == pytest.approx(0.8)
    assert rouge_l(["a", "b"], ["a", "c"]) == pytest.approx(0.5)


def test_a_run_is_measured_beside_its_base(run: Path, model_folder: Path) -> None:
    held_out = str(run.parent / "held_out.jsonl")
    found = evaluate(run, [held_out], max_new_tokens=6, samples=2)
    done = json.loads((run / "result.json").read_text())
    assert (found.rows, found.asked, found.too_long) == (9, 9, 0)
    assert found.scores.loss == pytest.approx(done["held_out_loss_after"], abs=1e-5)
    assert found.base is not None
    assert found.base.loss == pytest.approx(done["held_out_loss_before"], abs=1e-5)
    assert found.scores.perplexity == pytest.approx(math.exp(found.scores.loss))
    assert len(found.samples) == 2
    plain = evaluate(model_folder, [held_out], answer=False)
    assert plain.base is None
    assert plain.scores.exact_match is None
    assert plain.scores.loss == pytest.approx(found.base.loss, abs=1e-5)
    assert fitune.evaluate(run, [held_out], answer=False).scores.loss == found.scores.loss


def test_right_answers_count(run: Path, tmp_path: Path) -> None:
    """Rows whose expected answers are what the model says: everything is at its best."""
    asked = [row["messages"][0]["content"] for row in tiny.rows(4)]
    said = [fitune.generate(run, question, max_new_tokens=12) for question in asked]
    data = tmp_path / "rows.jsonl"
    pairs = [(q, a) for q, a in zip(asked, said, strict=True) if a.strip()]
    assert pairs
    data.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs), encoding="utf-8")
    found = evaluate(run, [str(data)], max_new_tokens=12)
    assert found.scores.exact_match == 1.0
    assert found.scores.rouge_l == pytest.approx(1.0)


def test_logits_of_a_set_are_never_held(run: Path, monkeypatch) -> None:
    """The seeded fault: a head that sees more rows than a chunk."""
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", 4 * 400 * 3)  # three rows
    seen: list[int] = []
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if self.out_features == 400 and x.dim() == 2:
            seen.append(x.shape[0])
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    clean = ("flat", Finding("packing-leak", "ok", ""))  # the probe scores two short documents whole
    monkeypatch.setattr("fitune.leak.packing_leak", lambda *_: clean)
    evaluate(run, [str(run.parent / "held_out.jsonl")], answer=False)
    assert seen.count(3) > 5
    assert max(seen) == 3


def test_eval_on_the_command_line(run: Path, capsys, monkeypatch) -> None:
    arguments = ["eval", run, "--data", run.parent / "held_out.jsonl", "--max-tokens", 4, "--take", 5, "--json"]
    monkeypatch.setattr(sys, "argv", ["fitune", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == 5
    for word in ("base", "tuned", "perplexity", "bleu4", "rouge l"):
        assert word in err


@pytest.mark.shared
def test_advertisegen_with_a_real_model(shared: Path) -> None:
    found = evaluate(
        shared / "models" / "stories260K", [str(shared / "data" / "advertisegen_dev" / "dev.json")], take=6,
        columns={"content": "prompt", "summary": "completion"}, max_new_tokens=8,
    )  # fmt: skip
    assert found.rows == 6
    assert found.scores.loss > 1
    assert found.scores.bleu4 is not None
