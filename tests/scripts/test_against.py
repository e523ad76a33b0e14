"""The benchmark against other systems: a difference is caught, figures are those of the rounds, the drivers train."""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.commands.demo import bundled
from support.against import bench, module

ROOT = Path(__file__).parents[2]
against, results, meter = module("against"), module("against_results"), module("meter")


def made(losses: list[float], seconds: float, *, labels: int = 80, before: float = 1.0) -> dict[str, Any]:
    """What a process wrote: three steps of 100 tokens, each of so many seconds."""
    marks = [{"wall": 5 + n * seconds, "cpu": 2 * n * seconds} for n in range(4)]
    return {
        "marks": marks, "losses": losses, "norms": [1.0] * 3, "tokens": [100] * 3, "labels": [labels] * 3,
        "before": before, "resident_mib": 100 * seconds, "cuda": None, "versions": {"torch": "2"},
    }  # fmt: skip


def counted(saved: float) -> dict[str, Any]:
    marks = [{"wall": n, "cpu": n, "flops": 1500 * n, "processed": 130 * n, "saved": saved} for n in range(4)]
    return {**made([3.0, 2.0, 1.0], 1.0), "marks": marks}


RIGHT = [3.0, 2.5, 2.25]
WHERE = {"commit": "abc", "date": "2026-11-27", "threads": 2, "processor": "a CPU"}


