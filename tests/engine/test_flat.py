"""A flat batch is the same as its documents apart; accumulation never changes the objective. Faults are planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from fitune.checks.leak import packing_leak
from fitune.core.records import Batch, Layout, Sample
from fitune.data.batches import flat, rounded
from fitune.engine.held_out import held_out_loss
from fitune.engine.step import label_hidden, loss_sum, training_step
from fitune.models.kernels import frozen_head
from fitune.models.kernels import loss as loss_kernel
from fitune.models.kernels.attention import FLAT
from fitune.models.kernels.loss import label_loss
from fitune.models.switches import SDPA, attention
from support import tiny

LENGTHS = (5, 1, 17, 3, 40, 9, 2, 28, 64)
KINDS = ("llama", "qwen2", "gpt2")


def samples(vocabulary: int = 400) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(5, vocabulary, n).astype(np.int32), np.arange(n) >= n // 3) for n in LENGTHS]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[n] - b[n]).norm() for n in a]).norm() / torch.stack([b[n].norm() for n in b]).norm())


def separate(model: Any, data: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and summed loss by transformers' own forward, one document at a time."""
    logits, total = [], torch.zeros(())
    for one in data:
        alone = flat([one], [0])
        with attention(model, SDPA):
            out = model(input_ids=torch.from_numpy(alone.ids)[None]).logits[0]
        logits.append(out)
        rows, labels = torch.from_numpy(alone.label_rows), torch.from_numpy(alone.labels)
        total = total + torch.nn.functional.cross_entropy(out[rows], labels, reduction="sum")
    return torch.cat(logits), total


def packed_logits(model: Any, batch: Batch) -> torch.Tensor:
    with attention(model, FLAT):
        hidden = model.base_model(
            input_ids=torch.from_numpy(batch.ids)[None],
            position_ids=torch.from_numpy(batch.positions)[None],
            cu_seq_lens_q=torch.from_numpy(batch.bounds),
            use_cache=False,
        ).last_hidden_state
    return model.get_output_embeddings()(hidden)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_loss_and_gradients_equal_separate_ones(kind: str) -> None:
    model, data = tiny.make_model(kind), samples()
    batch = flat(data, range(len(data)))
    logits, total = separate(model, data)
    total.backward()
    expected = gradients(model)
    assert torch.allclose(packed_logits(model, batch), logits, atol=1e-5)
    model.zero_grad(set_to_none=True)
    flat_total = loss_sum(model, batch)
    flat_total.backward()
    assert abs(flat_total.item() - total.item()) < 1e-5 * total.item()
    assert relative(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["bounds", "positions"])
def test_documents_that_see_each_other_or_do_not_restart_are_noticed(kind: str, fault: str) -> None:
    model, data = tiny.make_model(kind), samples()
    good = flat(data, range(len(data)))
    whole: dict[str, Any] = {"bounds": good.bounds, "positions": good.positions}
    whole[fault] = np.array([0, len(good.ids)], np.int32) if fault == "bounds" else np.arange(len(good.ids))
    bad = Batch(good.ids, whole["positions"], whole["bounds"], good.label_rows, good.labels, good.rows)
    logits, _ = separate(model, data)
    difference = (packed_logits(model, bad) - logits).abs().max().item()
    if kind != "gpt2" and fault == "positions":
        # rotary positions are relative: a constant shift of a document changes nothing but rounding
        assert difference < 1e-3
    else:
        assert difference > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_have_the_gradient_of_one_batch(kind: str) -> None:
    model, data = tiny.make_model(kind), samples()
    whole = run_step(model, [flat(data, range(9))])
    parts = run_step(model, [flat(data, [0, 1]), flat(data, [2, 3, 4, 5]), flat(data, [6]), flat(data, [7, 8])])
    assert relative(parts, whole) < 1e-6


def test_the_mean_of_micro_batch_means_would_be_noticed() -> None:
    model, data = tiny.make_model("llama"), samples()
    whole = run_step(model, [flat(data, range(9))])
    model.zero_grad(set_to_none=True)
    batches = [flat(data, [0, 1]), flat(data, range(2, 9))]
    for batch in batches:  # the fault: each micro-batch is averaged on its own
        (loss_sum(model, batch) / batch.targets / len(batches)).backward()
    assert relative(gradients(model), whole) > 1e-2


