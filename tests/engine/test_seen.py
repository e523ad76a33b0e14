"""Who sees whom, measured; and the positions that a model is given."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.engine import seen
from fitune.engine.step import place
from fitune.models import adapters
from fitune.models.prepare import ready
from support import tiny
from support.contract import config_for

LENGTHS = (6, 4, 5)


def batch(*documents: list[int]) -> Any:
    made = [Sample(np.array(ids, np.int32), np.arange(len(ids)) > 0) for ids in documents]
    return flat(made, range(len(made)))


def documents() -> Any:
    return batch(*([*range(20 + 10 * n, 20 + 10 * n + length)] for n, length in enumerate(LENGTHS)))


def causal(lengths: tuple[int, ...] = LENGTHS) -> np.ndarray[Any, Any]:
    made = np.zeros((sum(lengths), sum(lengths)), bool)
    for first, end in pairwise(np.cumsum([0, *lengths]).tolist()):
        made[first:end, first:end] = np.tri(end - first, dtype=bool)
    return made


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("layout", ["flat", "documents", "padded"])
def test_documents_see_their_own_past_alone(kind: str, layout: Any) -> None:
    model = ready(tiny.make_model(kind), "fp32")
    assert np.array_equal(seen.sees(model, documents(), layout), causal())
    assert seen.positions(model, documents()).tolist() == [[n for length in LENGTHS for n in range(length)]]


def test_a_window_is_seen() -> None:
    model = ready(tiny.make_model("mistral"), "fp32")
    found = seen.sees(model, batch([*range(30, 42)]))
    assert np.array_equal(found, np.tri(12, dtype=bool) & ~np.tri(12, 12, -8, dtype=bool))


def test_a_prompt_of_chatglm_sees_both_ways_and_its_answer_one() -> None:
    """20 21 [MASK] 22 [MASK] <sop> 30 31 <sop> 40: the positions of the paper (GLM, Du et al. 2022)."""
    model = ready(tiny.make_model("chatglm"), "fp32")
    made = batch([20, 21, 8, 22, 8, 6, 30, 31, 6, 40])
    assert seen.positions(model, made).tolist() == [
        [0, 1, 2, 3, 4, 2, 2, 2, 4, 4],
        [0, 0, 0, 0, 0, 1, 2, 3, 1, 2],
    ]
    expected = np.tri(10, dtype=bool)
    expected[:, :5] = True
    assert np.array_equal(seen.sees(model, made), expected)


def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: documents whose bounds are lost see each other."""
    model = ready(tiny.make_model("llama"), "fp32")

    def joined(model: Any, batch: Any, layout: Any) -> Any:
        return place(model, flat([Sample(batch.ids.astype(np.int32), np.ones(len(batch.ids), bool))], [0]), layout)

    monkeypatch.setattr("fitune.engine.seen.place", joined)
    assert not np.array_equal(seen.sees(model, documents()), causal())


def test_a_model_is_left_as_it_was() -> None:
    model = adapters.attach(ready(tiny.make_model("llama"), "fp32"), config_for("prompt")).train()
    before = [p.detach().clone() for p in model.parameters()]
    assert np.array_equal(seen.sees(model, documents()), causal())  # its virtual tokens are no columns
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks for module in model.modules() if "Embedding" in type(module).__name__)
