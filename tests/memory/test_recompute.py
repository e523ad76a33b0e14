"""Which blocks are recomputed: the cheapest set that fits, by plans that hold; time falls as the budget grows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, PreTrainedModel

from fitune.core.blocks import AUTO, chosen, named, text
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError
from fitune.core.plan import Moment, Plan
from fitune.engine.step import make_gradients
from fitune.memory import heap, plan, recompute
from fitune.memory.device import Device
from fitune.memory.host import PaperHost
from fitune.memory.recompute import Price, cheapest, fewest
from fitune.memory.usage import usage
from fitune.models import adapters, families, methods
from fitune.models.interfaces import causal_lm
from fitune.models.kernels.target import AMPERE
from fitune.models.offload import Host, Waits
from fitune.models.parts import first_trained
from fitune.models.prepare import checkpoint_blocks
from support import contract, tiny
from support.measured import batch, executed, really

BLOCKS, CLOSE = 6, 0.005
BUDGETS = 5 if os.environ.get("FITUNE_TESTS") == "full" else 3
DEVICE = Device("a machine", "cpu", None)
HERE = Price(None, apart=False, main=None)


def shape(blocks: int = BLOCKS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


# ---- the numbers of blocks ----


def test_a_setting_means_blocks_and_blocks_a_setting() -> None:
    assert chosen(True, 3) == chosen(1, 3) == {0, 1, 2}
    assert chosen(False, 3) == set()
    assert chosen(2, 5) == {1, 3}
    assert chosen("0-1,4-4", 5) == {0, 1, 4}
    assert named([4, 0, 1]) == "0-1,4-4"
    assert named([]) is False
    assert [text(one) for one in ([], [3], [0, 1, 2], [0, 1, 4])] == [
        "no block", "block 3", "blocks 0 to 2", "blocks 0 to 1 and 4",
    ]  # fmt: skip
    for wrong in ("3-2", "0-5"):
        with pytest.raises(ConfigError, match="a first and a last block of 0 to 4"):
            chosen(wrong, 5)


@given(st.sets(st.integers(0, 40)))
def test_what_is_named_is_what_is_chosen(numbers: set[int]) -> None:
    assert chosen(named(numbers), 41) == numbers


# ---- the search, over plans that are made up ----


def planned(needed: Callable[[int, int], int], budget: int, asked: list[tuple[int, int]] | None = None) -> Any:
    """Plans of a model of 40 blocks, by how many are recomputed and how many wait."""

    def make(how: recompute.How) -> Plan:
        again, away = (len(chosen(how[name], 40)) for name in ("checkpointing", "offload"))
        if asked is not None:
            asked.append((again, away))
        moment = Moment("loss", 0, {})
        return Plan(
            "m", "lora", "fp32", "none", "cpu", None, "trace", "", 0, 0, None, 0, 0, [], moment, [], [], 0, None, None,
            None, {}, needed(again, away), budget, {}, host=10 * away,
            recomputed=sorted(chosen(how["checkpointing"], 40)), waiting=sorted(chosen(how["offload"], 40)),
        )  # fmt: skip

    return make


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40),
    st.integers(0, 2000),
)
def test_the_fewest_blocks_that_fit_are_found(saved: list[int], budget: int) -> None:
    """Whatever each block saves, nothing among it."""
    sizes = [1000 - sum(saved[:n]) for n in range(len(saved) + 1)]
    make = planned(lambda again, away: sizes[again], budget)
    made = cheapest(make, range(len(saved)), HERE)
    fitting = [n for n, size in enumerate(sizes) if size <= budget]
    assert made.needed == sizes[fitting[0] if fitting else sizes.index(min(sizes))]
    assert bool(made.fits) == bool(fitting)
    if fitting:
        assert made.recomputed == [*range(fitting[0])]


def test_a_straight_line_takes_four_plans() -> None:
    asked: list[tuple[int, int]] = []
    made = cheapest(planned(lambda again, away: 1000 - 10 * again, 833, asked), range(2, 40), HERE)
    assert (made.recomputed, made.waiting) == ([*range(2, 19)], [])
    assert made.needed == 830
    assert sorted(asked) == [(0, 0), (16, 0), (17, 0), (38, 0)]


def test_nothing_is_recomputed_where_it_is_not_needed_or_of_no_use() -> None:
    for budget, able in ((1000, range(40)), (0, range(40, 40))):
        made = cheapest(planned(lambda again, away: 1000, budget), able, HERE)
        assert made.recomputed == made.waiting == []


def test_main_memory_is_taken_where_recomputation_is_not_enough_or_slower() -> None:
    def needed(again: int, away: int) -> int:
        return 1000 - 10 * again - (10 if away > again else 2) * away

    def found(budget: int, price: Price) -> tuple[int, int]:
        made = cheapest(planned(needed, budget), range(40), price)
        return len(made.recomputed), len(made.waiting)

    gpu = Price(None, apart=True, main=None)
    assert found(600, gpu) == (40, 0)
    assert found(590, gpu) == (40, 5)
    assert cheapest(planned(needed, 590), range(40), HERE).fits is False  # a CPU has no other memory
    # copies take 2 x 400 bytes / LINK seconds
    slow, fast = (800 / recompute.LINK * share for share in (1.1, 0.9))
    known = Price(slow, apart=True, main=10**6)
    assert found(800, known) == (0, 20)
    for price in (
        replace(known, again=fast),
        replace(known, main=None),  # of a machine that is not here nobody knows how much it has
        replace(known, main=300),  # 20 blocks take 200 bytes
        replace(known, apart=False),
    ):
        assert found(800, price) == (20, 0)


def test_a_search_that_stops_one_too_early_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "fewest", lambda plan_of, most: (fewest(plan_of, most) or 0) + 1)
    made = cheapest(planned(lambda again, away: 1000 - 10 * again, 833), range(40), HERE)
    assert made.needed != 830


# ---- which blocks: the first ones ----


def work(changes: dict[str, Any], blocks: int = BLOCKS, *, rows: Sequence[int] = (240,) * 3) -> plan.Work:
    settings = {"method": "lora", "precision": "fp32", "loss_rows": 16, **changes}
    config = build({"model": "-", "data": ["-"], **settings})
    micro = [batch(*rows)] * config.accumulation
    return plan.Work(config, shape(blocks), [[batch(9, 5)], micro])


SETS = [
    {"method": "lora"},
    pytest.param({"method": "full"}, marks=pytest.mark.full),
    pytest.param({"method": "full", "accumulation": 2}, marks=pytest.mark.full),
    pytest.param({"method": "freeze", "freeze": {"blocks": 3}}, marks=pytest.mark.full),
]


@pytest.mark.parametrize("changes", SETS, ids=str)
def test_no_set_of_blocks_takes_less_than_the_first_ones(changes: dict[str, Any]) -> None:
    """Every set of 4 blocks, of those that the backward pass goes through, traced. What enters the first of them needs
    no gradient under LoRA, so that it keeps a hidden state less: so much a set without it may take less."""
    first = 1 if "freeze" in changes else 0
    spare = 4 * 64 * 3 * 240 if changes["method"] == "lora" else 0
    for count in range(1, 4 - first):
        peaks = {
            numbers: usage(plan.traced(work({**changes, "checkpointing": named(numbers)}, 4))).peak.bytes
            for numbers in combinations(range(first, 4), count)
        }
        first_ones = peaks[tuple(range(first, first + count))]
        assert first_ones <= min(peaks.values()) + 1.02 * spare  # rows are rounded up
        assert first_ones == min(size for numbers, size in peaks.items() if first in numbers)
        assert min(peaks.values()) < max(peaks.values())  # and it matters which


@pytest.mark.parametrize(
    ("variant", "kind", "border"),
    [
        ("lora", "llama", 0), ("full", "gpt2", 0), ("prefix", "bloom", 0), ("prompt", "glm", 0), ("bitfit", "opt", 0),
        ("freeze", "llama", 2), ("tail", "qwen2", 3),
    ],
)  # fmt: skip
def test_the_border_is_where_the_backward_pass_ends(variant: str, kind: str, border: int) -> None:
    """Seen by what arrives: blocks below it get no gradient, those from it on do."""
    config = contract.config_for(variant)
    model = adapters.attach(contract.make_base(kind, "fp32"), config)
    seen: list[int] = []

    def arrived(number: int, module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.extend([number] if hidden.requires_grad else [])

    for number, block in enumerate(families.of(model).block_list(causal_lm(model))):
        block.register_forward_hook(partial(arrived, number))
    make_gradients(model, [batch(9, 5)], "flat")
    assert first_trained(model) == min(seen) == border
    assert recompute.able(model, True) == sorted(set(seen))
    seen.clear()
    checkpoint_blocks(model, families.of(model), True)
    make_gradients(model, [batch(9, 5)], "flat")
    assert min(seen) == border  # also where blocks are recomputed


def test_a_frozen_prefix_that_is_differentiated_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers lets what embeddings give require a gradient where blocks are recomputed (planted)."""
    monkeypatch.setattr(PreTrainedModel, "disable_input_require_grads", lambda model: None)
    with pytest.raises(AssertionError):
        test_the_border_is_where_the_backward_pass_ends("tail", "qwen2", 3)


