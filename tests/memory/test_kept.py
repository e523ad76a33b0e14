"""A kept plan is found again, and is not believed where anything that decides it has changed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from fitune.core.config import build
from fitune.core.files import seal
from fitune.core.records import Batch
from fitune.data.cache import Cache
from fitune.data.tokenizer.new_tokens import NewToken
from fitune.memory import device, heap, kept, plan, steps
from fitune.models.kernels import fused

pytestmark = pytest.mark.unit
GIB = 2**30
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def batch(length: int = 12) -> Batch:
    return steps.made_up(2, length, 100)


def work(**settings: Any) -> plan.Work:
    given = {"model": "m", "data": ["d"], "precision": "fp32", "loss_rows": 8, "max_length": 12}
    return plan.Work(build({**given, **settings}), LlamaConfig(**SIZES), [[batch()]], batch())


HERE = device.Device("cpu", "cpu", 8 * GIB)
CARD = device.Device("card", "cuda", 8 * GIB)


class Traces:
    """How often work was traced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._real = 0, plan._trace
        monkeypatch.setattr(plan, "_trace", self)

    def __call__(self, asked: plan.Work, where: device.Device) -> kept.Traced:
        self.count += 1
        return self._real(asked, where)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(monkeypatch)


@pytest.mark.parametrize("where", [HERE, CARD], ids=["cpu", "cuda"])
def test_it_is_found_again_and_is_the_same(tmp_path: Path, traces: Traces, where: device.Device) -> None:
    outside = {"other": 7}
    first = plan.plan(work(), where, name="m", outside=outside, cache=Cache(tmp_path))
    again = plan.plan(work(), where, name="m", outside=outside, cache=Cache(tmp_path))
    anew = plan.plan(work(), where, name="m", outside=outside)
    assert traces.count == 2  # the first, and the one without a cache
    assert first == again == anew


def test_what_is_of_the_moment_is_not_kept(tmp_path: Path, traces: Traces) -> None:
    first = plan.plan(work(), HERE, name="m", outside={"other": 7}, cache=Cache(tmp_path))
    again = plan.plan(work(), replace(HERE, budget=5), name="n", outside={"other": 9}, cache=Cache(tmp_path))
    assert traces.count == 1
    assert (again.model, again.budget, again.fits) == ("n", 5, False)
    assert again.needed == first.needed + 2


def test_places_of_files_do_not_matter(tmp_path: Path, traces: Traces) -> None:
    plan.plan(work(), HERE, name="m", cache=Cache(tmp_path))
    moved = work(model="elsewhere", data=["e"], output="out", cache="there", force=True)
    moved = replace(moved, model_config=LlamaConfig(**SIZES, name_or_path="there"))
    plan.plan(moved, HERE, name="m", cache=Cache(tmp_path))
    assert traces.count == 1


def other_batch(**changes: Any) -> Batch:
    return replace(batch(), **changes)


OTHER_WORK: dict[str, Callable[[], plan.Work]] = {
    "a setting": lambda: work(optimizer="sgd"),
    "a setting of the method": lambda: work(lora={"rank": 3}),
    "checkpointing": lambda: work(checkpointing=True),
    "the model's sizes": lambda: replace(work(), model_config=LlamaConfig(**{**SIZES, "intermediate_size": 48})),
    "the model's family": lambda: replace(work(), model_config=MistralConfig(**SIZES)),
    "a longer row": lambda: replace(work(), steps=[[batch(14)]]),
    "another token": lambda: replace(work(), steps=[[other_batch(ids=batch().ids + 1)]]),
    "other borders": lambda: replace(work(), steps=[[other_batch(bounds=np.array([0, 8, 24], np.int32))]]),
    "weights of labels": lambda: replace(work(), steps=[[other_batch(weights=np.ones(batch().targets, np.float32))]]),
    "micro-batches of one step": lambda: replace(work(), steps=[[batch(), batch()]]),
    "micro-batches of two steps": lambda: replace(work(), steps=[[batch()], [batch()]]),
    "no evaluation": lambda: replace(work(), held_out=None),
    "another evaluation": lambda: replace(work(), held_out=batch(10)),
    "the layout": lambda: replace(work(), layout="padded"),
    "new tokens": lambda: replace(work(), added=[NewToken("<x>", 100, (1,))]),
}