def run(others: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A judged comparison of transformers, fitune and others."""
    row = {"ids": [1] * 100, "labels": [-100] * 20 + [1] * 80}
    rows = {"steps": [[row]] * 3, "parameters": 10, "trained": 1, "floors": [1000.0] * 3}
    setting = {"shape": "tiny", "precision": "fp32", "warm": 1, "steps": 3}
    there = {"transformers": [made(RIGHT, 4.0), made(RIGHT, 2.0)], "fitune": [made(RIGHT, 1.0), made(RIGHT, 1.0)]}
    systems = {name: {"name": name, "reference": "transformers"} for name in {**there, **others}}
    found = results.new(setting, WHERE, rows, systems)
    for name, rounds in {**there, **others}.items():
        for one in rounds:
            results.add(found, name, one, counting=False)
    found["rates"] = [{"fp32": 9000.0, "bf16": None}, {"fp32": 10_000.0, "bf16": None}]
    results.add(found, "fitune", counted(3 * 2**20), counting=True)
    results.judge(found)
    return found


# ---- parity ----


def test_the_same_losses_count() -> None:
    near = [loss + 0.9e-4 for loss in RIGHT]
    found = run({"near": [made(near, 1.0)]})["systems"]
    assert [one["counted"] for one in found.values()] == [True] * 3
    assert found["near"]["difference"] == pytest.approx(0.9e-4)
    assert found["transformers"]["difference"] == 0


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        ([made([3.0, 2.5 + 1.1e-4, 2.25], 1.0)], "the loss of step 2 differs by 0.00011"),
        ([made(RIGHT, 1.0), made([3.0, 2.5, 2.2], 1.0)], "the loss of step 3 differs by 0.05"),
        ([made([3.0, math.nan, 2.25], 1.0)], "the loss of step 2 differs by inf"),
        ([made([3.0, 2.5], 1.0)], "the loss of step 3 differs by inf"),
        ([made(RIGHT, 1.0, labels=79)], "labels of its steps: [79, 79, 79]; expected [80, 80, 80]"),
        ([], "it did not run"),
    ],
)
def test_a_planted_difference_does_not_count(planted: list[dict[str, Any]], why: str) -> None:
    found = run({"other": planted})
    assert not found["systems"]["other"]["counted"]
    assert found["systems"]["other"]["why"] == why
    line = next(line for line in results.lines({"runs": [found]}) if line.startswith("| other"))
    assert line.startswith(f"| other | not counted | {why} |")


def test_a_system_that_died_does_not_count_whatever_it_measured_before() -> None:
    found = run({"other": [made(RIGHT, 1.0)]})
    results.failed(found, "other", "exit code 1: killed")
    results.judge(found)
    assert found["systems"]["other"]["why"] == "exit code 1: killed"
    assert found["systems"]["fitune"]["counted"]


# ---- figures ----


def test_figures_are_medians_of_the_measured_steps() -> None:
    found = run({})
    plain, own = results.figures(found, "transformers"), results.figures(found, "fitune")
    assert plain["real"] == pytest.approx((25 + 50) / 2)  # tokens/s of the two rounds, without the warm step
    assert plain["label"] == pytest.approx(0.8 * plain["real"])
    assert plain["cpu"] == pytest.approx((12.5 + 25) / 2)
    assert plain["resident"] == 400
    assert "work" not in plain
    assert own["processed"] == pytest.approx(130)
    assert own["work"] == pytest.approx(1.5)
    assert own["saved"] == 3
    assert results.faster(found, "fitune", "transformers") == pytest.approx(3.0)  # 4 in one round, 2 in the other
    assert results.floor_speed(found) == pytest.approx(10_000 / 10)
    head, rule, first, second = results.lines({"runs": [found]})[2:6]
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert first.startswith("| transformers | 38 | 3.00x | 30 |  | 19 | 1.0 | 400 |")
    assert second.startswith("| fitune | 100 |  | 80 | 130 | 50 | 1.0 | 100 | 1.50 | 3 | 0.0e+00 |")


def test_memory_of_a_gpu_stands_beside_that_of_the_process() -> None:
    one = {**made(RIGHT, 1.0), "cuda": {"allocated": 7.0, "reserved": 9.0}}
    line = results.lines({"runs": [run({"other": [one]})]})[-1]
    assert "| 100 / 7 / 9 |" in line


def test_the_picture_has_a_bar_for_what_counts() -> None:
    drawn = results.picture({"runs": [run({"other": [made([1.0] * 3, 1.0)]})]})
    assert drawn.startswith('<svg xmlns="http://www.w3.org/2000/svg" ')
    assert re.findall(r'text-anchor="end">([\w-]+)<', drawn) == ["transformers", "fitune", "floor"]
    widths = [float(width) for width in re.findall(r'<rect x="170" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert widths[1] / widths[2] == pytest.approx(0.1, abs=1e-3)


def test_a_page_has_the_tables_between_its_marks() -> None:
    record = {"runs": [run({})]}
    text = f"# A\n\n{results.BEGIN}\nold\n{results.END}\n\nB\n"
    english, chinese = (results.page(text, record, language) for language in ("en", "zh"))
    assert english.startswith(f"# A\n\n{results.BEGIN}\n\n**tiny fp32**: 200 tokens a round")
    assert english.endswith(f" |\n\n{results.END}\n\nB\n")
    assert "old" not in english
    assert "| 真实 token/s |" in chinese
    assert results.page(english, record, "en") == english


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_documentation_shows_the_results(language: str) -> None:
    record = against.read(against.RESULTS)
    text = against.PAGES[language].read_text(encoding="utf-8")
    assert results.page(text, record, language) == text, "python benchmarks/against.py --pages"
    assert against.PICTURE.read_text(encoding="utf-8") == results.picture(record)
    record["runs"][0]["systems"]["fitune"]["rounds"][0]["wall"][-1] *= 2
    assert results.page(text, record, language) != text


def test_the_results_are_judged_as_the_benchmark_judges() -> None:
    for made in against.read(against.RESULTS)["runs"]:
        again = copy.deepcopy(made)
        results.judge(again)
        assert again == made
        assert made["systems"]["fitune"]["counted"]
        assert str(ROOT.parent) not in made["command"]


# ---- counting ----


def test_what_is_saved_for_backward_is_counted_by_storage_until_it_is_let_go() -> None:
    saved = meter.Saved()
    weight = torch.nn.Parameter(torch.ones(50, 50))
    saved.held = {weight.untyped_storage().data_ptr()}
    x = torch.ones(10, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        hidden = (x @ weight).exp()  # x for the weight's gradient; exp's own result, which is saved twice below
        loss = (hidden * hidden[:, :1]).sum()
    assert saved.now == saved.most == 2 * 10 * 50 * 4
    loss.backward()
    del loss, hidden
    assert saved.now == 0
    assert weight.grad is not None


@pytest.mark.parametrize("heads", [2, 1])
def test_attention_of_a_cpu_is_counted(heads: int) -> None:
    """As many heads of keys and values as of queries, or fewer."""
    q, k = torch.ones(1, 2, 8, 4, requires_grad=True), torch.ones(1, heads, 8, 4, requires_grad=True)
    from torch.utils.flop_counter import FlopCounterMode

    whole = 2 * 2 * 8 * 8 * 4 * 2  # two products of 8 x 8 x 4 in each of two heads
    for causal, share in ((False, 1), (True, 2)):
        with FlopCounterMode(display=False, custom_mapping=meter.attention_formulas()) as counter:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, k, is_causal=causal, enable_gqa=True)
            assert counter.get_total_flops() == whole // share
            out.sum().backward()
        assert counter.get_total_flops() == (whole + whole * 5 // 2) // share


def test_attention_of_a_gpu_with_fewer_heads_of_keys_is_counted_as_with_all() -> None:
    """torch's own formulas refuse it before torch 2.13."""
    formulas, aten = meter.attention_formulas(), torch.ops.aten
    q, many, few = (torch.empty(1, heads, 8, 4, device="meta") for heads in (8, 8, 2))
    whole = 2 * 2 * 8 * 8 * 4 * 8
    for keys in (many, few):
        assert formulas[aten._scaled_dot_product_flash_attention](q, keys, keys, out_val=None) == whole
        there = formulas[aten._scaled_dot_product_flash_attention_backward](q, q, keys, keys, q, q, out_val=None)
        assert there == whole * 5 // 2
    rows = [one.transpose(1, 2)[0] for one in (q, few, few)]
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    assert formulas[aten._flash_attention_forward](*rows, bounds, bounds, 8, 8, out_val=None) == whole


def test_rows_of_like_length_go_through_the_model_together() -> None:
    plain = module("train_transformers")
    rows = [{"ids": [1] * n, "labels": [1] * n} for n in (3, 1, 2)]
    assert plain.micro_batches(rows, None) == [rows]
    assert [[len(row["ids"]) for row in micro] for micro in plain.micro_batches(rows, 2)] == [[1, 2], [3]]
    batch = plain.padded(rows, "cpu")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 1, 1], [1, -100, -100], [1, 1, -100]]


