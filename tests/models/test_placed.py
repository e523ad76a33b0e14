"""A batch reaches a device in one copy, whatever it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fitune.core.records import Batch, Sample
from fitune.data.batches import flat
from fitune.engine.step import loss_sum, make_gradients
from fitune.models.kernels import placed
from support import tiny


def batch(weighted: bool = False) -> Batch:
    rng = np.random.default_rng(0)
    samples = []
    for length in (5, 1, 12):
        weights = rng.random(length).astype(np.float32) if weighted else None
        samples.append(Sample(rng.integers(5, 300, length).astype(np.int32), np.arange(length) > 1, weights=weights))
    return flat(samples, range(3))


@pytest.mark.parametrize("how", [{}, {"laid": 3}, {"prefix": 4}])
def test_a_packed_batch_is_the_batch(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the buffer, as on a GPU, and without, as on a CPU."""
    plain = placed.place(batch(weighted=True), torch.device("cpu"), **how)

    def through_a_buffer(parts: Any, device: torch.device) -> Any:
        return placed.views(placed.pack(parts, pin=False), parts)

    monkeypatch.setattr(placed, "send", through_a_buffer)
    packed = placed.place(batch(weighted=True), torch.device("cpu"), **how)
    for one, other in zip(vars(plain).values(), vars(packed).values(), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert plain.documents.longest == packed.documents.longest == (12 + how.get("laid", 0), 12 + sum(how.values()))


def test_rows_laid_before_are_distinguished_from_those_of_the_batch() -> None:
    found = placed.place(batch(), torch.device("cpu"), laid=2)
    assert found.order is not None
    assert found.keep is not None
    assert found.order[found.keep].tolist() == list(range(2, 20))
    assert found.documents.bounds.tolist() == [0, 7, 10, 24]
    assert found.positions.tolist() == [*range(7), *range(3), *range(14)]


def test_a_batch_is_one_copy_and_a_step_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on a device that is not the CPU: meta, whose copies hold nothing."""
    copies: list[torch.Tensor] = []
    pack = placed.pack
    monkeypatch.setattr(placed, "pack", lambda parts, pin: copies.append(pack(parts, pin=pin)) or copies[-1])
    there = placed.place(batch(weighted=True), torch.device("meta"), prefix=2)
    assert len(copies) == 1
    assert there.weights is not None
    storages = {t.untyped_storage()._cdata for t in (there.ids, there.labels, there.weights, there.documents.keys)}
    assert len(storages) == 1


def test_losses_of_micro_batches_are_read_at_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny.make_model("llama"), [batch(), batch(weighted=True)]
    expected = sum(loss_sum(model, one).item() for one in made) / sum(one.weight for one in made)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the CPU waits inside of a step"))
    found = make_gradients(model, made, "flat")
    monkeypatch.undo()
    assert found.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.cuda
def test_on_a_gpu_a_placed_batch_holds_the_same_numbers() -> None:
    ways: list[dict[str, Any]] = [{}, {"laid": 3}, {"prefix": 4}]
    for how in ways:
        here, there = (placed.place(batch(weighted=True), torch.device(d), **how) for d in ("cpu", "cuda"))
        for one, other in zip(vars(here).values(), vars(there).values(), strict=True):
            if isinstance(one, torch.Tensor):
                assert other.is_cuda
                assert torch.equal(one, other.cpu())