@pytest.mark.parametrize("name", OTHER_WORK)
def test_other_work_is_another_plan(tmp_path: Path, traces: Traces, name: str) -> None:
    plan.plan(work(), HERE, name="m", cache=Cache(tmp_path))
    plan.plan(OTHER_WORK[name](), HERE, name="m", cache=Cache(tmp_path))
    assert traces.count == 2


def _code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept.code()
    monkeypatch.setattr(kept, "code", lambda: f"{before}0")


OTHER_PLACE: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "code": _code,
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
    "the processor": lambda patch: patch.setattr(kept, "_processor", lambda: ["another"]),
    "determinism": lambda patch: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: 7),
    "kernels": lambda patch: patch.setattr(fused, "described", lambda where: "others"),
    "the allocator": lambda patch: patch.setattr(heap, "taken", lambda given, version: 0.5),
    "the system": lambda patch: patch.setattr(platform, "system", lambda: "Plan 9"),
}


@pytest.mark.parametrize("name", OTHER_PLACE)
def test_another_place_is_another_plan(
    tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan.plan(work(), HERE, name="m", cache=Cache(tmp_path))
    OTHER_PLACE[name](monkeypatch)
    plan.plan(work(), HERE, name="m", cache=Cache(tmp_path))
    assert traces.count == 2


def test_another_device_is_another_plan(tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (HERE, CARD, replace(CARD, bf16=False), replace(CARD, multiprocessors=8)):
        plan.plan(work(), where, name="m", cache=Cache(tmp_path))
    assert traces.count == 4
    measured = device.Calibration(workspace=2**20)
    monkeypatch.setattr(device, "calibration", lambda name: measured)
    plan.plan(work(), CARD, name="m", cache=Cache(tmp_path))
    assert traces.count == 5


def test_code_and_versions_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of the rooms below, by name and content, and each package."""
    for room in kept.ROOMS:
        (tmp_path / room / "inner").mkdir(parents=True)
        (tmp_path / room / "inner" / "one.py").write_text("a = 1")
    seen = [kept.code.__wrapped__(tmp_path)]
    for room in kept.ROOMS:
        (tmp_path / room / "inner" / "one.py").write_text("a = 2")
        seen.append(kept.code.__wrapped__(tmp_path))
    (tmp_path / "core" / "inner" / "one.py").rename(tmp_path / "core" / "two.py")
    seen.append(kept.code.__wrapped__(tmp_path))
    assert kept.code() == kept.code.__wrapped__()
    real = metadata.version
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        monkeypatch.setattr(metadata, "version", lambda name, other=package: "0" if name == other else real(name))
        seen.append(kept.code.__wrapped__(tmp_path))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("damage", ["bytes", "a field", "no JSON", "gone"])
def test_a_damaged_entry_is_not_believed(tmp_path: Path, traces: Traces, damage: str) -> None:
    good = plan.plan(work(), HERE, name="m", outside={}, cache=Cache(tmp_path))
    (entry,) = tmp_path.glob("plan-*")
    file = entry / kept.FILE
    values = json.loads(file.read_text())
    values["usage"]["peak"]["bytes"] += 2**20
    if damage == "bytes":
        file.write_text(json.dumps(values))  # the checksum differs
    elif damage == "gone":
        file.unlink()
    else:  # sealed as it is
        file.write_text("{" if damage == "no JSON" else json.dumps({**values, "total": "many"}))
        (entry / "MANIFEST.json").unlink()
        seal(entry)
    assert plan.plan(work(), HERE, name="m", outside={}, cache=Cache(tmp_path)) == good
    assert traces.count == 2


def test_what_cannot_be_traced_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(plan, "deep", fail)
        assert plan.plan(work(), HERE, name="m", cache=Cache(tmp_path)).how == "closed form"
    assert plan.plan(work(), HERE, name="m", cache=Cache(tmp_path)).how == "trace"
    assert list(tmp_path.glob("plan-*"))


def test_what_other_files_decide_is_not_kept(tmp_path: Path) -> None:
    plan.plan(work(adapter="run"), HERE, name="m", cache=Cache(tmp_path))
    assert not list(tmp_path.glob("plan-*"))
    assert not kept.Question(
        build({"model": "m", "data": ["d"], "method": "prompt", "prompt": {"init": "text", "text": "x"}}),
        LlamaConfig(**SIZES), [[batch()]], None, [], HERE,
    ).can_be_kept  # fmt: skip
