"""Hidden states of frozen blocks, kept for later epochs: the same bits for less work; and when they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.checks import frozencheck
from fitune.core.config import build
from fitune.core.errors import TrainingError
from fitune.core.records import Sample
from fitune.data.batches import flat, split
from fitune.engine import frozen_states
from fitune.engine.frozen_states import FrozenStates, states_of
from fitune.engine.state_store import InMemory, OnDisk, Store
from fitune.engine.step import SFT, Answers, Objective, last_block_is_ready, make_gradients
from fitune.memory import flops, frozen
from fitune.models import adapters, families
from fitune.models.frozen_blocks import below
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.parts import trainable
from fitune.models.prepare import checkpoint_blocks, ready
from fitune.models.tensors import same_bits
from support import elsewhere, tiny
from support.measured import executed

LENGTHS = (9, 5, 17, 12, 30, 7)
EPOCHS = ((0, 1, 2), (3, 4, 5)), ((5, 2), (4, 0, 3, 1)), ((1, 4, 5, 3), (0, 2))
TAIL: dict[str, Any] = {"method": "tail", "tail": {"blocks": 1}}


def samples(lengths: Sequence[int] = LENGTHS) -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(random.integers(9, 380, n).astype(np.int32), np.arange(n) > 2) for n in lengths]


def no_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tuned(kind: str, precision: str = "fp32", **settings: Any) -> CausalLM:
    given = {
        "model": "m",
        "data": ["d"],
        "precision": precision,
        "method": "freeze",
        "freeze": {"blocks": 1},
        **settings,
    }
    base = no_dropout(tiny.make_model(kind))
    base.config.attention_dropout = base.config.attn_pdrop = 0.0
    if precision == "bf16":
        base = base.to(torch.bfloat16)
    model = adapters.attach(ready(base, precision), build(given))
    checkpoint_blocks(model, families.of(causal_lm(model)), given.get("checkpointing", False))
    return model.train()


def must_keep_bits(model: CausalLM) -> None:
    """Rows have the same bits in all batches: so it was measured with AVX512, without AMX and with the tested versions
    (transformers 5.17's OPT draws a number for each block); elsewhere the trial decides."""
    reason, other = why(model), elsewhere.than_measured("torch", "transformers")
    if reason is not None and other is not None:
        pytest.skip(f"with {other}: {reason}")
    assert reason is None


def memory(lengths: Sequence[int] = LENGTHS) -> Callable[[int, torch.dtype], Store]:
    return lambda width, dtype: InMemory(sum(lengths), width, dtype)


def epochs(model: CausalLM, objective: Objective, parts: int = 1) -> list[torch.Tensor]:
    """Losses and gradients of the steps of some epochs."""
    rows, found = samples(), []
    for epoch in EPOCHS:
        for micro in epoch:
            made = make_gradients(model, [flat(rows, micro)], "flat", objective=objective)
            found.append(made.total)
            found += [p.grad.clone() for p in trainable(model).values() if p.grad is not None]
            model.zero_grad(set_to_none=True)
    return found


def calls(model: CausalLM) -> list[int]:
    """How often the MLP of each block is run, counted from now on."""
    inner = causal_lm(model)
    family = families.of(inner)
    found = [0] * len(family.block_list(inner))

    def count(number: int, *_: object) -> None:
        found[number] += 1

    for number, block in enumerate(family.block_list(inner)):
        block.get_submodule(family.mlp_out).register_forward_hook(partial(count, number))
    return found


@pytest.mark.parametrize(
    ("kind", "precision", "settings"),
    [
        ("llama", "fp32", {}),
        ("llama", "bf16", {}),
        ("llama", "fp32", {"checkpointing": True}),
        ("bloom", "fp32", {}),
        ("chatglm", "fp32", {}),
        ("gemma2", "bf16", TAIL),
        ("gpt2", "fp32", TAIL),
        ("qwen2", "fp32", {"method": "tail", "tail": {"kind": "mlp"}}),
    ],
)
def test_later_epochs_have_the_same_losses_and_gradients(kind: str, precision: str, settings: dict[str, Any]) -> None:
    expected = epochs(tuned(kind, precision, **settings), SFT)
    model = tuned(kind, precision, **settings)
    must_keep_bits(model)
    count = below(model)
    assert count == (2 if settings.get("method") != "tail" or "kind" in settings["tail"] else 3)
    last_block_is_ready(model)
    ran = calls(model)
    states = FrozenStates(count, LENGTHS, memory())
    found = epochs(model, Answers(states))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert ran[:count] == [3] * count  # the first epoch's two batches, and one more to compare
    assert min(ran[count:]) >= 6


@pytest.mark.parametrize("make", ["memory", "disk"])
def test_states_come_back_bit_for_bit(make: str, tmp_path: Path) -> None:
    store: Store = InMemory(9, 4, torch.bfloat16) if make == "memory" else OnDisk(tmp_path, 4, torch.bfloat16)
    rows = torch.randn(5, 4).to(torch.bfloat16)
    rows[0, 0], rows[1, 1] = float("nan"), -0.0
    store.write(3, rows)
    out = torch.empty_like(rows)
    assert store.read(3, out)
    assert same_bits(rows, out)
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_from_the_disk_is_the_same_and_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    must_keep_bits(tuned("llama"))
    expected = epochs(tuned("llama"), SFT)
    stores: list[OnDisk] = []

    def make(width: int, dtype: torch.dtype) -> Store:
        stores.append(OnDisk(tmp_path, width, dtype))
        return stores[0]

    states = FrozenStates(2, LENGTHS, make)
    model = tuned("llama")
    assert same(epochs(model, Answers(states)), expected)
    ran = calls(model)
    file = next(tmp_path.glob("*/states.bin"))
    damaged = bytearray(file.read_bytes())
    damaged[70] ^= 1
    file.write_bytes(damaged)
    assert same(epochs(model, Answers(states)), expected)
    assert ran[0] == 1  # the batch with the damaged row
    with file.open("r+b") as cut:
        cut.truncate(100)
    assert same(epochs(model, Answers(states)), expected)
    states.close()
    assert list(tmp_path.iterdir()) == []


def same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def test_a_full_disk_ends_the_keeping_and_changes_nothing(tmp_path: Path) -> None:
    class Full(InMemory):
        def write(self, first: int, rows: torch.Tensor) -> None:
            if first > 20:
                raise OSError(28, "No space left on device")
            super().write(first, rows)

    messages: list[str] = []
    must_keep_bits(tuned("llama"))
    states = FrozenStates(2, LENGTHS, lambda width, dtype: Full(sum(LENGTHS), width, dtype), messages.append)
    assert same(epochs(tuned("llama"), Answers(states)), epochs(tuned("llama"), SFT))
    assert states.off
    assert "No space left" in messages[0]


def test_a_micro_batch_in_parts_finds_its_rows() -> None:
    must_keep_bits(tuned("llama"))
    states, model, rows = FrozenStates(2, LENGTHS, memory()), tuned("llama"), samples()
    whole = flat(rows, (0, 1, 2, 3))
    make_gradients(model, [whole], "flat", objective=Answers(states))
    ran = calls(model)
    found = make_gradients(model, split(whole, 3), "flat", objective=Answers(states))
    assert ran[0] == 1  # the one that is compared
    expected = make_gradients(tuned("llama"), split(whole, 3), "flat")
    assert torch.equal(found.total, expected.total)


def test_blocks_that_changed_meanwhile_end_the_run() -> None:
    states, model, batch = FrozenStates(2, LENGTHS, memory()), tuned("llama"), flat(samples(), range(6))
    objective = Answers(states)
    make_gradients(model, [batch], "flat", objective=objective)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-3)
    with pytest.raises(TrainingError, match="not those that the model gives now"):
        make_gradients(model, [batch], "flat", objective=objective)


