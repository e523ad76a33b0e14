"""The benchmark of a GPU's memory, as far as that can be tested without one: its models, its choices, its counting."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitune.core.config import build
from fitune.core.records import Batch, Sample
from fitune.data.batches import flat
from fitune.engine import step
from fitune.memory import plan, trace
from fitune.memory.counted import count
from fitune.memory.measure import most_allocated
from fitune.memory.usage import usage
from fitune.models import quant as quants
from support import tiny
from support.against import module
from support.gpu_benchmark import PATH, gpu

ROOT = Path(__file__).parents[2]
LEAST, CLOSE = 20 * 2**20, 0.005
recompute: Any = module("recompute")
frozen_cache: Any = module("frozen_cache")
packed: Any = module("packed")


CARD = gpu.Card("NVIDIA H100 80GB HBM3", "GPU-0", 80 * gpu.GIB, 79 * gpu.GIB, "bf16")


# ---- models ----


def batch(*lengths: int) -> Batch:
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(9, 380, n).astype(np.int32), np.arange(n) > 0) for n in lengths]
    return flat(samples, range(len(samples)))


def really(model: Any, work: plan.Work) -> int:
    """The most bytes that torch's profiler saw of a model and the work together."""
    gc.collect()  # what is left of other models must not go while this one is measured
    there, seen = count(model, trace.Tracer()), gpu.Updates()
    most = most_allocated(lambda: plan.go(model, work, seen), there)
    seen.check()  # the loss was finite
    return most


@pytest.mark.parametrize(
    ("method", "kind", "precision", "checkpointing"),
    [
        ("lora", "llama", "fp32", True),
        ("full", "llama-tied", "bf16", False),
        ("freeze", "llama-tied", "fp32", False),
        ("prefix", "llama", "fp32", False),
        ("qlora", "llama", "fp32", False),
        ("int8", "llama-tied", "fp32", True),
    ],
)
def test_a_random_model_takes_what_its_plan_says(method: str, kind: str, precision: str, checkpointing: bool) -> None:
    how = {"precision": precision, "checkpointing": checkpointing, **gpu.METHODS[method]}
    config = build({"model": "m", "data": ["-"], **how})
    shape = tiny.make_model(kind).config
    ordinary = batch(9, 5)
    work = plan.Work(config, shape, [[ordinary], [batch(*[240] * (40 if checkpointing else 24))], [ordinary]])
    predicted = usage(plan.traced(work), without="start").peak.bytes
    model = gpu.build_model(config, shape, torch.device("cpu"))
    measured = really(model, work)
    assert measured >= LEAST
    assert predicted == pytest.approx(measured, rel=CLOSE), f"{predicted / measured - 1:+.3%}"


def test_random_models_are_those_of_the_loader() -> None:
    shape = tiny.make_model("llama-tied").config
    for name in ("nf4", "int8"):
        config = build({"model": "m", "data": ["-"], "precision": "bf16", "method": "lora", "quant": name})
        empty = plan.without_values(plan.Work(config, shape, []))
        model = gpu.build_model(config, shape, torch.device("cpu"))
        step.last_block_is_ready(model)  # tried where a batch first goes through it
        assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in empty.named_modules()}
        assert tensors(model) == tensors(empty)
        assert all(layer.compute == torch.bfloat16 for _, layer in quants.layers(model))
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        inner = model.get_base_model()
        assert inner.lm_head.weight is inner.model.embed_tokens.weight
        assert float(inner.model.rotary_emb.inv_freq[0]) == 1.0


