"""Suggestions fit, no larger batch does, and what is advised is what the plans say."""

from __future__ import annotations

import gc
import json
import random
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fitune
from fitune.cli import flags
from fitune.cli import main as cli
from fitune.commands import advise as advice
from fitune.commands import exact
from fitune.commands import plan as planning
from fitune.commands.exact import Exact
from fitune.commands.planned_rows import rows_of, work_of
from fitune.commands.request import to_plan
from fitune.commands.savers import savers, smaller_batches, what_helps
from fitune.commands.train import train
from fitune.core.as_flags import flags as as_flags
from fitune.core.blocks import chosen, named
from fitune.core.config import build, merge, parse_assignments
from fitune.core.errors import ConfigError, FituneError
from fitune.core.events import Silent
from fitune.core.plan import Moment, Plan, size_text
from fitune.core.records import Sample
from fitune.data.batches import Loader, rounded
from fitune.memory import device, flops, plan, search, steps
from fitune.memory.advice import Suggestion
from fitune.memory.usage import tops_of_steps
from fitune.models.kernels.target import AMPERE
from support import tiny
from support.gpu_benchmark import gpu

METHODS = ["full", "lora", "adapter", "freeze", "prefix", "prompt", "tail", ""]  # the last: nothing is given


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
    found = {
        "model": str(shape_file(folder, seed)),
        "data": [str(tiny.write_rows(folder / f"rows-{seed}.jsonl", pick.choice([40, 90])))],
        "gpu": f"{pick.choice([860, 900, 1000])}MiB",
        "batch_size": pick.choice([4, 8, 24]),
    }
    return {**found, "method": METHODS[seed % len(METHODS)]} if METHODS[seed % len(METHODS)] else found


def exact_of(wanted: dict[str, Any]) -> Exact:
    """Exact plans of a job."""
    given = ("model", "data", "gpu")
    settings = {k: v for k, v in wanted.items() if k not in given}
    asked = to_plan(wanted["model"], data=wanted["data"], gpu=wanted["gpu"], settings=settings)
    return Exact(asked, rows_of(asked, None, Silent()), settings)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 1 else [pytest.mark.full]) for n in range(30)])
def test_a_suggestion_fits_and_no_larger_batch_does(seed: int, tmp_path: Path) -> None:
    wanted = job(tmp_path, seed)
    exactly = exact_of(wanted)
    try:
        found = advice.advise(only_best=True, **wanted)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:  # then not even one row fits with every saver, by exact plan
        assert "nothing fits" in refusal
        quant = "none" if wanted.get("method") in ("full", "freeze") else "nf4"
        least = {"checkpointing": True, "quant": {"name": quant}, "precision": "bf16", "batch_size": 1}
        assert not exactly.plan(least).fits
        return
    best = found.suggestions[0]
    made = exactly.plan(best.settings)
    assert made.fits
    assert made.needed == best.plan.needed
    largest = exactly.plan({**best.settings, "batch_size": best.largest_batch})
    assert largest.fits
    assert largest.needed == best.needed_at_largest
    rows = len(exactly.rows.samples)
    for more in sorted(larger(exactly, best))[:2]:
        assert not exactly.plan({**best.settings, "batch_size": more}).fits
    asked, step = min(wanted["batch_size"], rows), best.micro_batch * best.accumulation
    assert step == asked or (step < asked and best.settings.get("optimizer_in_backward"))
    assert best.micro_batch <= best.largest_batch
    machine = next(one for one in found.advice if one.about == "machine")
    assert machine.figures["needed"] == best.plan.needed
    assert (f"--batch-size {best.micro_batch}" in best.flags) == (best.micro_batch != wanted["batch_size"])
    assert f"--batch-size {best.micro_batch}" in found.command


ON_A_CARD = [pytest.param(seed, marks=pytest.mark.full if seed > 2 else ()) for seed in range(10)]


