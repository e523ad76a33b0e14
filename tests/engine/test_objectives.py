"""Preference objectives: losses by their papers' formulas, gradients by plain autograd over all logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fitune.core.config import RunConfig, build
from fitune.core.records import Rewards, Sample
from fitune.data.batches import flat, split
from fitune.data.pairs import Pairs
from fitune.engine import objectives
from fitune.engine.held_out import held_out
from fitune.engine.objectives.base import Preference, Scored, log_probabilities
from fitune.engine.step import make_gradients
from fitune.models import adapters
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import row_losses as kernel
from fitune.models.parts import trainable
from fitune.models.switches import SDPA, attention
from support import contract, tiny
from support.flash import flash_by_hand
from support.preferred import LENGTHS, SETTINGS, pairs


def config_for(name: str, **changes: Any) -> RunConfig:
    return build({"model": "m", "data": ["d"], "objective": name, name: SETTINGS[name], **changes})


def objective_for(name: str) -> Preference:
    found = objectives.of(config_for(name))
    assert isinstance(found, Preference)
    return found


def once(rows: Pairs) -> Pairs:
    """The same rows, each prompt but its last token once for both answers."""
    return Pairs(rows.samples, rows.reference, rows.desirable, np.full(len(rows), 2, np.int32))


# ---- the losses, in float64 and written out ----


def written_out(name: str, scored: Scored) -> list[float]:
    """The losses, from the papers' formulas."""
    s = SETTINGS[name]
    policy, reference, tokens = (one.double().tolist() for one in (scored.policy, scored.reference, scored.tokens))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))

    found = []
    if name == "kto":
        assert scored.desirable is not None
        assert scored.kl is not None
        for p, r, good in zip(policy, reference, scored.desirable.tolist(), strict=True):
            gain = s["beta"] * (p - r - float(scored.kl))
            side = gain if good else -gain
            weight = s["desirable_weight" if good else "undesirable_weight"]
            found.append(weight * (1 - 1 / (1 + math.exp(-side))))
        return found
    for n in range(0, len(policy), 2):
        (pc, pr), (rc, rr), (nc, nr) = (one[n : n + 2] for one in (policy, reference, tokens))
        if name == "dpo":
            x, wrong = s["beta"] * ((pc - rc) - (pr - rr)), s["label_smoothing"]
            found.append(-(1 - wrong) * log_sigmoid(x) - wrong * log_sigmoid(-x))
        elif name == "ipo":
            found.append(((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * s["beta"])) ** 2)
        elif name == "simpo":
            found.append(-log_sigmoid(s["beta"] * pc / nc - s["beta"] * pr / nr - s["gamma"]))
        else:
            odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (pc / nc, pr / nr)]
            found.append(-pc / nc - s["beta"] * log_sigmoid(math.log(odds[0] / odds[1])))
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_each_loss_is_that_of_its_paper(name: str) -> None:
    random = torch.Generator().manual_seed(0)
    policy, reference = (-30 * torch.rand(8, generator=random, dtype=torch.float64) - 1 for _ in range(2))
    tokens = torch.randint(1, 30, (8,), generator=random).double()
    marks = torch.tensor([True, False] * 4) if name == "kto" else None
    scored = Scored(policy, reference, tokens, marks, torch.tensor(0.7, dtype=torch.float64))
    objective = objective_for(name)
    assert objective.kind.losses(scored, objective.options).tolist() == pytest.approx(written_out(name, scored))
    assert objective.kind.rewards(scored, objective.options).shape == (8,)


def test_orpo_keeps_its_digits_where_answers_are_nearly_certain_or_nearly_impossible() -> None:
    from fitune.engine.objectives import orpo

    logs = torch.tensor([-1e-6, -1e-3, -0.5, -math.log(2), -3.0, -60.0], requires_grad=True)
    found = orpo._log_rest(logs)
    assert found.tolist() == pytest.approx([math.log(-math.expm1(x)) for x in logs.tolist()], rel=1e-4)
    found.sum().backward()
    assert logs.grad is not None
    assert torch.isfinite(logs.grad).all()
    assert torch.isfinite(orpo._log_rest(torch.zeros(1))).all()


def test_every_objective_says_what_equal_log_probabilities_cost() -> None:
    assert replace(objective_for("dpo"), options=build({"model": "m", "data": ["d"]}).dpo).of_equal(3) == pytest.approx(
        math.log(2)
    )
    assert objective_for("ipo").of_equal(3) == pytest.approx(1.0)
    assert objective_for("kto").of_equal(2, [True, False]) == pytest.approx((2.0 + 0.5) / 4)


# ---- gradients ----


def plain_sums(model: Any, samples: list[Sample]) -> torch.Tensor:
    """(A,): by transformers' own forward over each document, all logits at once."""
    found = []
    for sample in samples:
        with attention(model, SDPA):
            logits = model(input_ids=torch.from_numpy(sample.ids)[None].long()).logits[0, -len(sample) :]
        each = F.cross_entropy(logits[:-1].float(), torch.from_numpy(sample.ids[1:]).long(), reduction="none")
        found.append(-(each * torch.from_numpy(sample.mask[1:])).sum())
    return torch.stack(found)


