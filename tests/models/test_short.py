"""Attention of short documents in 16 bits on a CPU: as exact as torch's own, and kept in 16 bits."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fitune.models.kernels import apart, short
from fitune.models.kernels.attention import attend, flat_attention
from fitune.models.kernels.target import AMPERE, planned
from fitune.models.kernels.written import How

pytestmark = pytest.mark.unit
HALF = [torch.bfloat16, torch.float16]
PLAIN = How(0.0, None, None, None, None)


def heads(length: int, count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, length, count, 16).to(dtype).transpose(1, 2).requires_grad_()


def by_torch(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def gradients(given: list[Tensor], grad: Tensor) -> list[Tensor]:
    query, key, value = given
    out = attend(query, key, value, PLAIN)
    return [out, *torch.autograd.grad(out, given, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys", "length"), [(4, 4, 70), (6, 2, 33), (4, 2, 2)])
def test_it_is_nearer_to_float64_than_torchs_own(
    dtype: torch.dtype, queries: int, keys: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    given = [heads(length, count, dtype) for count in (queries, keys, keys)]
    grad = torch.randn(1, queries, length, 16).to(dtype)
    mine = gradients(given, grad)
    monkeypatch.setattr(short, "LONGEST", 0)
    torchs = gradients(given, grad)
    exact = [one.detach().double().requires_grad_() for one in given]
    out = by_torch(*exact)
    right = [out.detach(), *torch.autograd.grad(out, exact, grad.double())]
    for one, other, wanted in zip(mine, torchs, right, strict=True):
        assert one.dtype == other.dtype == dtype
        errors = [float((got.detach().double() - wanted).norm() / wanted.norm()) for got in (one, other)]
        assert errors[0] <= 1.05 * errors[1] <= 0.02


def test_one_row_sees_all_keys() -> None:
    query, key, value = heads(1, 4), heads(9, 2), heads(9, 2)
    right = by_torch(query.float(), key.float(), value.float(), causal=False)
    assert torch.allclose(attend(query, key, value, PLAIN).float(), right, atol=2e-2)


def test_it_keeps_16_bits_and_a_number_for_each_row() -> None:
    given = [heads(100, 4) for _ in range(3)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        attend(given[0], given[1], given[2], PLAIN)
    sizes = sorted(one.numel() * one.element_size() for one in kept)
    assert sizes == [4 * 100 * 4, *[4 * 100 * 16 * 2] * 4]


@pytest.mark.parametrize(
    ("how", "length", "taken"),
    [
        (PLAIN, short.LONGEST, True),
        (PLAIN, short.LONGEST + 1, False),
        (How(0.0, None, 300, None, None), 40, True),
        (How(0.0, None, 30, None, None), 40, False),
        (How(0.1, None, None, None, None), 40, False),
        (How(0.0, None, None, 30.0, None), 40, False),
    ],
    ids=["short", "long", "a wide window", "a narrow window", "dropout", "a soft cap"],
)
def test_it_is_for_short_and_plain_documents(
    how: How, length: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = short.attend
    monkeypatch.setattr(short, "attend", lambda *given: (seen.append(given), real(*given))[1])
    given = [heads(length, 4) for _ in range(3)]
    attend(given[0], given[1], given[2], how)
    attend(given[0].float(), given[1].float(), given[2].float(), how)  # float32 goes torch's way
    with planned(AMPERE):
        attend(given[0], given[1], given[2], how)
    assert len(seen) == taken


def test_documents_of_one_batch_get_no_rows_behind_their_own() -> None:
    lengths, module = [9, 300, 40], torch.nn.Module()
    query, key, value = (heads(sum(lengths), count) for count in (4, 2, 2))
    bounds = torch.tensor([0, *accumulate(lengths)])
    rows: list[int] = []
    real = apart.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "rows", lambda length, one: (rows.append(length), real(length, one))[1])
        out, _ = flat_attention(module, query, key, value, None, cu_seq_lens_q=bounds)
    assert min(rows) == 300  # it alone goes through the kernel of 16 bits
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        alone = [one[:, :, start:end].float() for one in (query, key, value)]
        right = by_torch(*alone).transpose(1, 2)
        assert torch.allclose(out[:, start:end].float(), right, atol=3e-2)


def test_where_it_is_compared_it_rounds_as_torch_does() -> None:
    query, key, value = heads(40, 4), heads(40, 2), heads(40, 2)
    with short.in_16_bits():
        assert torch.equal(attend(query, key, value, PLAIN), by_torch(query, key, value))
    assert not torch.equal(attend(query, key, value, PLAIN), by_torch(query, key, value))
