"""Runs whose blocks to recompute are left to their plan: what is chosen is kept, and changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import fitune
from fitune.cli import flags
from fitune.cli import main as cli
from fitune.commands.train import resume_config, train
from fitune.core import names
from fitune.core.config import build
from fitune.core.errors import ConfigError
from fitune.engine.checkpoint import RunFolder, config_text
from fitune.memory import device, heap
from support.runs import Crash, CrashAt, digest


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much there is beside the process, in bytes; what the process holds is not planned."""
    found = [2**40]
    monkeypatch.setattr(heap, "beside", lambda events, course: {})
    monkeypatch.setattr(device, "here", lambda kind="auto": device.Device("here", "cpu", found[0], here=True))
    return found


def settings(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"max_steps": 3, "save_every": 1, "batch_size": 8, "val_share": 0, "sample_prompts": 0, "max_length": 64}
    return {
        "model": str(model),
        "data": [str(data)],
        "output": str(output),
        "lora": {"dropout": 0.1},
        **fixed,
        **changes,
    }


def losses(run: Path) -> list[float]:
    return [record.loss for record in RunFolder(run).read_steps()]


def test_a_run_keeps_the_blocks_of_its_plan_whatever_is_free_later(
    model_folder: Path, data_file: Path, tmp_path: Path, budget: list[int]
) -> None:
    """The same losses and the same adapter, bit for bit, as with nothing recomputed; stopped, begun anew, resumed."""
    outside: dict[str, int] = {}
    sizes = [
        fitune.plan(model_folder, data=data_file, checkpointing=how, **{
            name: value for name, value in settings(model_folder, data_file, tmp_path).items()
            if name not in ("model", "data", "output")
        }) for how in (False, "0-0", True)
    ]  # fmt: skip
    needed = [made.needed - sum(made.outside.values()) for made in sizes]
    assert needed == sorted(set(needed), reverse=True)
    whole, tight = tmp_path / "whole", tmp_path / "tight"
    train(build(settings(model_folder, data_file, whole)), outside=outside)
    asked = build(settings(model_folder, data_file, tight, checkpointing="auto"))
    budget[0] = needed[1]
    with pytest.raises(Crash):
        train(asked, outside=outside, watch=CrashAt(1))
    assert RunFolder(tight).read("plan")["recomputed"] == [0]
    budget[0] = 2**40  # what is free now decides nothing
    with pytest.raises(Crash):
        train(asked, outside=outside, watch=CrashAt(2))  # the same command once more
    train(resume_config(str(tight), {}), resume=True, outside=outside)
    assert RunFolder(tight).read_config().checkpointing == "0-0"
    assert losses(tight) == losses(whole)
    assert digest(tight) == digest(whole)
    with pytest.raises(ConfigError, match="checkpointing True"):
        resume_config(str(tight), {"checkpointing": True})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpointing": "some"}, "numbers of blocks, the first and the last of each stretch: 0-11"),
        ({"checkpointing": "0-77"}, "a first and a last block of 0 to 23"),
        ({"checkpointing": "auto", "offload": "0-2"}, "--offload beside --checkpointing auto"),
        ({"offload": True, "gpu": None, "device": "cpu"}, "on a CPU activations are in main memory anyway"),
    ],
    ids=str,
)
def test_blocks_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fitune.plan("qwen2.5-0.5b", **{"gpu": "24GB", "max_length": 16, "batch_size": 1, **given})
    assert message in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ("--checkpointing", {"checkpointing": True}),
        ("--checkpointing false", {"checkpointing": False}),
        ("--checkpointing 2", {"checkpointing": 2}),
        ("--checkpointing auto --offload 0-3,8-11", {"checkpointing": "auto", "offload": "0-3,8-11"}),
        ("--gradient-checkpointing offload", {"checkpointing": True, "offload": True}),
    ],
)
def test_blocks_are_typed(typed: str, settings: dict[str, Any]) -> None:
    arguments = ["train", *names.flags(typed.split(), "train")]
    _, bound, _ = cli.app.parse_args(arguments, exit_on_error=False, print_error=False)
    found = flags.typed(bound.arguments["flags"])
    assert found == settings
    config = build({"model": "m", "data": ["d"], **found})
    assert {name: getattr(config, name) for name in settings} == settings
    # as a run folder keeps them
    assert build(yaml.safe_load(config_text(config))) == config
