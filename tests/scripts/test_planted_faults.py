"""Faults planted in small real runs are found by fitune's own checks, and clean runs are not warned of.

The faults and the clean runs are those of scripts/planted_faults.py; the quick run tries some of each.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fitune.checks import runchecks, stepchecks
from fitune.data.batches import Loader, flat
from fitune.engine import optim
from fitune.engine.step_runner import StepRunner
from fitune.models import adapters
from fitune.models.load import load_model
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from support import tiny
from support.contract import config_for, samples

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "planted_faults.py"
spec = importlib.util.spec_from_file_location("planted_faults", SCRIPT)
assert spec is not None
assert spec.loader is not None
planted = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = planted
spec.loader.exec_module(planted)

QUICK = (  # of each seam one; the cheap ones are refused before anything is trained
    "truncated answers", "label not shifted", "wrong template at chat", "gradients clipped per micro-batch",
    "sampler order wrong at resume", "adapter not saved",
)  # fmt: skip
FAULTS = [pytest.param(f, marks=[] if f.name in QUICK else [pytest.mark.full]) for f in planted.FAULTS]
CLEAN = [pytest.param(*one, marks=[] if one == ("fp16", "llama") else [pytest.mark.full]) for one in planted.CLEAN]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return planted.Place(tmp_path_factory.mktemp("planted"))


def test_there_are_enough() -> None:
    assert len({fault.name for fault in planted.FAULTS}) == len(planted.FAULTS) >= 30
    assert len(set(planted.CLEAN)) == len(planted.CLEAN) >= 40
    assert {fault.name for fault in planted.FAULTS} >= set(QUICK)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(place: Any, fault: Any) -> None:
    row = planted.planted(place, fault)
    assert row["found"], row
    assert row["level"] in ("refuse", "warn") or fault.name == "leaking attention"  # another layout is taken


@pytest.mark.parametrize(("method", "base"), CLEAN)
def test_a_clean_run_is_not_warned_of(place: Any, method: str, base: str) -> None:
    assert planted.clean(place, method, base)["alarms"] == []


@pytest.mark.shared
@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    ["alpaca_zh_demo.json", "alpaca_en_demo.json", "advertisegen_dev/dev_chatml.json", "glaive_toolcall_en_demo.json"],
)
def test_a_clean_run_on_real_data_is_not_warned_of(place: Any, shared: Path, name: str) -> None:
    data = [str(shared / "data" / name)]
    model = str(shared / "models" / "stories260K")
    row = planted.clean(place, "lora", "llama", model=model, data=data, take=[60], template="chatml", max_lost=1.0)
    aside = ("truncation", "stop-token-trained", "bad-row")  # chatml's tokens are not in its vocabulary of 512
    assert [alarm for alarm in row["alarms"] if not alarm.startswith(aside)] == []


def test_the_table_in_results_is_of_these_faults() -> None:
    record = json.loads((ROOT / "results" / "planted_faults.json").read_text(encoding="utf-8"))
    assert [row["fault"] for row in record["faults"]] == [fault.name for fault in planted.FAULTS]
    assert record["found"] == record["planted"] == len(planted.FAULTS)
    assert (record["clean_runs"], record["false_alarms"]) == (len(planted.CLEAN), 0)


# ---- the rules by themselves ----


def test_a_batch_is_compared_with_its_samples() -> None:
    rows = [s for s in samples() if len(s) > 2]
    good = flat(rows, range(len(rows)))
    assert stepchecks.batch_labels([good], rows).level == "ok"
    for name, wrong in {
        "ids": good.ids[::-1].copy(), "positions": good.positions + 1, "labels": good.labels[::-1].copy() + 1,
        "label_rows": good.label_rows - 1,
    }.items():  # fmt: skip
        values = {**vars(good), name: wrong}
        found = stepchecks.batch_labels([type(good)(**values)], rows)
        assert found.level == "refuse", name


def test_the_rows_of_the_next_step_follow_from_the_loader_alone() -> None:
    rows = [s for s in samples() for _ in range(5)]
    loader = Loader(rows, batch_size=2, accumulation=2, seed=3)
    for done in (0, 1, loader.count(0), loader.count(0) + loader.count(1)):
        wanted = stepchecks.next_rows(loader, done)
        _, micro = next(loader.steps(done, done + 1))
        assert stepchecks.row_order(wanted, done + 1, micro).level == "ok"
        _, later = next(loader.steps(done + 1, done + 2))
        assert stepchecks.row_order(wanted, done + 1, later).level == "refuse"
    assert stepchecks.each_row_once(loader).level == "ok"


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e6])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_the_optimizer_gets_the_sum_of_the_gradients(variant: str, max_norm: float) -> None:
    model = adapters.attach(ready(tiny.make_model("qwen2")), config_for(variant)).train()  # a tied head
    optimizer = optim.make(trainable(model), config_for(variant))
    rows = [s for s in samples() if len(s) > 2]
    micro = [flat(rows, [n]) for n in range(2)]
    for _ in range(2):
        runner = StepRunner(model, "flat", max_norm, lambda row: None, print)
        with stepchecks.step_equality(runner, optimizer) as found:
            runner.step(micro, optimizer)
        assert found[0].level == "ok", found[0].text
        assert ("clipped once" in found[0].text) == (0 < max_norm < 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "chatglm", "phi3", "qwen3_moe"])
def test_a_loaded_base_begins_with_the_values_of_its_files(kind: str, tmp_path: Path) -> None:
    folder = tiny.save(kind, tmp_path / kind)
    model = load_model(folder)
    found = runchecks.base_loaded(runchecks.compared(model, folder))
    assert found.level == "ok", found.text
    assert int(found.text.split()[0]) > 10
    blocks = [n for n, p in model.named_parameters() if p.ndim == 2 and ".1." in n]
    with torch.no_grad():
        model.get_parameter(blocks[-1]).add_(1e-3)
    assert runchecks.base_loaded(runchecks.compared(model, folder)).level == "refuse"


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_weights_are_compared_too(kind: str, quant: str, model_folder: Path, tmp_path: Path) -> None:
    folder = model_folder if kind == "llama" else tiny.save(kind, tmp_path / kind)
    model: Any = load_model(folder, quant=quant)
    assert runchecks.base_loaded(runchecks.compared(model, folder)).level == "ok"
    blocks = model.model.layers if kind == "llama" else model.transformer.h
    blocks[0].mlp, blocks[1].mlp = blocks[1].mlp, blocks[0].mlp
    assert runchecks.base_loaded(runchecks.compared(model, folder)).level == "refuse"


def test_dropout_in_an_evaluation_is_seen_before_anything_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for("lora").model_copy(update={"lora": config_for("lora").lora.model_copy(update={"dropout": 0.3})})
    model = adapters.attach(ready(tiny.make_model("llama")), config)
    batch = flat([s for s in samples() if len(s) > 2], [0])
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    assert stepchecks.eval_dropout(model, batch, "flat").level == "ok"
    monkeypatch.setattr("fitune.engine.held_out.evaluating", lambda model: nullcontext())
    assert stepchecks.eval_dropout(model.train(), batch, "flat").level == "refuse"
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert np.isfinite(float(next(iter(before.values())).abs().max()))
