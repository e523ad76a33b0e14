"""The comparison of preferences with TRL: what fitune computes of it, and that a difference is caught."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fitune.commands.demo import bundled
from support.against import bench, module

preference = module("preference")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def settings(work: Path) -> dict[str, Any]:
    """Of a tiny model, with the pairs that come with the package."""
    found = {
        "shape": "tiny", "precision": "fp32", "tokenizer": str(bundled() / "model"), "rank": 4, "alpha": 8.0, "seed": 7,
        "targets": ["q_proj", "v_proj"], "raw": str(bundled() / "data" / "pairs.jsonl"), "batch": 4, "steps": 2,
        "model": str(work / "model"), "adapter": str(work / "adapter"),
    }  # fmt: skip
    bench(work).run("preference_prepare", "fitune", {**found, "work": str(work)}, "prepare")
    return found


def computed(work: Path, settings: dict[str, Any], name: str) -> dict[str, Any]:
    given = {**settings, "objective": name, "options": preference.OBJECTIVES[name], "work": str(work / name)}
    (work / name).mkdir(exist_ok=True)
    found: dict[str, Any] = bench(work).run("preference_fitune", "fitune", given, name)
    return found


def test_a_batch_of_pairs_takes_the_memory_of_answers(work: Path, settings: dict[str, Any]) -> None:
    found = computed(work, settings, "dpo")
    assert [len(batch["rows"]) for batch in found["batches"]] == [4, 4]
    assert found["peak"] <= preference.MOST_PEAK * found["sft_peak"]
    assert found["reference_flops"] > 0
    row = found["batches"][0]["rows"][0]
    assert row["chosen"] != row["rejected"]
    assert len(row["prompt"]) > 1


@pytest.mark.parametrize("name", ["kto", "orpo-whole"])
def test_rows_are_those_of_their_objective(name: str, work: Path, settings: dict[str, Any]) -> None:
    rows = [batch["rows"] for batch in computed(work, settings, name)["batches"]]
    if name == "kto":
        assert {row["desirable"] for batch in rows for row in batch} == {True, False}
        return
    assert {(len(batch), len(batch[0]["prompt"])) for batch in rows} == {(1, 1)}


@pytest.mark.unit
@pytest.mark.parametrize("planted", ["nothing", "loss", "chosen", "gradients", "tensors"])
def test_a_difference_is_caught(planted: str, tmp_path: Path) -> None:
    batches: list[dict[str, float]] = [
        {"loss": 0.7, "chosen": 0.1, "rejected": -0.1, "flops": 100, "tokens": 9} for _ in range(2)
    ]
    ours = {"batches": batches, "reference_flops": 20, "peak": 105, "sft_peak": 100, "versions": {}}
    others = copy.deepcopy(batches)
    others[0]["flops"] = 340
    if planted in ("loss", "chosen"):
        others[1][planted] += 2e-5
    theirs = {"batches": others, "versions": {}}
    for folder, name in ((tmp_path / "a", "base_model.model.q"), (tmp_path / "b", "base_model.model.q.default")):
        folder.mkdir()
        other = planted == "gradients" and folder.name == "b"
        tensors = {f"{n}.{name}.weight": torch.ones(3) + (2e-5 if other else 0) for n in range(2)}
        if planted == "tensors" and folder.name == "b":
            del tensors[f"1.{name}.weight"]
        save_file(tensors, str(folder / "gradients.safetensors"))
    if planted == "tensors":
        with pytest.raises(SystemExit, match="trained tensors differ"):
            preference.compared(ours, theirs, (tmp_path / "a", tmp_path / "b"))
        return
    found = preference.compared(ours, theirs, (tmp_path / "a", tmp_path / "b"))
    assert found["equal"] == (planted == "nothing")
    assert found["tensors"] == 2
    assert found["flops"]["share"] == pytest.approx(0.5)
    assert found["peak"]["share"] == pytest.approx(1.05)
    assert ("DIFFERS" in preference.line("dpo", found)) == (planted != "nothing")


@pytest.mark.unit
def test_rows_with_short_answers_are_compared(tmp_path: Path) -> None:
    def row(chosen: int, rejected: int) -> dict[str, Any]:
        return {"chosen": {"value": "a" * chosen}, "rejected": {"value": "b" * rejected}}

    data = tmp_path / "rows.json"
    data.write_text(json.dumps([row(10, 200), row(10, 20), row(2, 20), row(30, 40)]), encoding="utf-8")
    preference.short(data, 2, tmp_path / "short.json")
    assert json.loads((tmp_path / "short.json").read_text(encoding="utf-8")) == [row(10, 20), row(30, 40)]
    with pytest.raises(SystemExit, match="2 rows with short answers, 3 needed"):
        preference.short(data, 3, tmp_path / "short.json")