def plainly(model: Any, objective: Preference, rows: Pairs) -> torch.Tensor:
    """The mean loss, by autograd over everything."""
    assert rows.reference is not None
    reference, samples = torch.from_numpy(rows.reference), list(rows.samples)
    tokens = torch.tensor([float(sample.mask[1:].sum()) for sample in samples])
    if rows.desirable is None:
        scored = Scored(plain_sums(model, samples), reference.reshape(-1), tokens)
    else:
        with torch.no_grad():
            kl = (plain_sums(model, samples[1::2]) - reference[:, 1]).mean().clamp(min=0)
        marks = torch.from_numpy(rows.desirable)
        scored = Scored(plain_sums(model, samples[0::2]), reference[:, 0], tokens[0::2], marks, kl)
    return objective.kind.losses(scored, objective.options).mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def of_kind(model: Any, rows: Pairs) -> Pairs:
    """Prompts of ChatGLM's first version end in the two tokens that make them prompts."""
    config: Any = causal_lm(model).config
    if config.model_type != "chatglm" or not hasattr(config, "gmask_token_id"):
        return rows
    ends = np.array([config.gmask_token_id, config.bos_token_id], np.int32)
    some = [replace(one, ids=np.concatenate([one.ids[:1], ends, one.ids[3:]])) for one in rows.samples]
    return Pairs(some, rows.reference, rows.desirable)


def compare(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of fitune, in one micro-batch and in three, and those of plain autograd."""
    monkeypatch.setattr(kernel, "chunk_rows", lambda *_: 7)  # several chunks
    objective, rows = objective_for(name), of_kind(model, pairs(name))
    model.eval()
    expected = plainly(model, objective, rows)
    expected.backward()
    theirs = gradients(model)
    whole, shared = flat(rows, range(3)), flat(rows if name == "kto" else once(rows), range(3))
    for batches in ([whole], split(whole, 3), [shared], split(shared, 2)):
        made = make_gradients(model, batches, "flat", objective=objective)
        assert made.loss == pytest.approx(expected.item(), rel=1e-5)
        ours = gradients(model)
        assert ours.keys() == theirs.keys()
        largest = max(float(one.abs().max()) for one in theirs.values())
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in theirs) <= 1e-5 * largest


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_gradients_are_those_of_plain_autograd(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = contract.State(contract.Case(variant, "qwen2", "fp32", "none")).start()
    with torch.no_grad():
        for index, parameter in enumerate(trainable(model).values()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    compare(model, name, monkeypatch)


@pytest.mark.parametrize("kind", [kind for kind in contract.KINDS if kind != "qwen2"])
def test_every_family_takes_preferences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a prompt that is computed once for both answers."""
    compare(contract.State(contract.Case("lora", kind, "fp32", "none")).start(), "dpo", monkeypatch)


@pytest.mark.parametrize(
    ("variant", "quant"), [("prompt", "none"), ("p-tuning", "none"), ("prefix", "none"), ("lora", "nf4")]
)
def test_virtual_tokens_and_few_bits_take_preferences(
    variant: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = contract.State(contract.Case(variant, "llama", "fp32", quant)).start()
    if quant == "none":
        compare(model, "simpo", monkeypatch)
        return
    objective, rows = objective_for("dpo"), pairs("dpo")  # transformers' own forward has other products in few bits
    made = make_gradients(model, [flat(rows, range(3))], "flat", objective=objective)
    whole = gradients(model)
    make_gradients(model, split(flat(rows, range(3)), 3), "flat", objective=objective)
    parts = gradients(model)
    largest = max(float(one.abs().max()) for one in whole.values())
    assert math.isfinite(made.loss)
    assert max(float((whole[n] - parts[n]).abs().max()) for n in whole) <= 1e-5 * largest


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "chatglm"])
def test_a_prompt_that_stands_once_changes_no_more_than_rounding_does(kind: str, precision: str) -> None:
    model = contract.State(contract.Case("lora", kind, precision, "none")).start()
    rows = of_kind(model, pairs("dpo"))
    found = [log_probabilities(model, flat(some, range(3)), "flat") for some in (rows, once(rows))]
    assert torch.allclose(found[0], found[1], rtol=2e-3)