# ---- the whole of it ----


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """fitune and plain transformers on a tiny model, in this process."""
    systems = [against.TABLE[name] for name in ("transformers", "transformers-sorted", "fitune")]
    args = argparse.Namespace(
        rounds=1, count=True, tokenizer=bundled() / "model", data=bundled() / "data" / "train.jsonl"
    )
    setting = against.Setting("tiny", "fp32", steps=2, warm=1, batch=4)
    known = [
        copy.deepcopy(so_far)
        for so_far in against.compare(bench(tmp_path_factory.mktemp("against")), setting, systems, args, WHERE)
    ]
    # what is written behind the first round, and behind the process that counts
    assert [one["systems"]["fitune"]["counts"] is not None for one in known] == [False, True]
    assert all(system["counted"] for system in known[0]["systems"].values())
    made: dict[str, Any] = known[-1]
    return made


def test_the_drivers_train_the_same(compared: dict[str, Any]) -> None:
    for name, system in compared["systems"].items():
        assert system["counted"], (name, system["why"])
        assert system["difference"] < 1e-4
        assert len(system["rounds"][0]["wall"]) == 2
        assert system["rounds"][0]["before"] > 0
    losses = compared["systems"]["transformers"]["rounds"][0]["losses"]
    assert losses[0] != losses[1]
    norms = [system["rounds"][0]["norms"] for system in compared["systems"].values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] == pytest.approx(norms[2], rel=1e-3)


def test_padding_is_seen_in_what_is_processed_and_computed(compared: dict[str, Any]) -> None:
    padded, by_length, flat = (results.figures(compared, name) for name in compared["systems"])
    assert padded["processed"] / padded["real"] > 1.01
    assert "processed" not in by_length  # its counting process failed, which takes nothing from its speed
    assert by_length["real"] > 0
    assert flat["processed"] / flat["real"] < 1.1
    assert padded["work"] > flat["work"] > 0.9
    assert padded["saved"] > 0


def test_another_learning_rate_is_a_difference(compared: dict[str, Any], tmp_path: Path) -> None:
    """The losses depend on what is trained: a system with twice the learning rate does not count."""
    other = copy.deepcopy(compared)
    rounds = other["systems"]["fitune"]["rounds"]
    name = next(tmp_path.parent.glob("against*/tiny-fp32-transformers/settings.json"))
    settings = json.loads(name.read_text(encoding="utf-8"))
    settings["lr"] = [2 * lr for lr in settings["lr"]]
    settings.pop("work")
    planted = bench(tmp_path).run("train_transformers", "transformers", {**settings, "count": False}, "planted")
    rounds[0]["losses"] = planted["losses"]
    results.judge(other)
    assert other["systems"]["fitune"]["why"].startswith("the loss of step 2 differs by")


@pytest.mark.parametrize(
    ("bf16", "why"),
    [(None, "this processor has no instructions for it"), (8.9e9, "a product is not faster in it here"), (9.1e9, None)],
)
def test_bf16_is_measured_where_its_products_are_faster(bf16: float | None, why: str | None) -> None:
    assert against.no_bf16({"fp32": 9e9, "bf16": bf16}) == why
