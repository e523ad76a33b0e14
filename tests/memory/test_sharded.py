"""The plan of a process that has its part of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fitune.core.config import RunConfig
from fitune.core.parallel import LOOPBACK, STORE
from fitune.core.plan import Moment, Plan, Point
from fitune.memory import sharded
from fitune.memory.sharded import Blocks, blocks_of, chosen, planned
from support import tiny

CHILD = Path(__file__).parents[1] / "support" / "shared_memory.py"
CLOSE = 0.005
BLOCKS = Blocks(frozen=800, trained=80, largest=110, gradients=10, tensor=7, share=0.5)
READ = replace(BLOCKS, one_by_one=True)
PARTS = {"frozen weights": 1000, "trainable weights": 160, "gradients": 100, "optimizer states": 320, "temporaries": 90}
PHASES = ("load", "forward", "backward", "update", "checkpoint")


def whole(budget: int | None = None) -> Plan:
    points = [Point(at / 4, phase, dict(PARTS)) for at, phase in enumerate(PHASES)]
    phases = [Moment(point.phase, sum(PARTS.values()), dict(PARTS)) for point in points]
    return Plan(
        "m", "lora", "fp32", "none", "cpu", None, "trace", "", 8, 1, 8, 160, 1160, phases, phases[0], [], points,
        sum(PARTS.values()), None, None, None, {"outside": 5}, sum(PARTS.values()) + 5, budget, {},
    )  # fmt: skip


def config(**given: object) -> RunConfig:
    return RunConfig(model="m", data=["d.jsonl"], **given)  # type: ignore[arg-type]  # as a test needs them


def test_a_process_has_its_part_of_the_blocks_and_what_is_gathered() -> None:
    made = planned(whole(), BLOCKS, 4)
    parts = {moment.phase: moment.parts for moment in made.phases}
    assert parts["load"] == {**PARTS, "temporaries": 90 + 110 // 4}  # the model is whole, and shared out block by block
    parts["load"] = {moment.phase: moment.parts for moment in planned(whole(), READ, 4).phases}["load"]
    assert parts["load"] == {
        "frozen weights": 1000 - 600, "trainable weights": 160 - 60, "gradients": 100, "optimizer states": 320,
        "temporaries": 90 + 110,
    }  # fmt: skip
    assert parts["forward"] == {
        "frozen weights": 1000 - 600, "trainable weights": 160 - 60, "gradients": 100 - 37,
        "optimizer states": 320 - 120, "temporaries": 90 + 2 * 110,
    }  # fmt: skip
    assert parts["backward"]["temporaries"] == 2 * 110  # gloo's own buffer too, before there are others
    assert parts["backward"]["gradients"] == 100 - 37 + 10  # those of the block before, whole
    assert parts["update"]["temporaries"] == 90 - 80  # what is in blocks is in no buffer
    assert parts["checkpoint"]["temporaries"] == 90 + 7  # one tensor whole, of process 0
    assert made.needed == made.peak.bytes + 5
    assert made.parallel == "shard"


def test_the_whole_model_stays_where_it_fits() -> None:
    model = tiny.make_model("llama")
    assert chosen(whole(10_000), config(), 1, lambda: model).parallel == ""
    assert chosen(whole(10_000), config(), 2, lambda: model).parallel == "replicate"
    assert chosen(whole(10_000), config(parallel="shard"), 2, lambda: model).parallel == "shard"
    assert (
        chosen(whole(10_000), config(parallel="shard", optimizer="adafactor"), 2, lambda: model).parallel == "replicate"
    )
    assert chosen(whole(100), config(parallel="replicate"), 2, lambda: model).parallel == "replicate"


def test_where_all_of_them_do_not_fit_it_goes_into_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "blocks_of", lambda model, config: replace(BLOCKS, largest=1, gradients=1))
    found = whole(2 * whole().needed - 1)  # of a CPU, whose processes share it
    found = replace(found, phases=found.phases[1:3], timeline=found.timeline[1:3])
    assert chosen(found, config(), 2, torch.nn.Module).parallel == "shard"
    assert chosen(replace(found, device="cuda"), config(), 2, torch.nn.Module).parallel == "replicate"


def test_the_sizes_of_blocks_are_those_of_the_model() -> None:
    model = tiny.make_model("llama")
    inside = [p for name, p in model.named_parameters() if ".layers." in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in inside))
    found = blocks_of(model, config(method="full"))
    assert found.trained == sum(p.numel() * p.element_size() for p in inside)
    assert found.frozen == 0
    assert found.share == 1
    assert found.largest == found.gradients == found.trained // model.config.num_hidden_layers
    assert found.tensor == max(p.numel() * p.element_size() for p in inside)
    assert found.one_by_one
    assert not blocks_of(model, config(lora={"init": "pissa"})).one_by_one  # which looks at all weights first


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_process_allocates_what_is_planned(method: str, tmp_path: Path) -> None:
    own = {"WORLD_SIZE": "2", STORE: str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    if sys.platform in LOOPBACK:
        own["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    processes = [
        subprocess.Popen(
            [sys.executable, str(CHILD), method, str(tmp_path / f"model-{rank}")],
            env={**os.environ, **own, "RANK": str(rank)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        found = json.loads(out.splitlines()[-1])
        assert found["read"] == pytest.approx(found["load"], rel=CLOSE), found
        assert found["read"] < 0.8 * found["whole"], found  # half of it, one block of eight, and what is in none
        assert found["measured"] >= found["planned"] * (1 - CLOSE), found
        assert found["measured"] - found["unseen"] <= found["planned"] * (1 + CLOSE), found
        if found["rank"] == 0:
            assert found["saved"] == pytest.approx(found["checkpoint"], rel=CLOSE), found
        else:
            assert found["saved"] < found["held"] * (1 + CLOSE), found  # process 0 alone has a whole tensor