@pytest.mark.cuda
@pytest.mark.parametrize("seed", ON_A_CARD)
def test_a_suggestion_runs_on_a_card_of_that_size(seed: int, tmp_path: Path) -> None:
    """A whole epoch with the largest batch, random weights, and torch's allocator held to the budget less what the plan
    counts beside the tensors."""
    wanted = {**job(tmp_path, seed), "gpu": "1000MiB"}
    exactly = exact_of(wanted)
    best = advice.advise(only_best=True, **wanted).suggestions[0]
    asked = exactly.with_settings({**best.settings, "batch_size": best.largest_batch})
    work = work_of(asked, exactly.rows)
    loader = Loader(exactly.rows.samples, best.largest_batch, best.accumulation, asked.config.seed)
    work = replace(work, steps=[micro for _, micro in loader.steps(0, loader.total_steps(1))])
    limit = (asked.where.budget or 0) - sum(best.plan.outside.values())
    gc.collect()
    torch.cuda.empty_cache()
    try:
        _, died = gpu.measure(work, gpu.probe(), limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert died is None


def larger(exactly: Exact, best: Suggestion) -> set[int]:
    """The next larger batch, and of some larger ones that whose largest micro-batch has the fewest tokens."""
    near = range(best.largest_batch + 1, min(len(exactly.rows.samples), 2 * best.largest_batch + 4) + 1)
    fewest = min(near, key=lambda batch: exactly.largest(batch, best.max_length), default=None)
    return {*near[:1]} | ({fewest} if fewest is not None else set())


def test_savers_are_the_differences_of_plans(tmp_path: Path) -> None:
    model, data = str(shape_file(tmp_path, 1)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 60))]
    exactly = exact_of({"model": model, "data": data, "gpu": "24GB", "method": "lora", "batch_size": 8})
    found = {one.flag: one for one in savers(exactly, {})}
    now = exactly.plan({}).needed
    assert found["--checkpointing"].saves == now - exactly.plan({"checkpointing": True}).needed
    assert found["--checkpointing"].time == pytest.approx(1.5, abs=0.1)  # LoRA: a forward pass more of three
    assert found["--batch-size 4 --accumulation 2"].time == 1
    slower = exactly.time({"quant": {"name": "nf4"}}) / exactly.time({})
    assert slower == pytest.approx(flops.REACHED / flops.REACHED_QUANTIZED, abs=1e-3)
    assert [one.worth for one in found.values()] == sorted((one.worth for one in found.values()), reverse=True)


@pytest.mark.parametrize("padded", [False, True])
def test_the_largest_micro_batch_is_that_of_the_loader(padded: bool) -> None:
    config = build({"model": "-", "data": ["-"], "epochs": 2, "seed": 3})
    lengths = np.random.default_rng(0).integers(2, 300, 101)
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    largest = steps.Largest(samples, config, padded=padded)
    for rows in (1, 7, 20, 101, 200):
        loader = Loader(samples, rows, 1, 3, None, padded)
        batches = [batch for _, step in loader.steps(0, loader.total_steps(2)) for batch in step]
        sizes = [np.diff(batch.bounds) for batch in batches]
        # with the filler that rounds tokens, or the width of padded rows, up
        whole = [rounded(int(size.max())) * len(size) if padded else rounded(int(size.sum())) for size in sizes]
        assert largest(rows, 1000) == max(whole)
        assert largest(rows, 50) <= rounded(50) * rows


def test_a_miss_says_what_would_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(shape_file(tmp_path, 2)), str(tiny.write_rows(tmp_path / "rows.jsonl", 60))
    with pytest.raises(SystemExit) as done:
        cli.app(["plan", model, "--data", data, "--gpu", "818MiB", "--method", "lora", "--json"])
    assert done.value.code in (0, None)
    seen = json.loads(capsys.readouterr().out)
    assert seen["fits"] is False
    helps = seen["helps"]
    assert helps["missing"] == seen["needed"] - seen["budget"]
    assert helps["text"].startswith("misses by ")
    assert "--checkpointing` saves" in helps["text"]
    assert helps["together"]["needed"] <= seen["budget"]  # and typed, it fits
    words = ["--method", "lora", *helps["together"]["flags"].split()]
    with pytest.raises(SystemExit):
        cli.app(["plan", model, "--data", data, "--gpu", "818MiB", "--json", *words])
    again = json.loads(capsys.readouterr().out)
    assert again["fits"] is True
    assert again["needed"] == helps["together"]["needed"]


