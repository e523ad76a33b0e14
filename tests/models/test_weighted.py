"""Weights of answers: from a row's flag to the gradient, against a plain reference in float64. Faults are planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from fitune.core.records import Conversation, Layout, Message, Sample, Source
from fitune.data.batches import flat, split
from fitune.data.encode import Encoder
from fitune.data.store import Samples, write_samples
from fitune.data.templates import choose
from fitune.engine.held_out import held_out_loss
from fitune.engine.step import loss_sum, make_gradients
from fitune.models.kernels import loss as loss_kernel
from support import tiny

LENGTHS = (5, 2, 17, 3, 40, 9, 28)
TALK = Conversation(
    (
        Message("user", "Capital of Norland?"),
        Message("assistant", "Oslo", weight=0),
        Message("user", "No"),
        Message("assistant", "Mira", weight=0.25),
        Message("user", "Sure?"),
        Message("assistant", "Yes"),
    ),
    Source("f", 1),
    "messages",
)


def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    made = []
    for n, length in enumerate(LENGTHS):
        weights = random.choice([0.25, 0.5, 1.0, 2.0], length).astype(np.float32)
        ids = random.integers(5, 400, length).astype(np.int32)
        made.append(Sample(ids, np.arange(length) >= length // 3, weights=weights if n % 3 else None))
    return made


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone().double() for name, p in model.named_parameters() if p.grad is not None}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.stack([(a[n] - b[n]).norm() for n in a]).norm() / torch.stack([b[n].norm() for n in b]).norm())


def reference(data: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """sum(weight x loss) / sum(weight) by transformers' own forward in float64, a document at a time."""
    model = tiny.make_model("llama").double()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for one in data:
        ids = torch.from_numpy(one.ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        each = torch.ones(len(ids)) if one.weights is None else torch.from_numpy(one.weights)
        each = (each * torch.from_numpy(one.mask))[1:].double()
        total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * each).sum()
        weight += float(each.sum())
    (total / weight).backward()
    return total.item() / weight, gradients(model)


@pytest.mark.parametrize("layout", ["flat", "padded", "documents"])
@pytest.mark.parametrize("parts", [1, 2, 7])
def test_the_weighted_objective_is_the_reference_however_it_is_split(
    layout: Layout, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", 4 * 400 * 8)  # eight rows a chunk
    data, model = samples(), tiny.make_model("llama")
    loss, expected = reference(data)
    batches = split(flat(data, range(len(data))), parts)
    assert len(batches) == parts
    made = make_gradients(model, batches, layout)
    assert abs(made.loss - loss) < 1e-5 * loss
    assert relative(gradients(model), expected) < 1e-5
    assert abs(held_out_loss(model, batches, layout) - loss) < 1e-5 * loss


def test_weights_that_are_ignored_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = samples(), tiny.make_model("llama")
    loss, expected = reference(data)
    monkeypatch.setattr(
        "fitune.engine.step.label_loss",
        lambda head, hidden, labels, size, _, rows: loss_kernel.label_loss(head, hidden, labels, size, None, rows),
    )
    made = make_gradients(model, [flat(data, range(len(data)))], "flat")
    assert abs(made.loss - loss) > 1e-3 * loss  # a hundred times the bound
    assert relative(gradients(model), expected) > 1e-2


def test_a_mean_by_tokens_instead_of_by_weights_is_noticed() -> None:
    data, model = samples(), tiny.make_model("llama")
    _, expected = reference(data)
    batch = flat(data, range(len(data)))
    (loss_sum(model, batch) / batch.targets).backward()  # the fault
    assert relative(gradients(model), expected) > 1e-2


def test_without_weights_it_is_the_plain_loss() -> None:
    data = [Sample(one.ids, one.mask) for one in samples()]
    batch = flat(data, range(len(data)))
    assert batch.weights is None
    assert batch.weight == batch.targets
    model = tiny.make_model("llama")
    plain = make_gradients(model, [batch], "flat")
    bits = {name: p.grad.clone() for name, p in model.named_parameters()}
    head, rows, labels = model.get_output_embeddings(), torch.randn(30, 32), torch.arange(30)
    right = F.cross_entropy(head(rows).double(), labels, reduction="sum")
    assert abs(loss_kernel.label_loss(head, rows, labels, 400).double() - right) < 1e-6 * right
    model.zero_grad(set_to_none=True)
    ones = [Sample(one.ids, one.mask, weights=np.ones(len(one), np.float32)) for one in data]
    weighted = make_gradients(model, [flat(ones, range(len(ones)))], "flat")
    assert abs(weighted.loss - plain.loss) < 1e-6 * plain.loss
    assert all(torch.allclose(bits[name], p.grad, rtol=1e-4, atol=1e-6) for name, p in model.named_parameters())


def test_answers_of_weight_0_are_context_and_others_carry_theirs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = Encoder(tokenizer, choose("auto", tokenizer))
    sample = encoder.sample(TALK)
    assert sample is not None
    assert tokenizer.decode(sample.ids[sample.mask]) == "Mira<|end|>Yes<|end|>"
    assert "Oslo" in tokenizer.decode(sample.ids[~sample.mask])
    assert sample.weights is not None
    stops = np.flatnonzero(sample.mask & (sample.ids == encoder.stop_id))
    assert sample.weights[stops].tolist() == [0.25, 1.0]
    assert set(sample.weights[sample.mask].tolist()) == {0.25, 1.0}
    plain = encoder.sample(Conversation(TALK.messages[:2] + TALK.messages[4:], TALK.source, "messages"))
    assert plain is not None
    assert plain.weights is None
    write_samples(tmp_path, [[plain, sample], [plain]])
    there = Samples(tmp_path, tiny.as_rows([TALK, TALK]))
    for read in (list(there), [there[n] for n in range(3)]):
        assert [one.weights is None for one in read] == [True, False, True]
        assert read[1].weights is not None
        assert np.array_equal(read[1].weights, sample.weights)
    batch = flat(there, range(3))
    assert batch.weights is not None
    assert len(batch.weights) == len(batch.labels) == batch.targets
    assert batch.weights[batch.labels == encoder.stop_id].tolist() == [1.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize("weights", [(0, 0, 1), (1, 1, 0)])
def test_train_on_last_and_weight_0_hold_together(
    tokenizer: PreTrainedTokenizerFast, weights: tuple[int, int, int]
) -> None:
    turns = [Message(m.role, m.content, weight=weights[n // 2]) for n, m in enumerate(TALK.messages)]
    turns = [m if m.role == "assistant" else Message("user", m.content) for m in turns]
    sample = Encoder(tokenizer, choose("auto", tokenizer), train_on="last").sample(Conversation(tuple(turns)))
    assert (sample is None) == (weights[2] == 0)  # an answer of weight 0 is never trained, not even as the last one
