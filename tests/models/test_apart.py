"""Attention of all documents as one function on a CPU: the bits of a call for each document, and nothing kept twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fitune.models.kernels import apart
from fitune.models.kernels.apart import Part
from fitune.models.kernels.attention import attend, causal_mask
from fitune.models.kernels.written import How

BOUNDS = [0, 7, 8, 40, 75]
ALONE = 7  # the row of the document that has one token
HEADS, KEYS, WIDTH = 4, 2, 12


def sides(dtype: torch.dtype, queries: int = BOUNDS[-1], prefix: int = 0) -> list[Tensor]:
    """q, k and v as projections give them, a prefix behind them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(queries, HEADS), (BOUNDS[-1], KEYS), (BOUNDS[-1], KEYS), *[(prefix, KEYS)] * 2][: 5 if prefix else 3]
    made = [torch.randn(1, rows, heads, WIDTH, generator=generator).to(dtype) for rows, heads in shapes]
    return [one.transpose(1, 2).requires_grad_() for one in made]


def ours(given: list[Tensor], parts: list[Part], window: int | None = None) -> Tensor:
    mask = partial(causal_mask, width=window, device=given[0].device)
    query, key, value, *prefix = given
    return apart.attend(query, key, value, parts, [mask], 0.3, prefix)


def each(given: list[Tensor], parts: list[Part], window: int | None = None) -> Tensor:
    """A call for each document, by autograd."""
    how = How(0.0, 0.3, window, None, None)
    call: Any = lambda number, q, k, v, ahead: attend(q, k, v, how, ahead)  # noqa: E731
    query, key, value, *prefix = given
    return apart.one_by_one(query, key, value, parts, call, prefix)


def gradients(out: Tensor, given: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), given))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_its_bits_are_those_of_a_call_for_each_document(dtype: torch.dtype, window: int | None) -> None:
    given, parts = sides(dtype), apart.whole(BOUNDS)
    one, other = ours(given, parts, window), each(given, parts, window)
    assert torch.equal(one, other)
    for number, (mine, theirs) in enumerate(zip(gradients(one, given), gradients(other, given), strict=True)):
        if number < 2 and dtype == torch.bfloat16:
            # a token that sees itself alone: nothing of its query and key, and what rounding leaves of that depends on
            # the kernel's sizes where the processor has AMX (here they are 1 and 32)
            assert max(float(side[:, :, ALONE].detach().abs().max()) for side in (mine, theirs)) <= 1e-6
            mine[:, :, ALONE] = theirs[:, :, ALONE]
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix", [0, 3, 30])
@pytest.mark.parametrize("parts", [apart.whole(BOUNDS), [Part(3, 0, 6), Part(20, 9, 39), Part(35, 40, 75)]], ids=len)
def test_queries_at_the_end_of_their_keys_and_a_prefix(parts: list[Part], prefix: int, window: int | None) -> None:
    """Against float64; with rows before the queries where that is less work, and without."""
    count = sum(part.count for part in parts)
    given = sides(torch.float32, count, prefix)
    exact = [one.detach().double().requires_grad_() for one in given]
    one, other = ours(given, parts, window), each(exact, parts, window)
    assert torch.allclose(one.double(), other, atol=1e-6)
    for mine, theirs in zip(gradients(one, given), gradients(other, exact), strict=True):
        assert torch.allclose(mine.double(), theirs, atol=2e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_two_documents_share_give_what_keys_of_their_own_give(
    dtype: torch.dtype, prefix: int, window: int | None
) -> None:
    """Of 7, 1, 32 and 35 tokens: the last one sees the first 20 of the one before it; once a few queries alone."""
    for parts in (apart.whole(BOUNDS, [0, 0, 0, 20]), [Part(3, 0, 6), Part(12, 8, 40), Part(6, 40, 70, 8, 20)]):
        given = sides(dtype, sum(part.count for part in parts), prefix)
        out = ours(given, parts, window)
        exact = [one.detach().double().requires_grad_() for one in given]
        query, key, value, *before = exact
        rows = torch.tensor([n for p in parts for n in (*range(p.lead, p.lead + p.shared), *range(p.first, p.end))])
        edges = [0, *torch.tensor([part.keys for part in parts]).cumsum(0).tolist()]
        alone = [Part(p.count, a, b) for p, a, b in zip(parts, edges[:-1], edges[1:], strict=True)]
        separate = [query, key.index_select(2, rows), value.index_select(2, rows), *before]
        expected, wide = each(separate, alone, window), dtype == torch.float32
        assert torch.allclose(out.double(), expected, atol=1e-6 if wide else 3e-2)
        right = gradients(expected, exact)
        for mine, theirs in zip(gradients(out, given), right, strict=True):
            assert torch.allclose(mine.double(), theirs, atol=2e-5 if wide else 0.1)
        if wide:
            other = each(exact, parts, window)
            assert torch.allclose(other, expected, atol=1e-12)
            for mine, theirs in zip(gradients(other, exact), right, strict=True):
                assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("attended", [ours, each])
def test_queries_behind_all_documents_get_zeros(attended: Any) -> None:
    """Rows that fill label rows up."""
    given, parts = sides(torch.float32, 14), [Part(4, 0, 5), Part(6, 9, 20)]
    fewer = [given[0][:, :, :10].detach().requires_grad_(), *given[1:]]
    out, expected = attended(given, parts), attended(fewer, parts)
    assert torch.equal(out[:, :10], expected)
    assert not out[:, 10:].any()
    weights = torch.randn(out.shape)
    query, key, value = torch.autograd.grad((out * weights).sum(), given)
    fewer_grads = torch.autograd.grad((expected * weights[:, :10]).sum(), fewer)
    assert not query[:, :, 10:].any()
    for mine, theirs in zip((query[:, :, :10], key, value), fewer_grads, strict=True):
        assert torch.equal(mine, theirs)


def test_keys_that_no_query_sees_have_no_gradient() -> None:
    given = sides(torch.float32, 10)
    out = ours(given, [Part(4, 0, 5), Part(6, 9, 20)])
    _, key, value = gradients(out, given)
    for gradient in (key, value):
        assert gradient[:, :, 5:9].abs().max() == gradient[:, :, 20:].abs().max() == 0
        assert (gradient[:, :, 9:20].abs().amax(dim=(0, 1, 3)) > 0).all()


def test_each_side_and_what_comes_out_is_kept_once() -> None:
    given, kept = sides(torch.float32), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
    ):
        ours(given, apart.whole(BOUNDS))
    sums = BOUNDS[-1] * HEADS
    assert sum(one.numel() for one in kept.values()) == sum(one.numel() for one in given) + given[0].numel() + sums


class Calls:
    """torch's operations, and whether the kernel was asked for a causal mask."""

    def __init__(self) -> None:
        self.causal: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, is_causal: bool, **how: Any) -> Any:
            self.causal.append(is_causal)
            return getattr(torch.ops.aten, name)(*args, is_causal=is_causal, **how)

        return call


@pytest.mark.parametrize(("prefix", "causal"), [(3, [True, False, True, True]), (30, [False, False, True, True])])
def test_a_prefix_shorter_than_its_document_takes_the_causal_kernel(
    prefix: int, causal: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7, 1, 32 and 35 tokens: it leaves out what is hidden, which another mask does not."""
    calls = Calls()
    monkeypatch.setattr(apart, "aten", calls)
    ours(sides(torch.float32, prefix=prefix), apart.whole(BOUNDS))
    assert calls.causal == causal
