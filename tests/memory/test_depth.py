"""The trace of a deep model, made from shallow ones, is the trace of the deep model: every event, phase and storage."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from fitune.commands import plan as planning
from fitune.commands.savers import what_helps
from fitune.core.config import build
from fitune.memory import depth, plan, steps
from fitune.memory.usage import usage
from fitune.models.kernels.target import AMPERE, CPU, Target

BLOCKS = 14  # numbers of two digits among them
SHAPE = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EVERY_SECOND = "lora, every second block"
# two blocks repeat, and some are not like the others: so that the shallow models are worth it
DEEPER = {
    EVERY_SECOND: 32, "freeze": 24, "lora, a few blocks": 24, "lora, all but a few": 24, "lora, in main memory": 24,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"targets": "all-linear", "dropout": 0.1}},
    "lora, without dropout": {"lora": {"targets": "all-linear"}},
    "lora, checkpointing": {"method": "lora", "checkpointing": True},
    EVERY_SECOND: {"method": "lora", "checkpointing": 2},
    "lora, a few blocks": {"method": "lora", "checkpointing": "0-2"},
    "lora, all but a few": {"method": "lora", "checkpointing": "0-20"},
    "lora, in main memory": {"method": "lora", "checkpointing": "0-2", "offload": True},
    "lora on nf4": {"method": "lora", "quant": {"name": "nf4"}},
    "full": {"max_grad_norm": 1.0},
    "full, 8-bit states": {"method": "full", "optimizer": "adamw-8bit"},
    "full, in the backward pass": {
        "method": "full", "optimizer": "adafactor", "optimizer_in_backward": True, "max_grad_norm": 0.0,
    },
    "freeze": {}, "prefix": {}, "p-tuning": {}, "prompt": {}, "ia3": {}, "adapter": {},
}  # fmt: skip


def work(way: str, target: Target, shape: Any = SHAPE) -> plan.Work:
    precision = "fp32" if target is CPU else "bf16"
    how = {"method": way.partition(",")[0], "precision": precision, "batch_size": 2, **WAYS.get(way, {})}
    config = build({"model": "-", "data": ["-"], **how, "loss_rows": 64})
    row, several = steps.made_up(1, 16, 512), steps.made_up(2, 48, 512)
    micro = [several] if config.optimizer_in_backward else [several, several]
    return plan.Work(config, shape, [[row], micro], several)


def ways() -> list[Any]:
    """Every way on a target or both; the quick run has both for LoRA, and takes turns for the others: of the methods
    that add to each block one, of blocks that are recomputed every second one and the first few, of states in fewer
    numbers Adafactor's, and of those with virtual tokens the one that has some in each block."""
    alike = (
        "lora, without dropout", "lora, checkpointing", "lora, a few blocks", "lora, all but a few",
        "lora, in main memory", "full, 8-bit states", "p-tuning", "prompt", "ia3",
    )  # fmt: skip
    some = {(way, target) for way, target in zip(WAYS, (CPU, AMPERE) * len(WAYS), strict=False) if way not in alike}
    some |= {("lora", CPU), ("lora", AMPERE), ("full, in the backward pass", AMPERE), (EVERY_SECOND, CPU)}
    some |= {("lora, in main memory", AMPERE)}
    return [
        pytest.param(way, target, id=f"{way}-{name}", marks=[] if (way, target) in some else pytest.mark.full)
        for way in WAYS
        for target, name in ((CPU, "cpu"), (AMPERE, "cuda"))
    ]


@pytest.mark.parametrize(("way", "target"), ways())
def test_a_trace_from_shallow_models_is_the_trace(way: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "full, in the backward pass" and target is CPU:
        pytest.skip("updates end in no order that repeats: the whole model is traced")
    if way == EVERY_SECOND and target is AMPERE:
        pytest.skip("two shallow traces do not differ by stretches that repeat: the whole model is traced")
    asked = work(way, target, LlamaConfig(**{**SHAPE.to_dict(), "num_hidden_layers": DEEPER.get(way, BLOCKS)}))
    whole = plan.traced(asked, target)
    monkeypatch.setattr(plan, "traced", lambda *how: pytest.fail("the whole model is traced"))
    made = plan.deep(plan.without_values(asked), asked, target)
    assert made.course == whole.course
    assert made.blocks == whole.blocks
    assert made.events == whole.events
    assert usage(made) == usage(whole)
    assert (made.host_most, made.once, made.again) == (whole.host_most, whole.once, whole.again)
    assert (made.host_most > 0) == (way == "lora, in main memory" and target is AMPERE)


def test_of_blocks_that_are_not_alike_the_whole_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert depth.cut(["a"] * 17) == depth.Cut(3, 14, 1)
    assert depth.cut(["a"] * 6) is None  # two shallow ones would be more
    assert depth.cut([str(n) for n in range(40)]) is None
    assert depth.cut(["b", *"a" * 30, "c"]) == depth.Cut(4, 27, 1)
    assert depth.cut(list("ab" * 20)) == depth.Cut(6, 34, 2)
    asked = work("lora", CPU)
    model: Any = plan.without_values(asked)
    blocks = model.base_model.model.model.layers
    for number, block in enumerate(blocks):
        block.self_attn.scaling = float(number)  # so that no two are alike
    seen: list[int] = []
    real = plan.traced
    monkeypatch.setattr(plan, "traced", lambda *how: seen.append(how[0].model_config.num_hidden_layers) or real(*how))
    plan.deep(model, asked)
    assert seen == [BLOCKS]


def test_what_does_not_repeat_is_not_believed() -> None:
    """Planted: one block of the deeper shallow model does something else, or frees in another order."""
    asked = work("lora", CPU)
    out = BLOCKS - 3
    shapes = (depth.shallow(SHAPE, BLOCKS, 3, left_out) for left_out in (out, out - 1))
    low, high = (plan.traced(replace(asked, model_config=shape, deep=SHAPE), CPU) for shape in shapes)
    made = depth.deepened(low, high, out - 1)
    assert made is not None
    assert made.events == plan.traced(asked).events
    odd: list[Any] = deepcopy([high.blocks, high.events, high.course])
    at = next(n for n, block in enumerate(high.blocks) if ".2.mlp" in block.module)
    high.blocks[at].op = "aten::odd"
    assert depth.deepened(low, high, out - 1) is None
    high.blocks, high.events, high.course = deepcopy(odd)
    high.events[-1], high.events[-40] = high.events[-40], high.events[-1]
    assert depth.deepened(low, high, out - 1) is None


@pytest.mark.full
def test_a_miss_traces_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with 24 blocks two small ones for each question; and its weights are counted once for each method."""
    traced: Counter[int] = Counter()
    built: Counter[int] = Counter()
    started, without = plan.started, plan.without_values

    def start(asked: plan.Work, *how: Any) -> Any:
        traced[asked.model_config.num_hidden_layers] += 1
        return started(asked, *how)

    def build_(asked: plan.Work) -> Any:
        built[len(asked.steps)] += 1  # none: to count weights
        return without(asked)

    monkeypatch.setattr(plan, "started", start)
    monkeypatch.setattr(plan, "without_values", build_)
    missed = planning.answer("qwen2.5-0.5b", gpu="4GB", method="lora")
    assert missed.plan.fits is False
    helps = what_helps(missed)
    assert len(helps.savers) >= 4
    assert set(traced) <= {3, 4, 5, 6}, traced
    assert sum(traced.values()) == 2 * built[2]
    assert built[0] <= 5, built  # as it is; 8 bits; 4 bits; freeze; 16 bits
