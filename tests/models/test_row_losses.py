"""Losses of single rows: by blocks of the vocabulary under a frozen matrix, by its own forward under any other head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fitune.models.kernels import frozen_head, row_losses

pytestmark = pytest.mark.unit

ROWS, WIDTH, VOCABULARY = 11, 8, 70


def given(*, trained: bool) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(trained)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
    hidden = torch.randn(ROWS, WIDTH, generator=generator).requires_grad_()
    return head, hidden, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 4, None])
def test_both_ways_give_the_losses_and_gradients_of_all_logits(
    trained: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []
    real = frozen_head.losses
    monkeypatch.setattr(frozen_head, "losses", lambda *args, **how: blocks.append(1) or real(*args, **how))
    head, hidden, labels = given(trained=trained)
    found = row_losses.row_losses(head, hidden, labels, VOCABULARY, rows)
    factors = torch.linspace(-2, 3, ROWS)
    (gradient,) = torch.autograd.grad((found * factors).sum(), hidden)
    expected = F.cross_entropy(head(hidden), labels, reduction="none")
    (right,) = torch.autograd.grad((expected * factors).sum(), hidden)
    assert bool(blocks) != trained
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(gradient, right, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(row_losses.row_losses(head, hidden, labels, VOCABULARY, rows), expected, atol=1e-5)
