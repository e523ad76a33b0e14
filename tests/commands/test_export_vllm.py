"""A run for vLLM: what its rules allow goes as an adapter, whatever else is merged, and the numbers stay."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fitune
from fitune.commands.export_vllm import ExportedVllm, export_vllm, reasons, unified
from fitune.core.errors import FituneError, ModelError
from fitune.engine.checkpoint import RunFolder
from support import tiny
from support.command import run as command

LINEAR: dict[str, Any] = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}


def tuned(folder: Path, kind: str = "llama", **settings: Any) -> Path:
    """A run of a few steps, whose learning rate moves B far from 0."""
    base = tiny.save(kind, folder / "base")
    given: dict[str, Any] = {
        "max_steps": 2,
        "lr": 0.05,
        "batch_size": 2,
        "sample_prompts": 0,
        "val_share": 0.0,
        "precision": "fp32",
    }
    rows = tiny.write_rows(folder / "rows.jsonl", 6)
    fitune.train(model=base, data=rows, output=str(folder / "run"), cache="none", **given | settings)
    return folder / "run"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("lora"), method="lora", lora=LINEAR)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of several ranks, so of several scales."""
    ranks = {"v_proj": 3, "down_proj": 2}
    return tuned(tmp_path_factory.mktemp("several"), method="lora", lora={**LINEAR, "ranks": ranks, "rslora": True})


def as_vllm_reads_it(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The weights by what vLLM makes of an adapter: one rank, one alpha, W + scale B A."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    assert settings["bias"] == "none"
    scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1)
    weights, tensors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        assert a.shape[0] == b.shape[1] <= settings["r"]
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale * (b @ a)
    return weights


@pytest.mark.parametrize("name", ["lora", "several"])
def test_vllm_makes_the_weights_of_the_run_of_it(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(name)
    done = export_vllm(run, tmp_path / "out")
    fitune.merge(run, tmp_path / "merged", dtype="fp32")
    expected, found = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        as_vllm_reads_it(run.parent / "base", tmp_path / "out"),
    )
    assert done.kind == "adapter"
    assert (done.rounding > 0) == (name == "several")
    assert done.rounding < 1e-7
    changed = [
        key
        for key in expected
        if not torch.equal(expected[key], load_file(run.parent / "base" / "model.safetensors")[key])
    ]
    assert len(changed) == 9
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=2e-6, atol=2e-7)


def test_the_command_has_template_stops_and_an_allowed_rank(lora: Path, tmp_path: Path) -> None:
    done = export_vllm(lora, tmp_path / "out")
    words = shlex.split(done.command)
    options = dict(pairwise(words))
    out = str((tmp_path / "out").resolve())
    assert words[:3] == ["vllm", "serve", str((lora.parent / "base").resolve())]
    assert options["--max-lora-rank"] == "8"
    assert options["--lora-modules"] == f"run={out}"
    assert options["--generation-config"] == options["--tokenizer"] == out
    assert Path(options["--chat-template"]).is_file()
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == done.handed.stop_ids
    assert "--merged" in done.reasons[0]  # a run in float32: vLLM's adapters are computed in 16 bits


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "lora", "lora": {**LINEAR, "dora": True}}, "DoRA"),
        ({"method": "bitfit", "kind": "qwen2"}, "bitfit"),
        ({"method": "lora", "lora": {"rank": 2}, "kind": "gpt2"}, "GPT2LMHeadModel"),
    ],
)
def test_what_vllm_does_not_take_is_merged_and_named(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    done = export_vllm(tuned(tmp_path, **settings), tmp_path / "out")
    assert done.kind == "merged"
    assert reason in " ".join(done.reasons)
    assert shlex.split(done.command)[2] == str((tmp_path / "out").resolve())
    assert "--dtype float32" in done.command
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("setting", "value"), [("modules_to_save", ["lm_head"]), ("bias", "all"), ("use_dora", True), ("r", 1024)]
)
def test_each_rule_finds_its_planted_fault(setting: str, value: object, lora: Path, tmp_path: Path) -> None:
    config = RunFolder(lora).read_config()
    assert reasons(lora / "adapter", config) == []
    settings = json.loads((lora / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter" / "adapter_model.safetensors")
    if setting == "r":
        tensors = {key: torch.zeros(1024, 1) if ".lora_A." in key else one for key, one in tensors.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, setting: value}))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert len(reasons(tmp_path, config)) == 1


def test_powers_of_two_are_unified_exactly() -> None:
    a, b = torch.randn(2, 5), torch.randn(7, 2)
    names = {side: f"base_model.model.m.{{}}.lora_{side}.weight" for side in "AB"}
    tensors = {names["A"].format(n): a for n in "pq"} | {names["B"].format(n): b for n in "pq"}
    settings = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"q": 16}}
    made, one, rounding = unified(tensors, settings)
    assert rounding == 0
    assert torch.equal(made[names["B"].format("q")] * (one["lora_alpha"] / one["r"]), b * 8)
    assert torch.equal(made[names["B"].format("p")] * (one["lora_alpha"] / one["r"]), b * 2)


def test_prompts_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FituneError, match="prompt"):
        export_vllm(tuned(tmp_path, method="prompt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_vllm_lacks_is_refused_with_those_that_it_has(tmp_path: Path) -> None:
    run = tuned(tmp_path, kind="chatglm", method="lora", lora={"rank": 2})
    with pytest.raises(ModelError) as caught:
        export_vllm(run, tmp_path / "out")
    assert "LlamaForCausalLM" in str(caught.value)


def test_the_command_line_prints_it(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["export", lora, "--to", "vllm", "--output", tmp_path / "out"]
    code, out, err = command([*arguments, "--json"], capsys, monkeypatch)
    assert code == 0, err
    assert json.loads(out)["command"] in " ".join(err.split())
    code, _, err = command(arguments, capsys, monkeypatch)
    assert code == 2
    done = fitune.export(lora, tmp_path / "whole", to="vllm", merged=True)
    assert isinstance(done, ExportedVllm)
    assert done.kind == "merged"
