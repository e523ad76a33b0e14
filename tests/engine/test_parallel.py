"""Several processes that share each step make the run of one: two real ones, over gloo on the loopback interface."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fitune.core.errors import ConfigError
from fitune.core.parallel import LOOPBACK, STORE
from fitune.engine import parallel
from support import contract, forks, preferred

Names = tuple[str, ...]
Found = dict[Names, list[dict[str, Any]]]  # what each process says of each case

CHILD = Path(__file__).parents[1] / "support" / "shared_steps.py"
QUICK: list[Names] = [
    ("lora-all", "llama", "fp32", "none"),
    ("full", "llama", "fp32", "none"),
    ("lora", "llama", "fp32", "nf4"),
    ("lora", "llama", "fp16", "none"),
    ("bitfit", "bloom", "fp32", "none"),
    ("prefix-projected", "qwen2", "fp32", "none"),
    ("full", "llama", "fp32", "none", "dpo"),
    ("full", "llama", "fp32", "none", "kto"),
    ("lora-all", "llama", "fp32", "none", "shard"),
    ("full", "llama", "fp32", "none", "shard", "read"),
    ("lora", "llama", "fp32", "nf4", "shard", "read"),
    ("lora", "llama", "fp16", "none", "shard"),
    ("lora-all", "llama", "fp32", "none", "shard", "dpo"),
    ("full", "llama", "fp32", "none", "shard", "kto"),
]
PREFERENCES = [
    (variant, "llama", "fp32", quant, "shard", objective)
    for objective in preferred.SETTINGS
    for variant, quant in (("full", "none"), ("lora-all", "none"), ("lora", "nf4"))
]
ALL: list[Names] = [
    (variant, kind, "fp32", "none")
    for variant in contract.VARIANTS
    for kind in ("llama", "bloom", "chatglm")
    if (variant, kind) not in contract.REFUSED
]
WAYS = (("full", "none"), ("lora-all", "none"), ("lora", "nf4"), ("lora", "int8"), ("prefix", "none"))
READ: list[Names] = [
    (variant, kind, "fp32", quant) for variant, quant in WAYS for kind in ("llama", "bloom", "chatglm")
]
DIFFERS, GIVEN, LATE = ("differs",), ("given",), ("late",)  # what they say beside the cases
CLOSE = {"fp32": 1e-6, "fp16": 1e-3}  # of all trained weights together, and of losses
# SimPO's loss is one of beta times the difference of two mean log-probabilities; between 4 and 8, where they are here,
# float32 has a value every 2**-21
ROUNDED = {"simpo": 2 * preferred.SETTINGS["simpo"]["beta"] * 2**-21}


def shared(cases: list[Names], ranks: int, place: Path) -> Found:
    """What each process says of each case."""
    own = {"WORLD_SIZE": str(ranks), STORE: str(place / "store"), "OMP_NUM_THREADS": "1", "RUN": str(place)}
    if sys.platform in LOOPBACK:
        own["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    printed, errors = ([place / f"{kind}-{rank}" for rank in range(ranks)] for kind in ("out", "err"))
    processes = [
        forks.start(
            forks.script, CHILD, json.dumps(cases), out=out, err=err, environment={**own, "RANK": str(rank)}
        )
        for rank, (out, err) in enumerate(zip(printed, errors, strict=True))
    ]  # fmt: skip
    found: Found = {}
    try:
        for process, out, err in zip(processes, printed, errors, strict=True):
            process.join(900)
            assert process.exitcode == 0, err.read_text(encoding="utf-8")[-3000:]
            for text in out.read_text(encoding="utf-8").splitlines():
                heard = json.loads(text)
                found.setdefault(tuple(heard.get("case", ["differs"])), []).append(heard)
    finally:
        for process in processes:
            process.kill()
    return found


def check(found: Found, cases: list[Names], ranks: int) -> None:
    assert list(found) == [*cases, DIFFERS, GIVEN, *([LATE] if ranks == 2 else [])]
    for case in cases:
        heard = found[case]
        assert len(heard) == ranks
        assert len({one["sha256"] for one in heard}) == 1, case  # all have the same weights, bit for bit
        for one in heard:
            assert one["off"] <= CLOSE[case[2]], (case, one["off"])
            near = pytest.approx(one["alone"], rel=CLOSE[case[2]], abs=ROUNDED.get(case[-1]))
            assert one["losses"] == near, case
            steps = {2} if case[2] == "fp32" else {2, 4}  # of float16 once more with a lower scale
            if case[-1] == "kto" and "shard" not in case:
                steps = {3}
                assert one["again"], case  # in each memory ran out, at another place
            assert "shard" in case or set(one["collectives"]) <= steps, case


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return shared(QUICK, 2, tmp_path_factory.mktemp("quick"))


def test_two_processes_make_the_weights_of_one(quick: Found) -> None:
    check(quick, QUICK, 2)


def test_a_process_with_other_data_is_named(quick: Found) -> None:
    for one in quick[DIFFERS]:
        assert "process 1: another data" in one["differs"]
        assert "settings" not in one["differs"].partition("fix")[0].partition("received")[2]


def test_each_process_gets_what_all_give(quick: Found) -> None:
    assert [one["given"] for one in quick[GIVEN]] == [[0, 1], [0, 1]]


def test_a_late_process_is_named_with_its_stack(quick: Found) -> None:
    waited, late = sorted(quick[LATE], key=lambda one: one["rank"])
    assert "process 1 of this run is gone, or late by more than 0.0333333 minutes: step 7" in waited["late"]
    assert "keep_the_others_waiting" in waited["late"]
    assert "process 1 of this run is gone" in late["late"]  # this one: the other had given up by then


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_method_is_shared(ranks: int, tmp_path: Path) -> None:
    check(shared(ALL, ranks, tmp_path), ALL, ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_method_goes_into_shards(ranks: int, tmp_path: Path) -> None:
    cases = [(*case, "shard") for case in [*ALL, ("lora", "llama", "fp32", "int8")]]
    cases += [(*case, "shard", "read") for case in READ]
    cases += PREFERENCES
    check(shared(cases, ranks, tmp_path), cases, ranks)


def test_processes_that_cannot_meet_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in (STORE, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="not where they meet"):
        parallel.join()
