"""Parts that keep less for the backward pass: the same values, gradients and draws as what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import FastGELUActivation, NewGELUActivation

from fitune.models import adapters
from fitune.models.kernels import apart, attention, written
from fitune.models.kernels.apart import Part
from fitune.models.kernels.dora import LeanDora
from fitune.models.kernels.loha import CheapLoHa
from fitune.models.kernels.plain import ByteDropout, keep_less
from fitune.models.kernels.written import How
from support.contract import config_for, make_base
from support.measured import executed

HEADS, WIDTH = 4, 8
# the third one sees the first 12 keys of the second, too; the last 2 keys are nobody's
PARTS = [Part(5, 0, 9), Part(30, 9, 39), Part(10, 39, 49, 9, 12), Part(1, 49, 50)]
LOW = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # of the largest


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes of the storages that wait for the backward pass of what it gives."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def close(one: Tensor, other: Tensor, bound: float) -> bool:
    return bool((one.double() - other.double()).abs().max() <= bound * one.double().abs().max())


# ---- activations and dropout ----


@LOW
@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_gelu_by_tanh_is_what_it_was(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"act": kind()})
    x, again = (torch.linspace(-6, 6, 999).to(dtype).requires_grad_() for _ in range(2))
    expected = model["act"](x)
    whole = kept(lambda: model["act"](x))
    assert keep_less(model) == 1
    out = model["act"](again)
    assert kept(lambda: model["act"](again)) == x.nbytes < whole / 2
    for one in (expected, out):
        one.sum().backward()
    assert torch.equal(expected, out)
    assert close(x.grad, again.grad, BOUND[dtype])  # type: ignore[arg-type]  # they are there


@LOW
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_dropout_draws_the_same_and_keeps_a_byte(share: float, dtype: torch.dtype) -> None:
    made = []
    plain, model = nn.Dropout(share), nn.ModuleDict({"drop": nn.Dropout(share)})
    assert keep_less(model) == 1
    assert type(model["drop"]) is ByteDropout
    for module in (plain, model["drop"]):
        x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        torch.manual_seed(3)
        out = module(x)
        out.float().pow(2).sum().backward()
        assert x.grad is not None
        made.append((out, x.grad, torch.rand(3)))
        if 0 < share < 1 and isinstance(module, ByteDropout):
            assert kept(partial(module, x)) == x.numel()
            assert module.eval()(x) is x
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


# ---- attention that is written out ----


def by_autograd(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, how: How) -> Tensor:
    """In single operations."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if how.sinks is None:
        weights = scores.softmax(dim=-1, dtype=torch.float32)
    else:
        column = how.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]
    return F.dropout(weights.to(query.dtype), how.dropout) @ values


HOWS = {
    "soft cap": How(0.0, None, None, 2.0, None),
    "soft cap, window": How(0.0, None, 7, 2.0, None),
    "dropout": How(0.3, None, None, None, None),
    "soft cap, dropout": How(0.3, None, 7, 2.0, None),
    "sinks": How(0.0, None, None, None, torch.linspace(-1, 2, HEADS)),
}


@LOW
@pytest.mark.parametrize("name", HOWS)
@pytest.mark.parametrize(("groups", "prefix"), [(2, 0), (2, 3), (4, 3)])
def test_written_attention_is_that_of_single_operations(
    name: str, groups: int, prefix: int, dtype: torch.dtype
) -> None:
    how = HOWS[name]
    mask = partial(attention._seen, partial(attention.causal_mask, width=how.window, device=torch.device("cpu")))
    made = []
    for own in (False, True):
        generator = torch.Generator().manual_seed(0)
        shapes = [
            (1, HEADS, 46, WIDTH),
            *[(1, groups, 52, WIDTH)] * 2,
            *[(1, groups, prefix, WIDTH)] * 2 * bool(prefix),
        ]
        given = [torch.randn(one, generator=generator).to(dtype).requires_grad_() for one in shapes]
        sinks = None if how.sinks is None else how.sinks.clone().requires_grad_()
        here = How(how.dropout, None, how.window, how.softcap, sinks)
        torch.manual_seed(5)
        if own:
            out = written.attend(given[0], given[1], given[2], PARTS, mask, here, given[3:])
        else:

            def call(number: int, q: Tensor, k: Tensor, v: Tensor, ahead: int, here: How = here) -> Tensor:
                return by_autograd(q, k, v, mask(q.shape[2], k.shape[2], ahead), here)

            out = apart.one_by_one(given[0], given[1], given[2], PARTS, call, given[3:])
        (out.double() * torch.linspace(-1, 1, WIDTH)).pow(2).sum().backward()
        after = torch.rand(1)  # the backward pass leaves the generator where it was
        leaves = given if sinks is None else [*given, sinks]
        made.append([out, *(leaf.grad for leaf in leaves if leaf.grad is not None), after])
    expected, found = made
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[-1], found[-1])
    assert all(close(one, other, BOUND[dtype]) for one, other in zip(expected, found, strict=True))