def test_states_that_nobody_asked_for_are_dropped_where_they_differ_at_first() -> None:
    messages: list[str] = []
    states, model = FrozenStates(2, LENGTHS, memory(), messages.append, asked=False), tuned("llama")
    batch = flat(samples(), range(6))
    make_gradients(model, [batch], "flat", objective=Answers(states))
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-3)
    found = make_gradients(model, [batch], "flat", objective=Answers(states))
    assert states.off
    assert messages == ["states of frozen blocks are not kept any longer: they have other bits in another batch"]
    assert torch.equal(found.total, make_gradients(model, [batch], "flat").total)


def test_of_each_epoch_a_batch_is_compared() -> None:
    states, model, batch = FrozenStates(2, LENGTHS, memory()), tuned("llama"), flat(samples(), range(6))
    ran = calls(model)
    for _ in range(frozen_states.EACH // 6 + 3):
        make_gradients(model, [batch], "flat", objective=Answers(states))
    assert ran[0] == 3


# ---- the trial ----

BATCHES = [np.array(rows) for rows in ((0, 1, 2), (5, 2), (4, 0, 3, 1))]


def why(model: CausalLM) -> str | None:
    return frozencheck.refusal(model, samples(), BATCHES, below(model))


def test_the_trial_passes_where_rows_keep_their_bits() -> None:
    model = tuned("llama").eval()
    state = torch.get_rng_state()
    must_keep_bits(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert frozencheck.frozen_states(None, 2, asked=True).level == "ok"


def test_the_trial_finds_dropout_below_the_border() -> None:
    model = tuned("gpt2")
    block = families.of(model).block_list(model)[0]
    next(module for module in block.modules() if isinstance(module, nn.Dropout)).p = 0.1
    assert why(model) == "they draw random numbers (dropout)"
    for asked, level in ((True, "refuse"), (False, "ok")):
        assert frozencheck.frozen_states(why(model), 2, asked=asked).level == level


def test_the_trial_finds_a_block_that_looks_at_other_rows() -> None:
    model = tuned("llama")

    def leaks(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-7 * output.mean()

    families.of(model).block_list(model)[0].register_forward_hook(leaks)
    assert "has other bits in another batch" in (why(model) or "")


def test_the_trial_finds_blocks_that_take_more_than_hidden_states() -> None:
    model = tuned("llama")
    first, _, last = families.of(model).block_list(model)
    kept: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: kept.append(output))
    last.register_forward_hook(lambda module, inputs, output: output + kept[-1].mean())
    assert why(model) == "blocks above them see more than their hidden states"


def test_the_trial_finds_blocks_that_give_more() -> None:
    model = tuned("llama")
    families.of(model).block_list(model)[1].register_forward_hook(lambda *given: (given[2], given[2]))
    assert "gives more than hidden states" in (why(model) or "")


# ---- the work ----


def test_the_last_2_of_16_blocks_take_at_most_a_2_5th_of_the_operations_in_a_later_epoch() -> None:
    shape = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    config = build({"model": "m", "data": ["d"], "method": "freeze", "freeze": {"blocks": 2}})
    model = adapters.attach(ready(LlamaForCausalLM(shape)), config).train()
    last_block_is_ready(model)
    lengths = (60, 40, 50, 70)
    batch, states = flat(samples(lengths), range(4)), FrozenStates(14, lengths, memory(lengths))
    steps = [
        executed(lambda: make_gradients(model, [batch], "flat", objective=Answers(states)))
        for _ in range(3)
    ]  # fmt: skip
    first, compared, later = steps
    assert first / later >= 2.5
    assert compared == first  # once through the blocks to compare
    planned = flops.later(flops.counts(model, config), np.array(lengths), batch.targets / sum(lengths), 14)
    assert abs(planned - later / first) < 0.02


def test_nothing_is_below_a_method_that_trains_at_the_bottom() -> None:
    model = tuned("llama", method="lora")
    assert below(model) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*tiny.FAMILIES, *tiny.MORE])
