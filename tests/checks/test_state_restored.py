"""Whatever looks at a model leaves it as it was: the mode of each module, the attention, and what it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fitune.checks import guards, leak, runchecks, savedchecks, stepchecks
from fitune.core.records import Batch
from fitune.data.batches import flat
from fitune.engine.held_out import held_out_loss
from fitune.engine.non_finite import first_non_finite
from fitune.engine.step import hidden_states, loss_sum
from fitune.models import adapters, attached
from fitune.models.kernels.attention import FLAT
from fitune.models.kernels.placed import place
from fitune.models.prepare import checkpoint_blocks, ready
from fitune.models.switches import SDPA, attention, evaluating, training
from support import tiny
from support.contract import config_for, samples

BATCH = flat(samples(), range(5))


def state(model: Any) -> dict[str, Any]:
    """What a check may not change."""
    inner = model.get_base_model()
    flat_state = attached.of(model).flat
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "attention": inner.config._attn_implementation,
        "flat": None if flat_state is None else (flat_state.documents, flat_state.prefix),
        "trains": [name for name, p in model.named_parameters() if p.requires_grad],
        "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        "values": sum(float(p.detach().double().sum()) for p in model.parameters() if p.requires_grad),
    }


def tuned(kind: str) -> Any:
    """A LoRA model in training mode, but for one module."""
    model: Any = adapters.attach(ready(tiny.make_model(kind)), config_for("lora")).train()
    model.get_base_model().base_model.eval()
    return model


LOOKS: dict[str, Callable[[Any, Path], object]] = {
    "nan-hidden": lambda model, _: guards.nan_hidden(model, BATCH, "flat"),
    "start": lambda model, _: guards.start_of(model, samples()),
    "same-at-start": lambda model, _: guards.same_at_start(model, guards.start_of(model, samples()), samples()),
    "grad-reaches": lambda model, _: guards.grad_reaches(model, BATCH, "flat"),
    "accumulation-equality": lambda model, _: guards.accumulation_equality(model, BATCH, "flat"),
    "saved-complete": lambda model, place: (
        adapters.save(model, place),
        savedchecks.saved_complete(model, place, BATCH, "flat"),
    ),
    "packing-leak": lambda model, _: leak.packing_leak(model, samples()),
    "adapter-scale": lambda model, _: runchecks.adapter_scale(model, config_for("lora")),
    "reference-loss": lambda model, _: stepchecks.reference_loss(model, samples(), "flat"),
    "eval-dropout": lambda model, _: stepchecks.eval_dropout(model, BATCH, "flat"),
    "first-non-finite": lambda model, _: first_non_finite(model, [BATCH], "flat"),
    "held-out-loss": lambda model, _: held_out_loss(model, [BATCH]),
    "documents": lambda model, _: hidden_states(model, BATCH, "documents"),
}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_check_leaves_the_model_as_it_was(name: str, kind: str, tmp_path: Path) -> None:
    model = tuned(kind)
    before = state(model)
    LOOKS[name](model, tmp_path / "adapter")
    assert state(model) == before


def test_a_check_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("llama")
    before = state(model)
    monkeypatch.setattr(model.get_base_model().lm_head, "forward", lambda *_: 1 / 0)
    for look in (guards.grad_reaches, stepchecks.eval_dropout):
        with pytest.raises(ZeroDivisionError):
            look(model, BATCH, "flat")
        assert state(model) == before


def test_the_comparison_sees_what_is_left_changed() -> None:
    """Planted: a mode, an attention, a gradient that stay."""
    model = tuned("llama")
    before = state(model)
    model.eval()
    assert state(model) != before
    model = tuned("llama")
    model.get_base_model().set_attn_implementation(FLAT)
    assert state(model)["attention"] != before["attention"]
    model = tuned("llama")
    loss_sum(model, BATCH).backward()
    assert state(model)["gradients"] != before["gradients"]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_switches_are_put_back_by_an_error_too(kind: str) -> None:
    model = tuned(kind)
    before = state(model)
    for switch in (
        attention(model, FLAT, place(BATCH, torch.device("cpu")).documents),
        attention(model, SDPA),
        evaluating(model),
        training(model),
    ):
        with pytest.raises(ZeroDivisionError), switch:
            1 / 0  # noqa: B018
        assert state(model) == before


def gradients(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    loss_sum(model, batch).backward()  # the attention is switched back before the backward pass
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_recomputed_blocks_find_the_attention_of_their_forward_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients bit for bit as without activation checkpointing; others where the attention stays switched
    back (planted)."""

    def made(*, recompute: bool) -> Any:
        torch.manual_seed(0)
        model = adapters.attach(ready(tiny.make_model(kind)), config_for("lora-all")).train()
        family = attached.of(model).family
        assert family is not None
        checkpoint_blocks(model, family, recompute)
        return model

    plain = gradients(made(recompute=False), BATCH)
    again = gradients(made(recompute=True), BATCH)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    monkeypatch.setattr("fitune.models.prepare.recomputed", lambda model: (torch.enable_grad(), torch.enable_grad()))
    wrong: dict[str, torch.Tensor] = {}
    try:
        wrong = gradients(made(recompute=True), BATCH)
    except (torch.utils.checkpoint.CheckpointError, RuntimeError):
        return  # what was kept differs in number or shape
    assert any(not torch.equal(plain[name], wrong[name]) for name in plain)