def tensors(model: Any) -> list[tuple[str, torch.Size, torch.dtype, bool]]:
    """In the model's order, which is that of the allocations."""
    return [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


# ---- the matrix ----


def test_the_matrix_has_every_combination_once() -> None:
    found = gpu.matrix()
    asked = [(case.model, case.method, case.checkpointing, case.length) for case in found]
    assert Counter(asked) == Counter(product(gpu.MODELS, gpu.METHODS, (False, True), gpu.LENGTHS))
    assert len(gpu.LENGTHS) == 3
    assert {case.cap for case in found} == {None}


def test_a_third_of_it_has_every_pair_of_a_length_and_anything_else() -> None:
    quick = gpu.matrix(quick=True)
    assert set(quick) < set(gpu.matrix())
    assert 3 * len(quick) == len(gpu.matrix()) == 108
    combinations = Counter((case.model, case.method, case.checkpointing) for case in quick)
    assert combinations == Counter(product(gpu.MODELS, gpu.METHODS, (False, True)))
    for name in ("model", "method", "checkpointing"):
        pairs = {(getattr(case, name), case.length) for case in quick}
        assert len(pairs) == 3 * len({value for value, _ in pairs})


def test_work_is_an_ordinary_step_the_largest_and_the_ordinary_again() -> None:
    case = gpu.Case("llama-3.2-1b", "qlora", True, 3, 100)
    work = gpu.work_of(case, "bf16")
    assert [[len(one.ids) for one in step] for step in work.steps] == [[150], [300], [150]]
    assert (work.config.method, work.config.quant.name, work.config.checkpointing) == ("lora", "nf4", True)
    assert case.name == "llama-3.2-1b qlora 3 x 100, checkpointing"


# ---- around limits ----


def needed(case: Any) -> int:
    """A plan that is nearly a line, in steps as the allocator has them."""
    tokens = case.rows * case.length
    size = 4 * gpu.GIB + tokens * 900_000 + tokens * tokens // 9
    return int(size) // (2 * gpu.MIB) * 2 * gpu.MIB


def test_configurations_lie_within_a_tenth_of_the_limit_on_both_sides() -> None:
    open_kinds = [
        gpu.Case("llama-3.2-1b", method, False, rows, gpu.SHORT) for method in ("lora", "int8") for rows in (2, 4)
    ]
    for cap in (8 * gpu.GIB, 12 * gpu.GIB):
        found = gpu.choose(cap, open_kinds, needed, 4)
        shares = [needed(case) / cap for case in found]
        assert len(set(found)) == 4
        assert all(case.cap == cap for case in found)
        assert all(0.9 <= below <= 1 < above <= 1.1 for below, above in zip(shares[::2], shares[1::2], strict=True))
        assert shares[0] > 0.98 > shares[2]  # one pair close by, one further off
        assert gpu.choose(cap, open_kinds, needed, 2) == found[:2]


def test_what_meets_no_limit_is_passed_over() -> None:
    kind = gpu.Case("llama-3.2-1b", "lora", False, 2, gpu.SHORT)
    assert gpu.choose(3 * gpu.GIB, [kind], needed, 4) == []  # the weights alone take more
    assert gpu.choose(64 * gpu.GIB, [kind], needed, 4) == []  # rows would have to be too long
    assert gpu.choose(8 * gpu.GIB, [kind], lambda case: gpu.GIB, 4) == []  # it does not depend on the length


def test_around_each_limit_several_methods_and_sizes_are_tried() -> None:
    first = [gpu.kinds(cap)[:2] for cap in gpu.CAPS]
    assert {kind.method for pair in first for kind in pair} == set(gpu.METHODS)
    assert {kind.model for pair in first for kind in pair} == set(gpu.MODELS)
    assert len({kind.rows for pair in first for kind in pair}) > 2
    assert all(one.method != other.method for one, other in first)


# ---- counting ----


def row(
    name: str, *, fits: bool, died: str | None = None, cap: int | None = None, share: float = 1.0
) -> dict[str, Any]:
    predicted = {"allocated": 100, "reserved": 110, "smallest": 105, "outside": 10, "needed": 115, "fits": fits}
    found = {"max_allocated": 100 / share, "max_reserved": 110.0, "driver": 120.0, "outside": 10}
    case = asdict(gpu.Case("llama-3.2-1b", "lora", False, 1, 8, cap))
    return {"case": case, "name": name, "predicted": predicted, "measured": found, "died": died}


def test_a_planted_death_is_counted() -> None:
    rows = [
        row("good", fits=True),
        row("off", fits=True, share=1.1),
        row("planted", fits=True, died="out of memory", cap=8),
        row("held", fits=True, cap=8),
        row("right", fits=False, died="out of memory", cap=8),
        row("wasted", fits=False, cap=8),
        {"case": asdict(gpu.Case("m", "lora", False, 1, 8)), "name": "late", "left_out": gpu.LATE},
        {"case": asdict(gpu.Case("m", "lora", False, 1, 8)), "name": "broken", "failed": "KeyError"},
    ]
    found = gpu.summary(rows)
    assert found["said_fits_and_died"] == ["planted"]
    assert found["said_no_and_ran"] == ["wasted"]
    assert (found["configurations"], found["measured"], found["around_limits"]) == (8, 6, 4)
    assert (found["said_fits"], found["around_limits_said_fits"]) == (4, 2)
    assert found["left_out"] == {"late": gpu.LATE}
    assert found["failed"] == {"broken": "KeyError"}
    assert found["errors"]["allocated"]["rows"] == 2  # under a cap nothing is compared
    assert found["errors"]["allocated"]["worst_absolute"] == pytest.approx(0.1)
    assert found["errors"]["driver"]["worst_absolute"] == 0
    assert gpu.summary(rows[:1])["said_fits_and_died"] == []
    assert [gpu.line(one).split()[0] for one in rows] == [one["name"] for one in rows]


def test_more_than_the_limit_by_the_drivers_figure_is_a_death() -> None:
    case = gpu.Case("llama-3.2-1b", "lora", False, 1, 8, 8 * gpu.GIB)
    measured = {"max_reserved": 7 * gpu.GIB, "outside": gpu.GIB}
    assert gpu.judged(case, {}, measured, None)["died"] is None
    measured["outside"] += 3 * gpu.MIB
    assert gpu.judged(case, {}, measured, None)["died"] == "3 MiB above the limit by the driver's figure"
    assert gpu.judged(case, {}, measured, "out of memory")["died"] == "out of memory"


def test_only_memory_that_is_used_up_is_a_death() -> None:
    assert gpu.out_of_memory(torch.OutOfMemoryError("x"))
    assert gpu.out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert gpu.out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not gpu.out_of_memory(RuntimeError("shapes do not match"))


# ---- processes ----


@pytest.mark.parametrize(
    ("line", "cap", "budget", "expected"),
    [
        ("go\n", None, gpu.GIB, ["plan", "measured"]),
        ("go\n", gpu.GIB, gpu.GIB, ["plan", "measured"]),
        ("\n", None, gpu.GIB, ["plan"]),
        ("go\n", None, gpu.MIB, ["left out"]),
    ],
)
def test_a_plan_is_printed_before_the_gpu_is_touched(
    line: str, cap: int | None, budget: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    limits: list[int | None] = []

    def measured(work: plan.Work, card: Any, limit: int | None) -> tuple[dict[str, int], None]:
        assert [one["name"] for one in rows] == ["tiny lora 2 x 8" + (", in 1 GiB" if cap else "")]
        limits.append(limit)
        return {"max_reserved": 1, "outside": 0}, None

    config = build({"model": "m", "data": ["-"], "precision": "bf16"})
    work = plan.Work(config, tiny.make_model("llama").config, [[batch(4, 4)], [batch(8, 8)], [batch(4, 4)]])
    monkeypatch.setattr(gpu, "work_of", lambda case, precision: work)
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    case, card = gpu.Case("tiny", "lora", False, 2, 8, cap), gpu.replace(CARD, budget=budget)
    gpu.run_one(case, card, rows.append, wait=True, measure=measured)
    kinds = ["left out" if "left_out" in one else "measured" if "measured" in one else "plan" for one in rows]
    assert kinds == expected
    # the allocator gets what the plan leaves it beside the context
    outside = rows[0]["predicted"]["outside"]
    assert limits == ([] if expected[-1] != "measured" else [None if cap is None else cap - outside])
    assert outside > 0
    assert json.loads(json.dumps(rows)) == rows


# In a configuration's place: what it does is its method's name
STAND_IN = """
import json, pathlib, sys, time
job = json.loads(sys.argv[1])
if job["do"] == "choose":
    found = [dict(model="m", method="ran", checkpointing=False, rows=1, length=n, cap=job["cap"]) for n in (1, 2)]
    print(json.dumps(found))
    sys.exit()
case, turn = job["case"], pathlib.Path(job["card"]["uuid"])
predicted = dict(allocated=1, reserved=1, smallest=1, outside=0, needed=1, fits=True)
plan = dict(case=case, predicted=predicted)
if case["method"] == "broken": sys.exit("KeyError: nothing")
if case["method"] == "large": print(json.dumps({**plan, "left_out": "7 MiB more than this card has"})); sys.exit()
print(json.dumps(plan), flush=True)
if sys.stdin.readline().strip() != "go": sys.exit()
turn.mkdir()  # fails where another one is at it
time.sleep(0.1)
turn.rmdir()
if case["method"] == "killed": sys.exit("Killed")
found = dict(max_allocated=1, max_reserved=1, driver=1, outside=0)
print("a library says something")
print(json.dumps({**plan, "measured": found, "died": "out of memory" if case["method"] == "died" else None}))
"""


def stand_ins(folder: Path, ends: float | None = None) -> tuple[Any, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    card = gpu.replace(CARD, uuid=str(folder / "turn"))
    return gpu.Runs(card, rows.append, ends, (sys.executable, "-c", STAND_IN)), rows


def test_whatever_becomes_of_a_process_is_reported_and_one_at_a_time_has_the_gpu(tmp_path: Path) -> None:
    runs, rows = stand_ins(tmp_path)
    runs.most, runs.workers = 2, 3
    runs.all([gpu.Case("m", name, False, 1, 8) for name in ("ran", "died", "killed", "broken", "large")], [8])
    assert sorted((one["case"]["method"], one["case"]["cap"]) for one in rows if one["case"]["cap"]) == [("ran", 8)] * 2
    found = {one["case"]["method"]: one for one in rows if not one["case"]["cap"]}
    assert found["ran"]["died"] is None
    assert found["died"]["died"] == "out of memory"
    assert (found["killed"]["failed"], found["killed"]["predicted"]["fits"]) == ("Killed", True)
    assert found["broken"]["failed"] == "KeyError: nothing"
    assert found["large"]["left_out"] == "7 MiB more than this card has"
    assert runs.problems == []
    assert gpu.summary(rows)["said_fits_and_died"] == ["m died 1 x 8"]


def test_nothing_begins_when_the_time_is_up(tmp_path: Path) -> None:
    runs, rows = stand_ins(tmp_path, ends=0)
    runs.all([gpu.Case("m", "ran", False, 1, 8)], [8 * gpu.GIB])
    assert [one["left_out"] for one in rows] == [gpu.LATE]
    assert runs.problems == [f"8 GiB: {gpu.LATE}"]


def test_a_record_is_whole_after_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = gpu.Record(CARD, tmp_path / "results" / "gpu.json", quick=True)
    for finished in (False, True):
        if finished:
            record.write(finished=True, problems=["48 GiB: this card has 24.0"])
        else:
            record.add(row("good", fits=True))
        found = json.loads(record.output.read_text(encoding="utf-8"))
        assert found["finished"] is finished
        assert [one["name"] for one in found["rows"]] == ["good"]
    assert found["device"]["name"] == CARD.name
    assert found["versions"]["torch"] == torch.__version__
    assert found["limits"] == ["48 GiB: this card has 24.0"]
    assert "good" in capsys.readouterr().err


@pytest.mark.full
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(PATH), "--output", str(output)]
    # no GPU can be seen, also where there is one
    environment = {**gpu.os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no CUDA GPU here: nothing was run" in done.stdout
    assert "108 configurations and up to 20 more around 8, 12, 16, 24, 48 GiB" in done.stdout
    assert not output.exists()
    assert json.loads(gpu.without_gpu(as_json=True))["configurations"] == 108


@pytest.mark.cuda
@pytest.mark.full  # half a minute; scripts/gpu_accept.py does as much
def test_two_small_configurations_for_real() -> None:
    found, why = gpu.ask({"do": "probe"})
    assert found is not None, why
    rows: list[dict[str, Any]] = []
    runs = gpu.Runs(gpu.Card(**found), rows.append)
    cases = [gpu.Case("llama-3.2-1b", "lora", False, 1, 256), gpu.Case("llama-3.2-1b", "qlora", True, 1, 256)]
    runs.all(cases, [])
    assert [one.get("failed") for one in rows] == [None, None]
    for one in rows:
        assert one["died"] is None
        assert max(abs(off) for off in gpu.errors_of(one).values()) < 0.15, gpu.line(one)


# ---- what recomputation costs ----


def test_the_table_of_recomputed_blocks_is_that_of_its_results() -> None:
    """And the results are what the text says of them: plans hold, bits are the same, operations fall."""
    record = json.loads((ROOT / "results" / "recompute.json").read_text(encoding="utf-8"))
    assert recompute.problems(record) == []
    for language in ("", ".zh-CN"):
        assert "\n".join(recompute.lines(record)) in (ROOT / "docs" / f"memory{language}.md").read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize(
    ("changed", "found"),
    [({"same_bits": False}, "other bits"), ({"off": 0.01}, "plan off by 1.00%"), ({"work": 1.0}, "operations")],
)
def test_a_result_that_is_not_as_it_should_be_is_found(changed: dict[str, Any], found: str) -> None:
    rows = [{"recomputed": [], "same_bits": True, "off": 0.0, "work": 1.0}]
    rows += [{**rows[0], "recomputed": [0], "work": 1.2}]
    assert recompute.problems({"methods": {"lora": rows}}) == []
    rows[1] |= changed
    assert found in recompute.problems({"methods": {"lora": rows}})[0]


@pytest.mark.full
def test_what_recomputation_costs_is_measured(tmp_path: Path) -> None:
    """The benchmark on a small model: it compares bits, plans and operations, and finds nothing wrong."""
    out = tmp_path / "out.json"
    small = ["--blocks", "3", "--length", "32", "--rounds", "1", "--budgets", "2", "--methods", "lora"]
    assert recompute.main([*small, "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["methods"]["lora"]
    assert [row["recomputed"] for row in rows] == [[], [0, 1]]
    assert rows[0]["time"] == rows[0]["work"] == 1


# ---- what later epochs take behind frozen blocks ----


def test_the_table_of_frozen_blocks_is_that_of_its_results() -> None:
    """And the results are what the text says of them: bits are the same, operations are the planned ones."""
    record = json.loads((ROOT / "results" / "frozen_cache.json").read_text(encoding="utf-8"))
    assert frozen_cache.problems(record) == []
    for language in ("", ".zh-CN"):
        assert "\n".join(frozen_cache.lines(record)) in (ROOT / "docs" / f"memory{language}.md").read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize(
    ("changed", "found"), [({"same_bits": False}, "other bits"), ({"work": 0.5}, "0.5 of the operations, planned 0.3")]
)
def test_a_later_epoch_that_is_not_as_it_should_be_is_found(changed: dict[str, Any], found: str) -> None:
    row = {"kept": "memory", "same_bits": True, "work": 0.3, "planned_work": 0.3}
    assert frozen_cache.problems({"methods": {"freeze": [row]}}) == []
    assert found in frozen_cache.problems({"methods": {"freeze": [{**row, **changed}]}})[0]


@pytest.mark.full
def test_what_later_epochs_take_is_measured(tmp_path: Path) -> None:
    """The benchmark on a small model: it compares bits and operations, and finds nothing wrong."""
    out = tmp_path / "out.json"
    assert frozen_cache.main(["--blocks", "3", "--rows", "3", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["methods"]["tail"]
    assert [(row["kept"], row["blocks"]) for row in rows] == [("off", 3), ("memory", 3), ("disk", 3)]


# ---- packed weights ----


def test_the_table_of_packed_weights_is_that_of_its_results() -> None:
    """And the results are what the text says: every way gives the same bits, none is faster than what a run does."""
    record = json.loads((ROOT / "results" / "packed.json").read_text(encoding="utf-8"))
    assert packed.problems(record) == []
    for language in ("", ".zh-CN"):
        text = (ROOT / "docs" / f"performance{language}.md").read_text(encoding="utf-8")
        assert all(table in text for table in packed.lines(record))


@pytest.mark.parametrize(
    ("changed", "found"),
    [({"same_bits": False}, "other bits"), ({"gigabytes_per_second": 9.0}, "nf4, look-up is faster than nf4")],
)
def test_a_way_to_plain_weights_that_is_wrong_or_faster_is_found(changed: dict[str, Any], found: str) -> None:
    rows = [{"way": name, "same_bits": True, "gigabytes_per_second": 8.0} for name in ("nf4", "nf4, look-up")]
    assert packed.problems({"weights": rows}) == []
    assert found in packed.problems({"weights": [rows[0], {**rows[1], **changed}]})[0]


@pytest.mark.full
def test_packed_weights_are_measured(tmp_path: Path) -> None:
    """The benchmark on a small layer and model: all ways give the same bits, each kind of weights makes its step."""
    out = tmp_path / "out.json"
    assert packed.main(["--rounds", "1", "--steps", "1", "--blocks", "1", "--outputs", "128", "--out", str(out)]) == 0
    record = json.loads(out.read_text(encoding="utf-8"))
    assert all(row["same_bits"] for row in record["weights"])
    assert [row["weights"] for row in record["steps"]] == ["bf16", "nf4", "int8"]