def test_a_plan_counts_the_bytes_of_the_states(kind: str, precision: str) -> None:
    given = {"model": "m", "data": ["d"], "method": "freeze", "freeze": {"blocks": 1}, "precision": precision}
    model, batch = tuned(kind, precision), flat(samples(), (0, 1))
    states = states_of(model, batch, 2).states
    found = frozen.of_model(model, build(given), batch)
    assert (found.blocks, found.each) == (2, states.shape[2] * states.element_size())
    if precision == "fp32":  # frozen weights in another dtype than the computation
        half = tiny.make_model(kind).to(torch.bfloat16)
        wide = adapters.attach(ready(half, "fp32"), build(given))
        states = states_of(wide, batch, 2).states
        assert frozen.of_model(wide, build(given), batch).each == states.shape[2] * states.element_size()


def test_lora_on_upper_layers_alone_begins_behind_the_lower_ones() -> None:
    upper: dict[str, Any] = {"method": "lora", "lora": {"targets": ["layers.2.self_attn.q_proj"]}}
    expected = epochs(tuned("llama", **upper), SFT)
    model = tuned("llama", **upper)
    assert below(model) == 2
    must_keep_bits(model)
    states = FrozenStates(2, LENGTHS, memory())
    ran = calls(model)
    assert same(epochs(model, Answers(states)), expected)
    assert ran[0] == 3


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", [*tiny.FAMILIES, *tiny.MORE, *tiny.UNKNOWN])
def test_every_family_passes_the_trial_and_keeps_its_bits(kind: str, precision: str) -> None:
    model = tuned(kind, precision)
    must_keep_bits(model)
    states = FrozenStates(below(model), LENGTHS, memory())
    assert same(epochs(model, Answers(states)), epochs(tuned(kind, precision), SFT))


def test_experts_are_refused() -> None:
    """In float32 the trial finds other bits in them; in 16 bits it may not, at these sizes."""
    assert "experts compute as many rows together as a batch sends them" in (why(tuned("qwen3_moe")) or "")
