"""The last block works on label rows alone: the same loss and gradients, less work, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitune.core.records import Batch, Sample
from fitune.data.batches import flat
from fitune.engine import step
from fitune.engine.step import hidden_states, label_hidden, loss_sum
from fitune.models import adapters, attached, families
from fitune.models.kernels import label_rows, last_block
from fitune.models.prepare import checkpoint_blocks, ready
from fitune.models.switches import evaluating
from support import tiny
from support.contract import KINDS, config_for

EXPERTS = ["qwen3_moe", "mixtral", "gpt_oss"]
METHODS = ["full", "lora-all", "prefix", "prompt", "houlsby", "ia3", "lora-dora", "bitfit-add", "freeze"]


def batch() -> Batch:
    """Answers behind their prompts, two with a prompt between, a row without labels, one that has them all."""
    random = np.random.default_rng(3)
    masks = [np.arange(7) >= 3, np.isin(np.arange(12), (3, 4, 9, 10, 11)), np.zeros(5, bool), np.arange(9) > 0]
    samples = [Sample(random.integers(5, 300, len(mask)).astype(np.int32), mask) for mask in masks]
    return flat(samples, range(len(samples)))


def model_of(kind: str, variant: str, precision: str = "fp32") -> Any:
    base = tiny.make_model(kind)
    made = ready(base.bfloat16() if precision == "bf16" else base, precision)
    return adapters.attach(made, config_for(variant, precision))


def tried(model: Any, *, by_rows: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients in eval mode, so that nothing is dropped out."""
    step.last_block_is_ready(model)
    kept = attached.of(model).label_rows
    attached.of(model).label_rows = kept if by_rows else "no"
    try:
        with evaluating(model):
            loss = loss_sum(model, batch())
            loss.backward()
    finally:
        attached.of(model).label_rows = kept
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def same(model: Any, limit: float = 1e-5) -> None:
    """By label rows it is what it is by all rows."""
    loss, gradients = tried(model, by_rows=True)
    expected, by_all = tried(model, by_rows=False)
    assert loss.item() == pytest.approx(expected.item(), rel=limit)
    assert gradients.keys() == by_all.keys()
    largest = max(float(one.abs().max()) for one in by_all.values())
    for name, gradient in gradients.items():
        size = max(float(by_all[name].abs().max()), 1e-3 * largest)
        assert (gradient - by_all[name]).abs().max() <= 10 * limit * size, name


@pytest.mark.parametrize("kind", [*KINDS, *EXPERTS])
def test_loss_and_gradients_are_those_of_all_rows(kind: str) -> None:
    model = model_of(kind, "lora-all" if kind not in EXPERTS else "lora")
    assert step.last_block_is_ready(model)
    same(model)