def test_dropout_on_weights_is_that_of_torch() -> None:
    """The same draws as torch's attention makes on a CPU."""
    how = HOWS["dropout"]
    query, key, value = (torch.randn(1, HEADS, 20, WIDTH) for _ in range(3))
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(query, key, value, dropout_p=how.dropout, is_causal=True)
    torch.manual_seed(1)
    mask = partial(attention._seen, partial(attention.causal_mask, width=None, device=query.device))
    found = written.attend(query, key, value, [Part(20, 0, 20)], mask, how)
    assert close(expected.transpose(1, 2), found, 1e-6)


def test_written_attention_keeps_queries_keys_and_values_alone() -> None:
    how, width = HOWS["soft cap"], torch.device("cpu")
    given = [torch.randn(1, HEADS, 52, WIDTH, requires_grad=True) for _ in range(3)]
    mask = partial(attention._seen, partial(attention.causal_mask, width=None, device=width))
    parts = apart.whole([0, 20, 52])
    assert kept(lambda: written.attend(given[0], given[1], given[2], parts, mask, how)) == sum(
        one.nbytes for one in given
    )


def test_keys_and_values_do_not_hold_what_rotary_positions_replaced() -> None:
    """Values that are a third of what one layer gave are copied; three thirds are kept as they are."""
    whole = torch.randn(1, 30, 3, HEADS, WIDTH, requires_grad=True)
    query, key, value = (whole[:, :, number].transpose(1, 2) for number in range(3))
    parts = apart.whole([0, 10, 30])
    masks: Any = [partial(attention.causal_mask, width=None, device=whole.device)]
    beside = 30 * HEADS * 4 + whole.nbytes // 3  # sums, and what comes out
    assert kept(lambda: apart.attend(query, key, value, parts, masks)) == whole.nbytes + beside
    again, turned = query * 1, key * 1
    assert kept(lambda: apart.attend(again, turned, value, parts, masks)) == whole.nbytes + beside
    assert torch.equal(apart.attend(again, turned, value, parts, masks), apart.attend(query, key, value, parts, masks))


# ---- PEFT's layers ----


def of_one_layer(variant: str, kind: type[nn.Module], plain: type[nn.Module], *, lean: bool) -> list[Tensor]:
    """What an adapted model gives, and its gradients, with PEFT's own layers or ours."""
    torch.manual_seed(0)
    model: Any = adapters.attach(make_base("llama", "fp32"), config_for(variant)).train()
    found = [module for module in model.modules() if type(module) is kind]
    assert found
    for module in found:
        module.__class__ = kind if lean else plain
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    out = model(input_ids=torch.arange(12)[None]).logits
    out.square().sum().backward()
    return [out, *(p.grad for p in model.parameters() if p.grad is not None)]


def test_dora_is_pefts() -> None:
    expected, found = (of_one_layer("lora-dora", LeanDora, LeanDora.__base__, lean=lean) for lean in (False, True))
    assert torch.equal(expected[0], found[0])
    assert all(close(one, other, 1e-5) for one, other in zip(expected, found, strict=True))


def test_loha_is_pefts_in_fewer_operations() -> None:
    expected, found = (of_one_layer("peft:LOHA", CheapLoHa, CheapLoHa.__base__, lean=lean) for lean in (False, True))
    assert len(expected) > 4
    assert all(close(one, other, 1e-4) for one, other in zip(expected, found, strict=True))
    model = adapters.attach(make_base("llama", "fp32"), config_for("peft:LOHA"))
    worth = []
    for layer in (module for module in model.modules() if isinstance(module, CheapLoHa)):
        x = torch.randn(50, layer.in_features)
        own, plain = (
            executed(partial(kind._get_delta_activations, layer, "default", x))
            for kind in (CheapLoHa, CheapLoHa.__base__)
        )
        assert own <= plain
        worth.append(own < plain)
    assert set(worth) == {True, False}  # rank 4 x 4 of 48 x 32 and of 24 x 32: each way was taken
