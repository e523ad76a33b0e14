"""The plan of a run whose steps several processes share: of the one that takes most, with its buffer of gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fitune
from fitune.commands.advise import advise
from fitune.core.records import Sample
from fitune.data.batches import Loader
from fitune.memory import plan, steps
from fitune.memory.usage import usage
from support import command, contract, measured, tiny

CLOSE = 0.005


@pytest.mark.parametrize("variant", ["full", "lora-all"])
def test_a_process_takes_what_is_planned(variant: str) -> None:
    base: Any = contract.make_base("llama", "fp32")
    config = contract.config_for(variant)
    batch = measured.batch(3, 2)
    asked = plan.Work(config, base.config, [[batch], [batch]], processes=2)
    traced = plan.traced(asked)
    alone = plan.traced(replace(asked, processes=1))
    assert peak(traced) == pytest.approx(measured.really(base, config, asked), rel=CLOSE)
    assert peak(traced) >= peak(alone)


def peak(tracer: Any) -> int:
    """What is measured begins with the method on the model."""
    return int(usage(tracer, without="start").peak.bytes)


def test_the_steps_that_decide_are_those_of_the_process_with_most() -> None:
    lengths = [30, 2, 3, 4, 20, 9, 8, 7]
    samples = [Sample(np.arange(n, dtype=np.int32) + 1, np.arange(n) > 0) for n in lengths]
    loader = Loader(samples, batch_size=4, accumulation=1, seed=0)
    shares = [len(b.ids) for _, step in loader.steps(0, 2) for rank in (0, 1) for b in loader.share(step, rank, 2)]
    decided = steps.deciding(loader, 2, 2)
    assert max(len(batch.ids) for step in decided for batch in step) == max(shares)
    assert max(shares) < max(len(batch.ids) for _, step in loader.steps(0, 2) for batch in step)


def test_the_command_plans_for_a_process(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.save("llama", tmp_path / "llama")
    alone, shared = (
        fitune.plan(model, method="lora", batch_size=8, max_length=256, precision="fp32", workers=n) for n in (1, 4)
    )
    assert shared.needed < alone.needed
    data = tiny.write_rows(tmp_path / "rows.jsonl", 20)
    for typed in (["--workers", 0], ["--workers", 2, "--gpus", 2], ["--workers", 2, "--verify"]):
        code, _, err = command.run(["plan", model, "--data", data, *typed], capsys, monkeypatch)
        assert code == 2, typed
        assert "process" in err


def test_the_advice_is_for_each_of_the_processes(tmp_path: Any) -> None:
    model, data = tiny.save("llama", tmp_path / "llama"), tiny.write_rows(tmp_path / "rows.jsonl", 20)
    found = advise(str(model), data=[str(data)], gpu="24GB", workers=4, only_best=True, method="lora", batch_size=8)
    best = found.suggestions[0]
    assert best.micro_batch == 2  # of 8 rows of a step
    assert best.accumulation == 4
    assert best.plan.parallel == "replicate"
    assert found.command.endswith("--gpus 4")
    (one,) = [one for one in found.advice if one.about == "processes"]
    assert "each of 4 processes has the whole model, and about 2 of the 8 rows" in one.text