def test_on_a_gpu_a_prompt_that_stands_once_is_keys_of_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents in one call of the kernel, written out."""
    model, rows = contract.State(contract.Case("prefix", "llama", "fp32", "none")).start(), pairs("dpo")
    expected = log_probabilities(model, flat(rows, range(3)), "flat")
    with flash_by_hand(monkeypatch) as calls:
        found = log_probabilities(model, flat(once(rows), range(3)), "flat")
    assert calls
    assert torch.allclose(found, expected, rtol=1e-5)


def test_a_prompt_stands_once_in_flat_batches_alone() -> None:
    batch = flat(once(pairs("dpo")), range(3))
    assert batch.lengths.tolist() == [length for both in LENGTHS for length in both]
    for layout in ("padded", "documents"):
        with pytest.raises(NotImplementedError, match="needs flat batches"):
            held_out(tiny.make_model("llama"), [batch], layout, objective_for("dpo"))


@pytest.mark.parametrize("layout", ["padded", "documents"])
def test_every_layout_gives_the_same_loss(layout: Any) -> None:
    model = tiny.make_model("llama")
    batch, objective = flat(pairs("dpo"), range(3)), objective_for("dpo")
    flat_loss = held_out(model, [batch], "flat", objective).loss
    assert held_out(model, [batch], layout, objective).loss == pytest.approx(flat_loss, rel=1e-5)


# ---- what is measured ----


def test_rewards_are_means_over_all_pairs_however_they_are_cut() -> None:
    model, rows = tiny.make_model("llama").double(), pairs("dpo")  # so that what is cut is seen, and not rounding
    whole, objective = flat(rows, range(3)), objective_for("dpo")
    found = held_out(model, [whole], "flat", objective)
    parts = held_out(model, split(whole, 3), "flat", objective)
    assert isinstance(found.rewards, Rewards)
    assert vars(parts.rewards) == pytest.approx(vars(found.rewards))
    with torch.no_grad():
        sums = plain_sums(model, list(rows.samples)).view(-1, 2)
    assert rows.reference is not None
    gained = 0.3 * (sums - torch.from_numpy(rows.reference))
    assert found.rewards.chosen == pytest.approx(float(gained[:, 0].mean()), rel=1e-4)
    assert found.rewards.margin == pytest.approx(float((gained[:, 0] - gained[:, 1]).mean()), rel=1e-4)
    assert found.rewards.accuracy == pytest.approx(float((gained[:, 0] > gained[:, 1]).float().mean()))
    assert found.rewards.chosen_logp == pytest.approx(float(sums[:, 0].mean()), rel=1e-5)
    assert found.rewards.kl == pytest.approx(float(gained.mean()) / 0.3, rel=1e-4)


def test_the_distance_of_kto_is_that_of_the_whole_step() -> None:
    """Micro-batches do not change the loss: the distance is estimated before the first of them."""
    model, rows = tiny.make_model("llama"), pairs("kto")
    assert rows.reference is not None
    rows = rows.with_reference(rows.reference - np.float32(60))  # far below, so that there is a distance
    whole, objective = flat(rows, range(3)), objective_for("kto")
    one = held_out(model, [whole], "flat", objective)
    three = held_out(model, split(whole, 3), "flat", objective)
    assert one.rewards is not None
    assert one.rewards.kl is not None
    assert one.rewards.kl > 1
    assert three.loss == pytest.approx(one.loss, rel=1e-5)
    alone = [held_out(model, [batch], "flat", objective).loss for batch in split(whole, 3)]
    assert abs(float(np.mean(alone)) - one.loss) > 1e-4  # a distance for each would have been another objective


def test_labelled_answers_of_one_kind_have_no_margin() -> None:
    model, rows = tiny.make_model("llama"), pairs("kto")
    good = Pairs(rows.samples, rows.reference, np.ones(3, np.bool_))
    found = held_out(model, [flat(good, range(3))], "flat", objective_for("kto")).rewards
    assert found is not None
    assert (found.rejected, found.margin, found.rejected_logp) == (None, None, None)
    assert found.chosen is not None


def test_log_probabilities_are_those_of_all_logits() -> None:
    model, rows = tiny.make_model("llama"), pairs("dpo")
    found = log_probabilities(model, flat(rows, [2, 0]), "flat")
    with torch.no_grad():
        sums = plain_sums(model, [rows.samples[n] for n in (4, 5, 0, 1)])
    assert torch.allclose(found, sums, rtol=1e-5)


def test_a_batch_without_a_reference_has_no_loss() -> None:
    model = tiny.make_model("llama")
    batch = flat(Pairs(pairs("dpo").samples), range(3))
    assert math.isnan(held_out(model, [batch], "flat", objective_for("dpo")).loss)
    assert math.isfinite(held_out(model, [batch], "flat", objective_for("simpo")).loss)


def test_the_base_model_is_the_reference_of_an_adapter() -> None:
    """What the adapter has learned does not reach the reference."""
    model = contract.State(contract.Case("lora", "llama", "fp32", "none")).start()
    batch = flat(pairs("dpo"), range(3))
    with adapters.disabled(model):
        before = log_probabilities(model, batch, "flat")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    with adapters.disabled(model):
        assert torch.equal(log_probabilities(model, batch, "flat"), before)
    assert not torch.allclose(log_probabilities(model, batch, "flat"), before)
