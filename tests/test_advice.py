"""Suggestions fit, no larger batch does, and what is advised is what the plans say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from fitune import advice, cli
from fitune.config import build
from fitune.console import Watcher
from fitune.errors import ConfigError
from fitune.memory import device, flops, plan, search
from fitune.planning import ask, look
from fitune.training import train

METHODS = ["full", "lora", "adapter", "freeze", "prefix", "prompt", "tail"]


def shape_file(folder: Path, seed: int) -> Path:
    """The config.json of a model of some size."""
    pick = random.Random(seed)
    width = pick.choice([128, 192, 256])
    values = {
        "model_type": pick.choice(["llama", "qwen2", "mistral"]),
        "vocab_size": pick.choice([2000, 8000]),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": pick.choice([4, 6, 9]),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    path = folder / f"shape-{seed}" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    return path


def job(folder: Path, seed: int) -> dict[str, Any]:
    """A model, data, a budget and a method, drawn by the seed."""
    pick = random.Random(1000 + seed)
    return {
        "model": str(shape_file(folder, seed)),
        "data": [str(tiny.write_rows(folder / f"rows-{seed}.jsonl", pick.choice([40, 90])))],
        "gpu": f"{pick.choice([860, 900, 1000])}MiB",
        "method": METHODS[seed % len(METHODS)],
    }


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 1 else [pytest.mark.full]) for n in range(30)])
def test_a_suggestion_fits_and_no_larger_batch_does(seed: int, tmp_path: Path) -> None:
    wanted = job(tmp_path, seed)
    settings = {k: v for k, v in wanted.items() if k not in ("model", "data", "gpu")}
    asked = ask(wanted["model"], data=wanted["data"], gpu=wanted["gpu"], settings=settings)
    rows = look(asked, None, Watcher())
    try:
        found = advice.advise(shown=1, **wanted)
    except ConfigError as error:
        told = str(error)
    else:
        told = ""
    if told:  # then not even one row fits with every saver, by exact plan
        assert "nothing fits" in told
        quant = "none" if wanted["method"] in ("full", "freeze") else "nf4"
        least = {"checkpointing": True, "quant": {"name": quant}, "precision": "bf16"}
        assert not advice.exact(advice.with_settings(asked, least), rows, 1).fits
        return
    best = found.suggestions[0]
    exactly = advice.with_settings(asked, best.settings)
    made = advice.exact(exactly, rows, best.batch_size)
    assert made.fits
    assert made.needed == best.plan.needed
    if best.batch_size < len(rows.samples):
        assert not advice.exact(exactly, rows, best.batch_size + 1).fits
    assert best.use <= best.batch_size
    machine = next(one for one in found.advice if one.about == "machine")
    assert machine.figures["needed"] == best.plan.needed
    assert f"--batch-size {best.use}" in best.flags


def test_savers_are_the_differences_of_plans(tmp_path: Path) -> None:
    model, data = str(shape_file(tmp_path, 1)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 60))]
    settings = {"method": "lora", "batch_size": 8}
    asked = ask(model, data=data, gpu="24GB", settings=settings)
    rows = look(asked, None, Watcher())
    found = {one.flag: one for one in advice.savers(asked, rows)}
    now = advice.exact(asked, rows).needed
    with_it = advice.exact(advice.with_settings(asked, {"checkpointing": True}), rows).needed
    assert found["--checkpointing"].saves == now - with_it
    assert found["--checkpointing"].work == pytest.approx(1.5, abs=0.1)  # LoRA: a forward pass more of three
    assert found["--batch-size 4 --accumulation 2"].work == 1
    assert [one.worth for one in found.values()] == sorted((one.worth for one in found.values()), reverse=True)


def test_a_miss_says_what_would_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(shape_file(tmp_path, 2)), str(tiny.write_rows(tmp_path / "rows.jsonl", 60))
    with pytest.raises(SystemExit) as done:
        cli.app(["plan", model, "--data", data, "--gpu", "745MiB", "--method", "lora", "--json"])
    assert done.value.code in (0, None)
    seen = json.loads(capsys.readouterr().out)
    assert seen["fits"] is False
    assert seen["helps"].startswith("misses by ")
    assert "--checkpointing` saves" in seen["helps"]


@pytest.mark.full
def test_at_least_two_hundred_combinations_are_looked_at() -> None:
    shape = build_shape(layers=12)
    lengths = np.random.default_rng(0).integers(20, 400, 300)
    found = search.search({}, shape, lengths, 0.9, device.find("6GB"), [384, 256])
    assert found.combinations >= 200
    ways = {one.name for one in found.candidates}
    assert {"full", "lora", "lora on nf4", "lora on int8", "lora, checkpointing", "freeze"} <= ways
    by_name = {(one.name, one.max_length): one for one in found.candidates}
    assert by_name["lora, checkpointing", 384].batch_size > by_name["lora", 384].batch_size
    assert by_name["lora on nf4", 384].needed <= device.find("6GB").budget


def build_shape(layers: int) -> Any:
    from fitune.model import shape_of

    return shape_of(
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
            "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        }
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_arithmetic_over_small_models_is_near_the_plan_of_the_whole(method: str) -> None:
    shape = build_shape(layers=12)
    config = build({"model": "-", "data": ["-"], "method": method, "precision": "bf16"})
    line = search._line(config, shape, "cuda")
    assert line is not None
    from fitune.memory import steps

    batch = steps.made_up(4, 500, shape.vocab_size)
    work = plan.Work(config, shape, [[steps.made_up(1, 9, shape.vocab_size)], [batch]])
    tracer = plan.traced(plan.without_values(work), work, "cuda")
    exactly = plan.tops_of_steps(tracer)[-1]
    for phase, (fixed, slope) in line.phases.items():
        assert fixed + slope * 2000 == pytest.approx(exactly[phase], rel=0.04), phase
    counted = flops.counts(plan.without_values(work), config)
    for name in ("body", "trainable", "share", "attention"):
        assert getattr(line.counts, name) == pytest.approx(getattr(counted, name), rel=1e-6), name


def test_operations_are_those_of_the_formulas() -> None:
    shape = build_shape(layers=6)
    lengths = np.array([100, 50, 10])

    def each(method: str, **how: Any) -> tuple[flops.Counts, float]:
        config = build({"model": "-", "data": ["-"], "method": method, "precision": "bf16", **how})
        counted = flops.counts(plan.without_values(plan.Work(config, shape, [])), config)
        return counted, flops.per_token(counted, lengths, 0.8, checkpointing=config.checkpointing)

    a = 2 * (lengths**2).sum() / lengths.sum() * 1024 * 6
    counted, full = each("full")
    p, h = counted.body, counted.head
    assert p == 6 * (1024 * 1024 * 2 + 2 * 1024 * 256 + 3 * 1024 * 2816)
    assert full == pytest.approx(6 * (p + 0.8 * h) + 3 * a, rel=1e-9)
    counted, lora = each("lora")
    assert lora == pytest.approx(4 * (p + 0.8 * h) + 6 * counted.new + 3 * a, rel=1e-9)
    _, again = each("lora", checkpointing=True)
    assert again - lora == pytest.approx(2 * p + a, rel=1e-9)
    counted, freeze = each("freeze")
    f = 2 / 6
    assert counted.share == pytest.approx(f)
    assert freeze == pytest.approx(2 * p + 4 * f * p + 4 * 0.8 * h + a * (1 + 2 * f), rel=1e-9)


def test_train_fit_takes_the_suggestion_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    run = tmp_path / "run"
    common = ["--model", str(model), "--data", str(data), "--method", "lora", "--max-length", "64", "--max-steps", "2"]
    with pytest.raises(SystemExit) as done:
        cli.app(["train", *common, "--fit", "--output", str(run), "--json"])
    assert done.value.code in (0, None)
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert "checkpointing" in (run / "config.yaml").read_text()


def test_fit_for_another_gpu_is_planned_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    run = tmp_path / "run"
    common = ["--model", str(model), "--data", str(data), "--method", "lora", "--max-length", "64"]
    with pytest.raises(SystemExit) as done:
        cli.app(["train", *common, "--fit", "--gpu", "8GB", "--output", str(run), "--json"])
    assert done.value.code in (0, None)
    told = json.loads(capsys.readouterr().out)
    assert told["suggestions"][0]["plan"]["fits"]
    assert not run.exists()


def test_gpu_without_fit_is_refused(tmp_path: Path) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 8)
    with pytest.raises(ConfigError, match="--gpu without --fit"):
        cli.app(["train", "--model", str(model), "--data", str(data), "--gpu", "8GB"], exit_on_error=False)


def test_flags_are_what_one_types() -> None:
    told = advice.flags(
        {"method": "lora", "lora": {"targets": "all-linear"}, "quant": {"name": "nf4"}, "checkpointing": True,
         "max_grad_norm": 0.0, "optimizer_in_backward": False}
    )  # fmt: skip
    assert told == "--method lora --lora.targets all-linear --quant nf4 --checkpointing --max-grad-norm 0"
    assert advice.flags({"quant": {"name": "none"}}) == ""


@pytest.mark.full
def test_flags_train(tmp_path: Path) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    found = advice.advise(str(model), data=[str(data)], gpu="4GB", shown=1, method="lora", max_length=64)
    best = found.suggestions[0]
    config = build(
        {**best.settings, "precision": "fp32", "batch_size": best.use, "model": str(model), "data": [str(data)],
         "output": str(tmp_path / "run"), "max_steps": 1}
    )  # fmt: skip
    assert train(config).steps == 1