class Capture(torch.optim.SGD):
    """Keeps the gradients that a step would apply."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # its loss is not asked for
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["padded", "documents"])
def test_every_layout_has_the_same_loss_and_gradients(kind: str, layout: Layout) -> None:
    model, data = tiny.make_model(kind), samples()
    batch = flat(data, range(9))
    loss_sum(model, batch).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    loss_sum(model, batch, layout).backward()
    assert relative(gradients(model), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_leak_probe_passes_flat_batches(kind: str) -> None:
    layout, finding = packing_leak(tiny.make_model(kind), samples()[2:])
    assert (layout, finding.level) == ("flat", "ok")


def test_the_leak_probe_finds_a_model_that_leaks_and_takes_another_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # the fault: one document over all bounds
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("leaking", leaking)
    monkeypatch.setattr("fitune.engine.step.FLAT", "leaking")
    model = tiny.make_model("llama")
    layout, finding = packing_leak(model, samples()[2:])
    assert (layout, finding.level) == ("padded", "fixed")
    assert "flat leaks" in finding.text
    _, refused = packing_leak(model, samples()[2:], "flat")
    assert refused.level == "refuse"


def run_step(model: Any, batches: list[Batch]) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    optimizer = Capture(named.values(), lr=0.0)
    training_step(model, batches, optimizer, max_grad_norm=1e9)
    return dict(zip(named, optimizer.seen, strict=True))


def test_a_step_that_is_not_finite_is_not_applied() -> None:
    model, data = tiny.make_model("llama"), samples()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters() if "norm.weight" not in n}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert not training_step(model, [flat(data, range(9))], optimizer, 1.0).finite
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("chunk_bytes", [1, 400 * 4 * 7, 2**30])
@pytest.mark.parametrize("train_head", [False, True])
def test_the_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, train_head: bool) -> None:
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 400).requires_grad_(train_head)
    hidden, labels = torch.randn(50, 16, requires_grad=True), torch.randint(400, (50,))
    plain = torch.nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    wanted = torch.autograd.grad(plain / 7, [hidden, *(head.parameters() if train_head else [])])
    chunked = label_loss(head, hidden, labels, 400)
    (chunked / 7).backward()
    got: list[Any] = [hidden.grad, *([p.grad for p in head.parameters()] if train_head else [])]
    assert torch.allclose(chunked, plain, rtol=1e-6)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(label_loss(head, hidden, labels, 400), plain, rtol=1e-6)


def test_the_head_sees_only_rows_with_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny.make_model("llama"), samples()
    batch = flat(data, range(9))
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
    loss_sum(model, batch)  # the head is trained
    assert sum(seen) == rounded(batch.targets) < len(batch.ids)
    see = frozen_head.losses
    monkeypatch.setattr(frozen_head, "losses", lambda head, x, *rest: (seen.append(len(x)), see(head, x, *rest))[1])
    loss_sum(model.requires_grad_(False), batch)
    assert seen.pop() == rounded(batch.targets)
    assert label_hidden(model, batch).shape == (batch.targets, 32)


def test_held_out_loss_does_not_depend_on_the_batches() -> None:
    model, data = tiny.make_model("qwen2"), samples()
    one = held_out_loss(model, [flat(data, range(9))])
    many = held_out_loss(model, [flat(data, [n]) for n in range(9) if data[n].mask[1:].any()])
    assert abs(one - many) < 1e-5
    assert not model.training


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_several_documents_stand_behind_the_first_rows_of_one(kind: str) -> None:
    """A group of answers to one question, between documents that share nothing: as if each were whole."""
    model = tiny.make_model(kind).eval()
    ids = np.random.default_rng(0).integers(5, 300, (5, 9))
    whole = [ids[0], *(np.concatenate([ids[0][:6], one[:3]]) for one in ids[1:4]), ids[4]]
    own = [whole[0], *(one[6:] for one in whole[1:4]), whole[4]]
    shared = np.array([0, 6, 6, 6, 0], np.int32)
    found = []
    for some, begins in ((whole, None), (own, shared)):
        bounds = np.concatenate([[0], np.cumsum([len(one) for one in some])]).astype(np.int32)
        start = np.zeros(5, np.int64) if begins is None else begins
        positions = np.concatenate([np.arange(n, n + len(one)) for n, one in zip(start, some, strict=True)])
        rows = (bounds[1:, None] - np.arange(3, 0, -1)).reshape(-1).astype(np.int64)
        batch = Batch(np.concatenate(some), positions, bounds, rows, rows * 0, tuple(range(5)), shared=begins)
        found.append(label_hidden(model, batch))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
