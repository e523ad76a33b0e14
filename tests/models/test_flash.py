"""All documents in one call: chosen where the kernel can do it, as many operations for 64 documents as for one, and on
a GPU the same values as a call for each."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.core.records import Sample
from fitune.data.batches import flat
from fitune.memory import overrides, plan
from fitune.models.kernels import attention, flash, target
from fitune.models.kernels.attention import chosen, flat_attention
from fitune.models.kernels.placed import place
from fitune.models.prepare import ready
from support import contract as contract
from support import tiny
from support.flash import FLASH, flash_by_hand


class Counting(TorchDispatchMode):
    """Counts operations that take a launch; views take none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def rows(documents: int, tokens: int) -> list[Sample]:
    length = tokens // documents
    return [Sample(np.arange(length, dtype=np.int32), np.arange(length) >= length // 2) for _ in range(documents)]


def documents_of(bounds: list[int], prefix: int = 0, device: str = "cpu") -> flash.Documents:
    samples = [Sample(np.zeros(b - a, np.int32), np.zeros(b - a, np.bool_)) for a, b in pairwise(bounds)]
    return place(flat(samples, range(len(samples))), torch.device(device), prefix=prefix, fill=False).documents


def operations(method: str, kind: str, documents: int, tokens: int = 512) -> Counter[str]:
    """What a step of a GPU's code allocates by, one entry for each operation that gives a tensor."""
    config = contract.config_for(method, "bf16")
    samples = rows(documents, tokens)
    work = plan.Work(config, tiny.make_model(kind).config, [[flat(samples, range(documents))]])
    tracer = plan.traced(work, target.AMPERE)
    return Counter(block.op for block in tracer.blocks)


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", "llama"), ("prefix", "qwen2"), ("prompt", "llama"), ("lora", "mistral")]
)
def test_64_documents_take_as_many_operations_as_one(method: str, kind: str) -> None:
    one, many = (operations(method, kind, documents) for documents in (1, 64))
    assert many["aten::" + FLASH] == one["aten::" + FLASH] > 0
    assert many.total() <= 1.05 * one.total()


def test_a_call_for_each_document_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_refusal", lambda *args: "planted")
    one, many = (operations("lora", "llama", documents) for documents in (1, 64))
    assert many.total() > 2 * one.total()


def test_what_the_kernel_cannot_do_takes_a_call_for_each_document() -> None:
    half, gpu = torch.bfloat16, target.AMPERE
    assert flash.refusal(gpu, 64, half) is None
    assert flash.refusal(gpu, 60, half) is None  # made wider
    for reason, how in (("soft cap", {"softcap": 30.0}), ("sinks", {"sinks": True}), ("dropout", {"dropout": 0.1})):
        assert reason in str(flash.refusal(gpu, 64, half, **how))
    assert "width 320" in str(flash.refusal(gpu, 320, half))
    assert "float32" in str(flash.refusal(gpu, 64, torch.float32))
    assert "7.5" in str(flash.refusal(target.Target("cuda", (7, 5), 40), 64, torch.float16))
    assert "CUDA" in str(flash.refusal(target.CPU, 64, half))


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("llama", "one call"), ("gemma2", "soft cap"), ("bloom", "ALiBi"), ("gpt_oss", "sinks"), ("chatglm", "both ways")],
)
def test_how_attention_goes_is_reported_once_for_a_model(kind: str, kernel: str) -> None:
    with target.planned(target.AMPERE):
        assert kernel in chosen(ready(tiny.make_model(kind), "bf16"), torch.bfloat16)
    assert "not on a CUDA GPU" in chosen(tiny.make_model("llama"), torch.bfloat16)


def test_documents_with_a_prefix_have_their_keys_behind_it() -> None:
    made = documents_of([0, 3, 4], prefix=2)
    assert made.queries.tolist() == [0, 3, 4]
    assert made.keys.tolist() == [0, 5, 8]
    assert made.longest == (3, 5)
    assert made.order is not None
    assert made.order.tolist() == [0, 1, 2, 3, 4, 0, 1, 5]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(("groups", "width"), [(1, 8), (2, 8), (2, 12)])