# ---- plans that hold ----


@pytest.fixture
def tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count what torch allocates, which is what is measured here."""
    monkeypatch.setattr(heap, "beside", lambda events, course: {})


def on(budget: float | None, asked: plan.Work) -> Plan:
    """The plan of a machine with so much memory, of which nothing is taken."""
    where = replace(DEVICE, budget=None if budget is None else int(budget))
    return plan.plan(asked, where, name="m", outside={})


def resolved(asked: plan.Work, made: Plan) -> RunConfig:
    return asked.config.model_copy(update={"checkpointing": named(made.recomputed)})


def gradients(base: Any, config: RunConfig, asked: plan.Work) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the largest step, on the real model."""
    torch.manual_seed(0)
    model = adapters.attach(base, config).train()
    checkpoint_blocks(model, families.of(base), config.checkpointing, config.offload)
    torch.manual_seed(1)
    made = make_gradients(model, asked.steps[-1], "flat")
    return made.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


CASES = [
    ("full", "llama", "fp32", "none"),
    pytest.param("prefix", "bloom", "fp32", "none", marks=pytest.mark.full),
    ("freeze", "llama", "fp32", "none"),
    pytest.param("lora-all", "qwen2", "fp32", "nf4", marks=pytest.mark.full),
    pytest.param("tail", "gpt2", "fp32", "none", marks=pytest.mark.full),
    pytest.param("houlsby", "chatglm", "fp32", "none", marks=pytest.mark.full),
    *(
        pytest.param(variant, kind, "fp32", quant, marks=pytest.mark.full)
        for variant in ("lora", "lora-dora", "full", "prompt", "p-tuning", "houlsby", "ia3", "tail", "freeze-patterns")
        for kind in ("qwen2", "gpt2", "bloom", "chatglm", "gemma2", "phi3")
        for quant in ("none", "int8")
        if (variant, kind) not in contract.REFUSED and (quant == "none" or variant in ("lora", "houlsby", "prompt"))
        if (variant, kind, quant) not in (("tail", "gpt2", "none"), ("houlsby", "chatglm", "none"))
    ),
]