@pytest.mark.full
def test_of_what_is_enough_the_mildest_is_reported(tmp_path: Path) -> None:
    """Where fewer rows at once do, no other setting is touched; and as many of them as fit."""
    model, data = str(shape_file(tmp_path, 2)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 60))]
    settings: dict[str, Any] = {"method": "lora", "batch_size": 48}
    exactly = exact_of({"model": model, "data": data, "gpu": "818MiB", **settings})
    assert not exactly.plan({}).fits
    helps = what_helps(planning.answer(model, data=data, gpu="818MiB", **settings))
    assert helps.together is not None
    change = helps.together["settings"]
    assert set(change) == {"batch_size", "accumulation"}
    assert change["batch_size"] * change["accumulation"] == 48
    assert exactly.plan(change).fits
    more = next(rows for rows in range(change["batch_size"] + 1, 49) if 48 % rows == 0)
    assert not exactly.plan({"batch_size": more, "accumulation": 48 // more}).fits


def test_a_budget_below_all_is_reported_at_once(tmp_path: Path) -> None:
    model, data = str(shape_file(tmp_path, 2)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 8))]
    with pytest.raises(ConfigError, match=r"700 MiB .* is less than what lies beside any model") as caught:
        advice.advise(model, data=data, gpu="700MiB")
    assert "CUDA context 725 MiB, a default" in str(caught.value)
    helps = what_helps(planning.answer(model, data=data, gpu="700MiB", method="lora"))
    assert "is less than what lies beside any model" in helps.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "bitfit"}, "no bias terms"),
        ({"lora": {"targets": ["nowhere"]}}, "'nowhere' matches no linear layer"),
        ({"method": "full", "quant": "nf4"}, "full"),
    ],
    ids=str,
)
def test_where_no_way_agrees_the_reason_is_reported(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And not that memory is short, which has nothing to do with it."""
    model, data = str(shape_file(tmp_path, 2)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 8))]
    with pytest.raises(FituneError, match=message) as caught:
        advice.advise(model, data=data, gpu="8GB", **given)
    assert "nothing fits" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"lora": {"targets": "q_proj"}}, ["lora"]),
        ({"lora": {"targets": "all-linear"}}, ["lora, all linear layers"]),
        ({"method": "full", "optimizer": "adamw-8bit"}, ["full"]),
        ({"method": "peft:VERA"}, ["peft:VERA"]),
        (
            {"checkpointing": 2, "lora": {"rank": 4}, "quant": {"name": "int8"}},
            ["lora, all linear layers on int8, checkpointing", "lora on int8, checkpointing"],
        ),
    ],
    ids=str,
)
def test_a_way_has_the_name_of_what_it_does(given: dict[str, Any], names: list[str]) -> None:
    """Settings that are given decide which of two names is right, and none is looked at under both."""
    where, shape = device.find("8GB"), build_shape(layers=2)
    found = list(search._ways({"quant": {"name": "none"}, "checkpointing": False, **given}, shape, where))
    assert [way.name for way in found] == names


@pytest.mark.full
def test_what_an_exact_plan_refutes_is_not_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = str(shape_file(tmp_path, 3)), [str(tiny.write_rows(tmp_path / "rows.jsonl", 8))]
    real, refused = advice.settle, list[str]()

    def settle(exactly: Exact, candidate: search.Candidate) -> Suggestion | None:
        if not refused:
            refused.append(candidate.name)
            return None
        return real(exactly, candidate)

    monkeypatch.setattr(advice, "settle", settle)
    found = advice.advise(model, data=data, gpu="8GB", only_best=True, quant="nf4", max_length=64)
    assert refused[0] not in [one.name for one in found.candidates]
    assert found.suggestions[0].name != refused[0]


@pytest.mark.full
def test_where_nothing_is_enough_that_is_reported(tmp_path: Path) -> None:
    model, data = str(shape_file(tmp_path, 2)), str(tiny.write_rows(tmp_path / "rows.jsonl", 60))
    helps = what_helps(planning.answer(model, data=[data], gpu="745MiB", method="lora"))
    assert helps.together is None
    assert helps.text.endswith("fitune plan looks through every way")


@pytest.mark.full
def test_at_least_two_hundred_combinations_are_looked_at() -> None:
    shape = build_shape(layers=12)
    lengths = np.random.default_rng(0).integers(20, 400, 300)
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]
    rows = steps.Largest(samples, build({"model": "-", "data": ["-"]}), padded=False)
    found, without = (
        search.search(given, shape, rows, 0.9, device.find("6GB"), [384, 256])
        for given in ({}, {"checkpointing": False})
    )
    assert found.combinations >= 200
    ways = {one.name for one in found.candidates}
    assert {"full", "lora", "lora on nf4", "lora on int8", "freeze"} <= ways
    by_name, kept = ({(one.name, one.max_length): one for one in each.candidates} for each in (found, without))
    assert by_name["lora", 384].batch_size > kept["lora", 384].batch_size  # blocks are recomputed where that fits more
    budget = device.find("6GB").budget
    assert budget is not None
    assert by_name["lora on nf4", 384].needed <= budget


def build_shape(layers: int) -> Any:
    from fitune.models.configs import config_of

    return config_of(
        {
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
            "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4,
        }
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_arithmetic_over_small_models_is_near_the_plan_of_the_whole(method: str) -> None:
    shape = build_shape(layers=12)
    config = build({"model": "-", "data": ["-"], "method": method, "precision": "bf16"})
    line = search._line(config, shape, AMPERE)
    assert line is not None
    batch = steps.made_up(4, 500, shape.vocab_size)
    work = plan.Work(config, shape, [[steps.made_up(1, 9, shape.vocab_size)], [batch]])
    tracer = plan.traced(work, AMPERE)
    exactly = tops_of_steps(tracer)[-1]
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
        q = 1024 * 1024 * 2 + 3 * 1024 * 2816  # the last block's layers that work on label rows alone
        r = counted.new_by_rows
        assert counted.body_by_rows == q
        again = 6 if config.checkpointing is True else 4  # it is computed once more, where all blocks are
        saved = {"full": 6 * q, "lora": again * q + (again + 2) * r, "freeze": 6 * q}[method]
        alike = replace(counted, body_by_rows=0.0, trained_by_rows=0.0, new_by_rows=0.0)
        by_rows, found = (
            flops.per_token(one, lengths, 0.8, checkpointing=config.checkpointing) for one in (counted, alike)
        )
        assert by_rows == pytest.approx(found - 0.2 * saved, rel=1e-9)
        return alike, found

    a = 2 * (lengths**2).sum() / lengths.sum() * 1024 * 6
    counted, full = each("full")
    p, h = counted.body, counted.head
    assert p == 6 * (1024 * 1024 * 2 + 2 * 1024 * 256 + 3 * 1024 * 2816)
    assert full == pytest.approx(6 * (p + 0.8 * h) + 3 * a, rel=1e-9)
    counted, lora = each("lora")
    assert lora == pytest.approx(4 * (p + 0.8 * h) + 6 * counted.new + 3 * a, rel=1e-9)
    _, again = each("lora", checkpointing=True)
    assert again - lora == pytest.approx(2 * (p + counted.new) + a, rel=1e-9)
    _, half = each("lora", checkpointing="0-2")
    assert half - lora == pytest.approx((again - lora) / 2, rel=1e-9)
    counted, freeze = each("freeze")
    f = 2 / 6
    assert counted.share == pytest.approx(f)
    assert freeze == pytest.approx(2 * p + 4 * f * p + 4 * 0.8 * h + a * (1 + 2 * f), rel=1e-9)
    _, again = each("freeze", checkpointing="0-4")  # of which the backward pass goes through one
    assert again - freeze == pytest.approx((2 * p + a) / 6, rel=1e-9)


def test_train_fit_takes_the_suggestion_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    run = tmp_path / "run"
    common = ["--model", str(model), "--data", str(data), "--method", "lora", "--max-length", "64", "--max-steps", "2"]
    common += ["--quant", "none"]  # fewer ways to look through
    with pytest.raises(SystemExit) as done:
        cli.app(["train", *common, "--fit", "--output", str(run), "--json"])
    assert done.value.code in (0, None)
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["steps"] == 2
    assert "checkpointing" in (run / "config.yaml").read_text()
    # one predicted figure: in the table, in the reason, before the run, in its folder and in its result
    planned = json.loads((run / "plan.json").read_text())
    assert result["expected_memory_mib"] == planned["needed"] / 2**20
    text = " ".join(shown.err.split())
    assert text.count(size_text(planned["needed"])) >= 3
    assert f"needs {size_text(planned['needed'])} of" in text


def test_rows_of_a_step_stay_what_was_asked() -> None:
    assert exact.parts(8, 3) == [2, 1]  # and not 3 x 3 = 9
    assert exact.parts(8, 8) == [8, 4, 2, 1]
    assert exact.parts(7, 5) == [1]
    assert exact.parts(7, 5, every=True) == [5, 4, 3, 2, 1]  # one micro-batch a step: the nearest below
    for asked in range(1, 40):
        config = build({"model": "m", "data": ["d"], "batch_size": asked})
        for most in range(1, asked):
            less: dict[str, Any] = smaller_batches(config, most)
            assert less["batch_size"] * less["accumulation"] == asked
            assert less["batch_size"] <= most


def test_a_result_of_the_bundled_model_is_headed_as_that(tmp_path: Path) -> None:
    from rich.console import Console

    from fitune.views import advice as adviceview

    model, data = str(shape_file(tmp_path, 3)), str(tiny.write_rows(tmp_path / "rows.jsonl", 24))
    found = advice.advise(
        model, data=[data], gpu="8GB", method="lora", only_best=True, quant="none", checkpointing=True
    )
    values: dict[str, Any] = found.as_dict()
    for one in (*values["suggestions"], *values["candidates"]):
        assert 0.5 < one["result_of_bundled_2m_model"] <= 1
        assert "quality" not in one
    console = Console(width=80, record=True)
    adviceview.show(found, console)
    shown = " ".join(console.export_text().split())
    for text in (shown, " ".join(adviceview.page(found).split())):
        assert "2M model" in text
        assert "a result of the bundled model of 2 million parameters, not of yours" in text


def test_fit_for_another_gpu_is_planned_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    run = tmp_path / "run"
    common = ["--model", str(model), "--data", str(data), "--method", "lora", "--max-length", "64"]
    common += ["--quant", "none", "--checkpointing"]  # fewer ways to look through
    with pytest.raises(SystemExit) as done:
        cli.app(["train", *common, "--fit", "--gpu", "8GB", "--output", str(run), "--json"])
    assert done.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["suggestions"][0]["plan"]["fits"]
    assert not run.exists()


def test_what_fits_is_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal, as JSON and as a page: the same figures."""
    model, data = str(shape_file(tmp_path, 3)), str(tiny.write_rows(tmp_path / "rows.jsonl", 24))
    page = tmp_path / "fits.html"
    common = ["plan", model, "--data", data, "--gpu", "900MiB", "--json", "--html", str(page)]
    fewer = ["--quant", "nf4", "--checkpointing", "--optimizer", "adamw-8bit", "--loss-rows", "64"]  # ways and savers
    with pytest.raises(SystemExit) as done:
        cli.app([*common, *fewer])
    assert done.value.code in (0, None)
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    best = found["suggestions"][0]
    assert set(shlex.split(best["flags"])) <= set(shlex.split(found["command"]))
    assert best["micro_batch"] * best["accumulation"] >= 8
    text = page.read_text(encoding="utf-8")
    for part in (
        best["name"],
        size_text(best["plan"]["needed"]),
        "budget 900.0 MiB",
        "<svg",
        found["advice"][0]["about"],
    ):
        assert part in text, part
    for part in (best["name"].split(",")[0], "what else fits, by arithmetic", found["command"].split(" --method")[0]):
        assert part in shown.err
    assert "an epoch" not in shown.err.partition("memory savers")[0]  # of a size nobody knows how fast it is
    for part in ("http://", "https://", "<script src"):
        assert part not in text.replace("http://www.w3.org/2000/svg", "")


def test_a_search_goes_by_rows_and_not_by_tokens(tmp_path: Path) -> None:
    data = [str(tiny.write_rows(tmp_path / "rows.jsonl", 8))]
    with pytest.raises(ConfigError, match="batch_tokens beside a search"):
        advice.advise(str(shape_file(tmp_path, 3)), data=data, gpu="8GB", batch_tokens=512)


def test_gpu_without_fit_is_refused(tmp_path: Path) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 8)
    with pytest.raises(ConfigError, match="--gpu without --fit"):
        cli.app(["train", "--model", str(model), "--data", str(data), "--gpu", "8GB"], exit_on_error=False)