def test_the_kernel_is_asked_for_what_a_call_for_each_document_computes(
    monkeypatch: pytest.MonkeyPatch, window: int | None, prefix: int, groups: int, width: int
) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    query, key, value = (torch.randn(1, h, 23, width, dtype=torch.float64) for h in (4, 4 // groups, 4 // groups))
    before = [tuple(torch.randn(1, 4 // groups, prefix, width, dtype=torch.float64) for _ in "kv")] if prefix else None
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    scaling = None if width == 12 else 0.3
    how: dict[str, Any] = {"cu_seq_lens_q": bounds, "sliding_window": window, "prefix": before, "scaling": scaling}
    expected, _ = flat_attention(module, query, key, value, None, **how)
    with flash_by_hand(monkeypatch) as calls:
        documents = documents_of(bounds.tolist(), prefix)
        found, _ = flat_attention(module, query, key, value, None, documents=documents, **how)
    assert len(calls) == 1
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_backward_pass_writes_no_zeros_for_other_documents() -> None:
    bounds = torch.arange(0, 65 * 8, 8, dtype=torch.int32)
    query, key, value = (torch.randn(1, 2, 512, 16, requires_grad=True) for _ in "qkv")
    with Counting() as seen:
        out, _ = flat_attention(torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds)
        out.sum().backward()
    assert seen.counts["aten::slice_backward"] == 0
    assert seen.counts["aten::add"] <= 3


def test_scratch_of_flash_backward_is_in_the_plan() -> None:
    """4,096 tokens of an 8B model's layer: about 134 MiB beside the gradients, more where few documents share it."""
    with torch.device("meta"):
        query, key = torch.empty(4096, 32, 128, dtype=torch.bfloat16), torch.empty(4096, 8, 128, dtype=torch.bfloat16)
        many, one = torch.empty(35, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    op = overrides.INSIDE["aten::_flash_attention_backward"]

    def scratch(bounds: Tensor) -> float:
        args = (query, query, key, key, query, None, bounds)
        return sum(op(target.Target("cuda", (9, 0), 132), args, {}, ())) / 2**20

    assert scratch(many) == pytest.approx((4096 + 128 * 34) * 32 * 129 * 4 / 2**20 + 64)
    assert scratch(one) == pytest.approx(((4096 + 128) * 32 * (128 * 5 + 1) * 4) / 2**20 + 64)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
def test_on_a_gpu_one_call_equals_a_call_for_each(
    dtype: torch.dtype, window: int | None, prefix: int, heads: int, shared: int, width: int
) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 1, 2, 130, 450, 451, 700], dtype=torch.int32)
    shapes = ((heads, 700), (shared, 700), (shared, 700), (shared, prefix), (shared, prefix))
    whole = [torch.randn(1, h, n, width, dtype=torch.float64) for h, n in shapes]
    module: Any = torch.nn.Module()
    module.layer_idx = 0

    def run(device: str, kind: torch.dtype, one_call: bool) -> list[Any]:
        q, k, v, *before = (t.detach().to(device, kind).requires_grad_() for t in whole)
        documents = documents_of(bounds.tolist(), prefix, device) if one_call else None
        how: dict[str, Any] = {
            "cu_seq_lens_q": bounds,
            "sliding_window": window,
            "prefix": [tuple(before)] if prefix else None,
        }
        out, _ = flat_attention(module, q, k, v, None, documents=documents, **how)
        out.square().sum().backward()
        return [out, q.grad, k.grad, v.grad, *(b.grad for b in before if prefix)]

    exact = run("cpu", torch.float64, one_call=False)
    each, together = (run("cuda", dtype, one_call=one_call) for one_call in (False, True))
    for right, a, b in zip(exact, each, together, strict=True):
        errors = [(t.double().cpu() - right).norm() / right.norm() for t in (a, b)]
        assert errors[1] <= 2 * errors[0] + 1e-3


@pytest.mark.cuda
def test_on_a_gpu_one_call_is_deterministic() -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 300, 1500, 4000], dtype=torch.int32)
    whole = [torch.randn(1, h, 4000, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2)]
    documents = documents_of(bounds.tolist(), device="cuda")
    grads: list[list[Any]] = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            q, k, v = (t.clone().requires_grad_() for t in whole)
            flat_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, documents=documents)[
                0
            ].square().sum().backward()
            grads.append([t.grad for t in (q, k, v)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