@pytest.mark.usefixtures("tensors_alone")
@pytest.mark.parametrize(("variant", "kind", "precision", "quant"), CASES)
def test_between_none_and_all_plans_hold_and_time_falls(variant: str, kind: str, precision: str, quant: str) -> None:
    """Of budgets from the least to the most that is of use: each plan fits, and is what is allocated; the more there
    is the fewer operations are executed; losses and gradients are the same, bit for bit."""
    config = contract.config_for(variant, precision, quant=quant, checkpointing=AUTO)
    asked = plan.Work(config, tiny.make_model(kind).config, [[batch(9, 5)], [batch(*[240] * 6)]])

    def base() -> Any:
        return contract.make_base(kind, precision, methods.find(config.method), quant)

    none = on(None, asked)
    least = on(1, asked)
    assert none.recomputed == []
    assert least.fits is False
    assert least.needed < none.needed or not least.recomputed
    sets: list[list[int]] = []
    spent: list[int] = []
    without = resolved(asked, none)
    first, once = gradients(base(), without, asked), executed(lambda: gradients(base(), without, asked))
    for budget in np.linspace(least.needed, none.needed, BUDGETS):
        made = on(budget, asked)
        assert made.fits
        if made.recomputed in sets:
            continue
        settled = resolved(asked, made)
        sets.append(made.recomputed)
        assert made.allocated == pytest.approx(really(base(), settled, replace(asked, config=settled)), rel=CLOSE)
        found = gradients(base(), settled, asked)
        assert found[0] == first[0]
        assert same(found[1], first[1])
        spent.append(executed(partial(gradients, base(), settled, asked)))
        assert spent[-1] / once - 1 == pytest.approx(made.more_work, abs=0.005)
    assert [len(one) for one in sets] == sorted({len(one) for one in sets}, reverse=True)
    assert len(sets) > 1 or variant == "freeze"  # whose only trained block is there in full in its own backward pass
    assert sets[-1] == []
    assert spent == sorted(set(spent), reverse=True)


