"""Work and memory of a step beside their floors: five pairs anew, and what the record of all pairs says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.engine import step
from support.against import module

floor: Any = module("floor")
RECORD = Path(__file__).parents[2] / "results" / "floor.json"
FIVE = [("lora", "llama"), ("prefix", "llama"), ("bitfit", "qwen2"), ("ia3", "glm"), ("p-tuning", "llama")]


# dropout on GPT-2's weights takes whole squares, and its code wants as many rows back as it gave
ABOVE = {"tail-mlp on gpt2"}


@pytest.mark.parametrize(("variant", "kind"), FIVE)
def test_a_step_works_no_more_than_its_floor(variant: str, kind: str) -> None:
    found = floor.measure(variant, kind)
    assert found.executed <= floor.MOST_EXECUTED * found.least  # of a last block that works on label rows alone
    assert found.saved <= floor.MOST_SAVED * found.needed


KEPT_LESS = [("full", "gemma2"), ("lora-dora", "gpt2"), ("peft:LOHA", "llama"), ("lora", "chatglm"), ("freeze", "phi3")]


@pytest.mark.parametrize(("variant", "kind"), KEPT_LESS)
def test_parts_that_keep_less_keep_no_more_than_their_floor(variant: str, kind: str) -> None:
    """Norms, soft caps, dropout, GELU, DoRA, LoHa, one layer for queries, keys and values."""
    found = floor.measure(variant, kind)
    assert found.executed <= floor.MOST_EXECUTED * found.floor
    assert found.saved <= floor.MOST_SAVED * found.needed


def test_work_on_rows_without_a_label_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = floor.measure("lora", "llama")
    monkeypatch.setattr(step, "last_block_is_ready", lambda model: False)
    found = floor.measure("lora", "llama")
    assert found.executed > 1.02 * before.executed
    assert found.executed > floor.MOST_EXECUTED * before.least


def test_a_copy_that_waits_for_the_backward_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, *args: real(x * 1.0, *args) * 1.0)
    plain = floor.measure("lora", "llama")
    assert plain.saved <= floor.MOST_SAVED * plain.needed  # a gated MLP of ours does not go through it
    own = floor.step.label_loss

    def twice(head: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return own(head, torch.square(hidden.exp().log().sqrt()), *rest)

    monkeypatch.setattr(floor.step, "label_loss", twice)
    found = floor.measure("lora", "llama")
    assert found.saved > floor.MOST_SAVED * found.needed


def test_the_record_holds_every_pair_and_names_what_is_above() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    names = {f"{variant} on {kind}" for variant, kind in floor.pairs()}
    assert set(record["pairs"]) == names
    assert {name for name, found in record["pairs"].items() if floor.over(found)} <= ABOVE