@pytest.mark.parametrize("variant", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_with_every_kind_of_method(kind: str, variant: str) -> None:
    same(model_of(kind, variant))


@pytest.mark.parametrize("kind", ["llama", "bloom", "mistral", "chatglm"])
def test_in_16_bits(kind: str) -> None:
    """Within what sums of 16 bits round; mistral's windows are shorter than documents."""
    same(model_of(kind, "lora-all", "bf16"), limit=1e-2)


PROMPTS = {
    "answers": (4, 8),
    "both": (2, 12),
    "prompts": (1, 3),  # whose last label row does not see to the prompt's end with the keys up to its own
}


@pytest.mark.parametrize("variant", ["lora-all", "prefix", "prompt"])
@pytest.mark.parametrize("labels", PROMPTS)
def test_a_prompt_that_attends_both_ways(labels: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ChatGLM-6B's: 5 tokens of a prompt, [gMASK], <sop>, and the answer, twice."""
    model = model_of("chatglm", variant)
    config, (first, last) = model.config, PROMPTS[labels]
    ids = [11, 12, 13, 14, 15, config.gmask_token_id, config.bos_token_id, 21, 22, 23, 24, 25]
    mask = (np.arange(12) >= first) & (np.arange(12) <= last)
    documents = [Sample(np.array(ids, np.int32), mask), Sample(np.array(ids[2:], np.int32), mask[2:])]
    monkeypatch.setitem(globals(), "batch", lambda: flat(documents, range(2)))
    same(model)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_block_that_is_recomputed_finds_the_label_rows_again(kind: str) -> None:
    model = model_of(kind, "lora-all")
    loss, gradients = tried(model, by_rows=True)
    checkpoint_blocks(model, families.of(model), True)
    model.train()
    again = loss_sum(model, batch())
    again.backward()
    assert torch.equal(again, loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_new_blocks_of_a_tail_are_the_last_ones() -> None:
    """A model that was tried before it grew."""
    base = ready(tiny.make_model("llama"))
    assert step.last_block_is_ready(base)
    same(adapters.attach(base, config_for("tail")))


class Rows(TorchDispatchMode):
    """Counts the rows that products have."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "whole"), [("llama", 2), ("phi3", 1), ("gpt2", 1)])
def test_only_keys_and_values_are_made_of_all_rows(kind: str, whole: int) -> None:
    """Rows of the last block's products: k and v, or the one layer that gives q, k and v, have all."""
    model = ready(tiny.make_model(kind))
    assert step.last_block_is_ready(model)
    there = step.place(model, batch())
    with torch.no_grad(), evaluating(model), Rows() as seen:
        label_hidden(model, batch(), placed=there)
    with torch.no_grad(), evaluating(model), Rows() as every:
        hidden_states(model, batch(), "flat")
    each = len(every.rows) // 3
    assert (
        sorted(seen.rows[2 * each :])
        == [len(there.label_rows)] * (each - whole) + [len(batch().ids) + there.filler] * whole
    )


def test_every_other_forward_is_what_it_was() -> None:
    """All hidden states, and transformers' own forward, bit for bit as before the block was made ready."""
    model = ready(tiny.make_model("llama"))
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = hidden_states(model, batch(), "flat"), model(input_ids=ids).logits
        assert step.last_block_is_ready(model)
        after = hidden_states(model, batch(), "flat"), model(input_ids=ids).logits
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def no_window(found: label_rows.Spans) -> list[Any]:
    """The fault: each document's first key is left out."""
    return [type(part)(part.count, part.first + 1, part.end) for part in label_rows_parts(found)]


label_rows_parts = label_rows.Spans.parts


@pytest.mark.parametrize("fault", ["keys", "queries"])
def test_a_block_that_gives_other_values_works_on_all_rows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(tiny.make_model("llama"))
    if fault == "keys":
        monkeypatch.setattr(label_rows.Spans, "parts", no_window)
    else:  # positions of other rows
        monkeypatch.setattr(last_block, "_at", lambda rows, name, value: value)
    assert not step.last_block_is_ready(model)
    monkeypatch.undo()
    same(model_of("llama", "lora"))
    with torch.no_grad(), evaluating(model):
        there = step.place(model, batch())
        rows = hidden_states(model, batch(), "flat")[there.label_rows]
        assert torch.equal(label_hidden(model, batch(), placed=there), rows)
    assert attached.of(model).label_rows == "no"


def test_a_model_whose_attention_gets_no_label_rows_works_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(tiny.make_model("llama"))
    attention: Any = type(families.of(model).block_list(model)[-1].self_attn)
    own: Callable[..., Any] = attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(label_rows.KEYWORD, None)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", forward)
    assert not step.last_block_is_ready(model)


def test_queries_and_keys_of_documents() -> None:
    """By hand: two answers in the first document, none in the second, the last label at the end of the third."""
    bounds, rows = np.array([0, 6, 9, 12]), np.array([1, 2, 4, 10, 11])
    found = label_rows.spans(bounds, rows)
    assert [(part.count, part.first, part.end) for part in found.parts()] == [(4, 0, 5), (2, 9, 12)]
    made = {name: one.tolist() for name, one in label_rows.arrays(found, rows, 1, 0).items()}
    assert made["taken"] == [0, 1, 1, 2, 3, 4]  # row 3 has no label: it gets the query of the row before it
    assert made["back"] == [0, 1, 3, 4, 5, 0]  # the filler is the first one
    assert made["label_order"] == [0, 1, 2, 3, 4, 9, 10, 11]
    assert (made["label_queries"], made["label_keys"]) == ([0, 4, 6], [0, 5, 8])
    prefixed = label_rows.arrays(found, rows, 0, 2)["label_order"].tolist()
    assert prefixed == [0, 1, 2, 3, 4, 5, 6, 0, 1, 11, 12, 13]  # rows of [two of the prefix; keys]


def test_where_nearly_all_rows_have_labels_the_last_block_works_on_all() -> None:
    """It would be more work."""
    samples = [Sample(np.arange(5, 105, dtype=np.int32), np.arange(100) >= first) for first in (1, 5, 6)]
    found = [step.place(tiny.make_model("llama"), flat([one], [0])).labelled for one in samples]
    assert [one is None for one in found] == [True, False, False]