TYPED: list[dict[str, Any]] = [
    {"method": "lora", "lora": {"targets": "all-linear", "dora": True, "rank": 4}, "quant": "nf4"},
    {"lora": {"targets": ["q_proj", "v_proj"], "ranks": {"q_proj": 16}}, "checkpointing": True, "max_grad_norm": 0.0},
    {"quant": {"name": "nf4", "double": False, "skip": ["lm_head", "a b"]}, "lr": 0.000123456789, "seed": 7},
    {"method": "prompt", "prompt": {"init": "text", "text": "it's a 'story' of $5"}, "max_length": "auto"},
    {"eval_data": ["my data/s m.json"], "take": [50], "map": {"q": "prompt"}, "fill": {"name": "Ada"}},
    {"checkpointing": False, "optimizer_in_backward": False, "new_tokens": ["<a>", "<b c>"], "precision": "bf16"},
    {"method": "peft:VERA", "peft": {"r": 4}, "checkpointing": 2, "val_share": 0.1},
]


@pytest.mark.parametrize("values", TYPED, ids=str)
def test_flags_typed_in_a_shell_are_the_same_settings(values: dict[str, Any]) -> None:
    words = ["train", "--model", "m", "--data", "d", *shlex.split(as_flags(values))]
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    assigned = parse_assignments(bound.arguments.get("set_") or [])
    assert build(merge(assigned, flags.typed(bound.arguments["flags"]))) == build(
        {"model": "m", "data": ["d"], **values}
    )


