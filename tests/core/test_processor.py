"""Settings of torch's CPU libraries, and whether the processor is free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.commands.train import train
from fitune.core import processor
from fitune.core.config import build
from fitune.core.events import Watcher
from fitune.core.processor import others  # the real one: tests know of no other processes
from fitune.engine import environment
from fitune.engine.checkpoint import RunFolder
from fitune.memory import forget_peak, peak_mib, resident_mib
from fitune.views import report

NAMES = ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def after(code: str, **given: str) -> list[str]:
    """What the variables are in a new process behind some code; none: not set."""
    plain = {key: value for key, value in os.environ.items() if key not in (*NAMES, *processor.SPINNING)}
    show = f"{code}\nimport json, os\nprint(json.dumps([os.environ.get(name, 'none') for name in {NAMES}]))"
    done = subprocess.run(
        [sys.executable, "-c", show], env={**plain, **given}, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


def test_threads_sleep_and_few_kernels_are_kept_from_before_torch_is_loaded() -> None:
    assert after("import fitune, sys\nassert 'torch' not in sys.modules") == ["PASSIVE", "128", "128"]


def test_what_a_user_set_stays() -> None:
    assert after("import fitune", OMP_WAIT_POLICY="ACTIVE", LRU_CACHE_CAPACITY="1024") == ["ACTIVE", "none", "1024"]
    assert after("import fitune", GOMP_SPINCOUNT="1000")[0] == "none"


def test_a_process_that_has_torch_already_is_left_alone() -> None:
    assert after("import sys\nsys.modules['torch'] = sys\nimport fitune") == ["none", "none", "none"]


KERNELS = """
import fitune, psutil, torch
weights = [torch.ones(64, wide, dtype=torch.bfloat16, requires_grad=True) for wide in (32, 64, 96, 128, 160)]
def work(count):
    for tokens in range(count):
        for w in weights:
            (torch.ones(200 + tokens, w.shape[0], dtype=torch.bfloat16, requires_grad=True) @ w).sum().backward()
    return psutil.Process().memory_info().rss / 2**20
first = work(15)
print(work(60) - first)
"""


def test_the_settings_bound_what_kernels_of_many_sizes_take() -> None:
    """45 sizes: with torch's own bound every kernel is kept, with a small one none of them for long."""
    few, many = (dict.fromkeys(processor.CACHES, bound) for bound in ("8", "1024"))
    grown = [
        float(
            subprocess.run(
                [sys.executable, "-c", KERNELS], env={**os.environ, **given}, capture_output=True, text=True, check=True
            ).stdout
        )
        for given in (few, many)
    ]
    if grown[1] < 12:
        pytest.skip("this processor's bf16 products need no compiled kernels")
    assert grown[0] < grown[1] / 2, grown


@pytest.mark.parametrize(
    ("busy", "threads", "available", "level", "fix"),
    [
        (0.1, 2, 2, "ok", None),
        (1.0, 2, 2, "warn", "OMP_NUM_THREADS=1"),
        (1.0, 1, 2, "ok", None),
        (2.0, 1, 2, "warn", "wait"),
        (7.0, 16, 16, "warn", "OMP_NUM_THREADS=9"),
        (0.0, 16, 4, "warn", "OMP_NUM_THREADS=4"),
    ],
)
def test_load_beyond_the_cores_is_a_warning(
    busy: float, threads: int, available: int, level: str, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = environment.machine_load(busy, threads, available)
    assert found.level == level
    assert fix is None or fix in (found.fix or "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    spins = "OMP_WAIT_POLICY=PASSIVE" in (environment.machine_load(busy, threads, available).fix or "")
    assert spins == (level == "warn" and threads > 1)


def test_another_process_at_work_is_seen() -> None:
    since = processor.moment()
    work = "import time\nend = time.time() + 1.5\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    seen = others(since)
    assert 0.3 < seen <= (os.cpu_count() or 1) + 0.2
    since = processor.moment()
    while processor.moment().mine - since.mine < 0.3:  # this one's own work is no load
        pass
    own = processor.moment()
    assert own.mine - since.mine >= 0.3


def test_a_run_says_that_the_cores_are_taken(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "others", lambda since: 99.0)
    seen: list[Any] = []

    class Look(Watcher):
        def findings(self, findings: Any) -> None:
            seen.extend(findings)

    settings = {"model": str(model_folder), "data": [str(data_file)], "max_steps": 1, "output": str(tmp_path / "run")}
    train(build(settings), watch=Look())
    told = [finding for finding in seen if finding.rule == "machine-load"]
    assert [finding.level for finding in told] == ["warn"]  # before the first step; once is enough
    assert "other processes use 99.0 of" in told[0].text
    busy = iter([0.0, 99.0])  # load that comes with the steps is reported after them
    monkeypatch.setattr(processor, "others", lambda since: next(busy))
    seen.clear()
    train(build({**settings, "output": str(tmp_path / "later")}), watch=Look())
    assert [finding.level for finding in seen if finding.rule == "machine-load"] == ["ok", "warn"]
    run = RunFolder(str(tmp_path / "run"))
    assert any(check["rule"] == "machine-load" for check in run.read("checks"))
    rows = {
        row["what"].partition(":")[0]: row for row in report._memory(run.read("plan"), run.read("measured"), 1000.0)
    }
    total, beside = (
        {key: float(row[key].replace(",", "")) for key in ("predicted", "measured")}
        for row in (rows["all tensors of that step"], rows["beside the tensors"])
    )
    assert total["measured"] == pytest.approx(total["predicted"], rel=0.05, abs=0.1)  # the same quantity twice
    assert beside["measured"] == pytest.approx(1000.0 - total["measured"], abs=0.2)
    assert beside["predicted"] == pytest.approx(sum(run.read("plan")["outside"].values()) / 2**20, abs=0.1)


def test_a_peak_counts_from_when_it_is_asked_to() -> None:
    held = bytearray(b"1" * (300 << 20))
    del held
    before = peak_mib(torch.device("cpu"))
    forget_peak(torch.device("cpu"))
    after = peak_mib(torch.device("cpu"))
    if after == before:
        pytest.skip("this system does not let peaks be forgotten")
    assert after < before - 200
    assert after == pytest.approx(resident_mib(), abs=30)