# ---- activations that wait in main memory ----


class Elsewhere(Host):
    """Main memory that torch's profiler does not see, as that of a GPU does not see it."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def put(self, flat: torch.Tensor) -> Any:
        self.bytes.append(flat.nbytes)
        return flat.numpy().copy()

    def get(self, kept: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(kept), dtype=like.dtype).copy_(torch.from_numpy(kept))


WAITING = [
    ("lora-all", "llama", "0-1", False),
    ("lora", "gpt2", True, True),
    pytest.param("full", "bloom", True, False, marks=pytest.mark.full),
    pytest.param("prefix", "chatglm", "0-0", "1-2", marks=pytest.mark.full),
    pytest.param("freeze", "qwen2", True, False, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("variant", "kind", "offload", "checkpointing"), WAITING)
def test_what_waits_in_main_memory_changes_no_bit_and_is_planned(
    variant: str, kind: str, offload: Any, checkpointing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forced on a CPU, with its copies where torch does not count them: the rest is what a plan for a GPU counts as the
    GPU's, and the copies, each rounded up to a power of two, are what it says of main memory."""
    config = contract.config_for(variant, offload=offload, checkpointing=checkpointing)
    plain = config.model_copy(update={"offload": False, "checkpointing": False})
    asked = plan.Work(config, tiny.make_model(kind).config, [[batch(*[240] * 12)]])
    first, found = (gradients(contract.make_base(kind, "fp32"), how, asked) for how in (plain, config))
    assert found[0] == first[0]
    assert same(found[1], first[1])
    monkeypatch.setattr(plan, "PaperHost", lambda tracer, *, apart: PaperHost(tracer, apart=True))
    tracer, host = plan.traced(asked), Elsewhere()
    expected = usage(tracer, without="start").peak.bytes
    assert expected == pytest.approx(really(contract.make_base(kind, "fp32"), config, asked, host), rel=CLOSE)
    assert expected < usage(plan.traced(replace(asked, config=plain)), without="start").peak.bytes
    assert tracer.host_most == sum(1 << (size - 1).bit_length() for size in host.bytes) > 0


def test_a_storage_is_copied_once_whatever_is_saved_of_it() -> None:
    """Views of one storage, and what is written into between: a second copy."""
    host = Elsewhere()
    waits, layer = Waits(host), torch.nn.Linear(8, 8)
    x = torch.randn(5, 8, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        one, other = y.split(4, dim=1)
        z = (one * other).sum() + (y * y).sum()
        written = y.detach()
        written.add_(0)
        return z + (layer(y.detach()) * 2).sum() + (written * x).sum()

    loss = waits.run(layer, None, forward, x)
    assert host.bytes == [160, 160]
    loss.backward()
    del loss
    assert all(there() is None for _, there in waits._known.values())


def test_a_plan_for_a_gpu_counts_what_waits_apart() -> None:
    """Copies that were counted as the GPU's would save nothing (planted)."""
    config = contract.config_for("lora", "bf16", offload=True)
    asked = plan.Work(config, tiny.make_model("llama").config, [[batch(*[240] * 12)]])
    plain = replace(asked, config=config.model_copy(update={"offload": False}))
    away, kept = (usage(plan.traced(one, AMPERE)).peak.bytes for one in (asked, plain))
    assert away < kept
    beside = usage(plan.traced(asked)).peak.bytes  # on a CPU, where the copies are the device's
    assert beside >= usage(plan.traced(plain)).peak.bytes