@pytest.mark.full
def test_flags_train(tmp_path: Path) -> None:
    model, data = tiny.save("llama", tmp_path / "model"), tiny.write_rows(tmp_path / "rows.jsonl", 24)
    found = advice.advise(str(model), data=[str(data)], gpu="4GB", method="lora", max_length=64)
    best = found.suggestions[0]
    config = build(
        {**best.settings, "precision": "fp32", "model": str(model), "data": [str(data)],
         "output": str(tmp_path / "run"), "max_steps": 1}
    )  # fmt: skip
    assert train(config).steps == 1


# ---- fewer rows, or blocks that are recomputed ----


class Made:
    """Exact plans of a model of 10 blocks that are made up: each row takes 10 bytes in each of them, or 1."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def plan(self, settings: Mapping[str, Any]) -> Plan:
        rows, how = settings["batch_size"], settings["checkpointing"]
        every = range(11) if how == "auto" else [len(chosen(how, 10))]
        again = next((n for n in every if self._bytes(rows, n) <= self.budget), every[-1])
        moment = Moment("loss", 0, {})
        return Plan(
            "m", "lora", "bf16", "none", "cuda", None, "trace", "", 0, 0, None, 0, 0, [], moment, [], [], 0, None, None,
            None, {}, self._bytes(rows, again), self.budget, {}, blocks=10, recomputed=[*range(again)],
        )  # fmt: skip

    def _bytes(self, rows: int, again: int) -> int:
        return rows * (100 - 9 * again)

    def time(self, settings: Mapping[str, Any]) -> float:
        return 10 + 0.5 * len(chosen(settings["checkpointing"], 10))


@pytest.mark.parametrize(
    ("budget", "enough", "rows", "again"),
    [
        (800, None, 8, False),  # all fits
        (400, None, 4, False),  # fewer rows cost nothing
        (400, 4, 4, False),
        (400, 8, 8, "0-5"),  # but with half of them a product takes as long as with all
        (210, 8, 8, "0-8"),
        (99, None, 1, "0-0"),  # no row fits without: of one row the fewest blocks
        (20, 8, 2, "0-9"),
        (9, None, None, None),  # and none at all
    ],
)
def test_the_cheapest_of_fewer_rows_and_recomputed_blocks_is_taken(
    budget: int, enough: int | None, rows: int | None, again: Any
) -> None:
    candidate = SimpleNamespace(settings={"checkpointing": "auto"}, enough=enough)
    sizes = {n: {"checkpointing": "auto", "batch_size": n} for n in (8, 4, 2, 1)}
    found = advice._fitting(Made(budget), candidate, sizes)  # type: ignore[arg-type]  # stand-ins
    if rows is None:
        assert found is None
        return
    assert found is not None
    settings, made = found
    assert (settings["batch_size"], settings["checkpointing"]) == (rows, again)
    assert made.fits


def test_settings_that_are_given_are_not_left_to_a_plan() -> None:
    candidate = SimpleNamespace(settings={"checkpointing": True}, enough=None)
    found = advice._fitting(Made(81), candidate, {8: {"checkpointing": True, "batch_size": 8}})  # type: ignore[arg-type]  # stand-ins
    assert found is not None
    assert found[0]["checkpointing"] is True


@pytest.mark.full  # test_recompute has the plans
def test_a_fit_that_recomputes_names_its_blocks(tmp_path: Path) -> None:
    """And typed, the command has the plan that was shown."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"instruction": "Tell", "output": "some more text " * 400}) + "\n") * 4)
    model, data = str(shape_file(tmp_path, 1)), [str(rows)]
    wanted: dict[str, Any] = {"method": "lora", "quant": "none", "batch_size": 1, "max_length": 1024}
    exactly = exact_of({"model": model, "data": data, "gpu": "24GB", **wanted})
    none, every = (exactly.plan({"checkpointing": how}) for how in (False, True))
    budget = f"{(none.needed + every.needed) // 2 // 2**20}MiB"
    best = advice.advise(model, data=data, gpu=budget, only_best=True, **wanted).suggestions[0]
    assert best.plan.fits
    assert 0 < len(best.plan.recomputed) < best.plan.blocks
    assert best.settings["checkpointing"] == named(best.plan.recomputed)
    assert f"--checkpointing {named(best.plan.recomputed)}" in best.flags
    typed = fitune.plan(model, data=data, gpu=budget, **{**wanted, **best.settings})
    assert typed.needed == best.plan.needed
    fewer = named(best.plan.recomputed[:-1])
    assert not fitune.plan(model, data=data, gpu=budget, **{**wanted, **best.settings, "checkpointing": fewer}).fits
