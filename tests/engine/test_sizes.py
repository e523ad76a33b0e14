"""Few sizes: a filler without labels brings batches to one of few numbers of rows, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fitune.core import processor
from fitune.core.config import RunConfig, settings_only
from fitune.core.records import Layout, Sample
from fitune.data.batches import PARTS, flat, in_order, rounded
from fitune.engine import step
from fitune.engine.held_out import held_out_loss
from fitune.engine.step import hidden_states, loss_sum
from fitune.memory import device, plan
from fitune.models import adapters
from fitune.models.interfaces import causal_lm
from fitune.models.kernels import apart, flash, placed, short, wide
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from support import tiny

VIRTUAL: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"targets": "all-linear"}},
    "prompt": {"prompt": {"tokens": 3, "init": "random"}},
    "p-tuning": {"p_tuning": {"tokens": 3}},
    "p-tuning-lstm": {"method": "p-tuning", "p_tuning": {"tokens": 3, "encoder": "lstm", "width": 24}},
    "prefix": {"prefix": {"tokens": 3}},
}
ENCODED = ("p-tuning", "p-tuning-lstm")  # virtual tokens that a trained encoder makes


def samples(weighted: bool = False) -> list[Sample]:
    draw = np.random.default_rng(3)
    made = []
    for length in (5, 3, 17, 9, 28, 2, 21, 11, 26):
        mask = draw.random(length) < 0.7
        mask[-1] = True
        weights = draw.random(length).astype(np.float32) if weighted else None
        made.append(Sample(draw.integers(9, 400, length).astype(np.int32), mask, weights=weights))
    return made


@contextmanager
def without_filler() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed, "rounded", lambda count: count)
        patch.setattr(step, "rounded", lambda count: count)
        yield


def test_sizes_are_few_and_near() -> None:
    sizes = np.array([rounded(n) for n in range(70_000)])
    numbers = np.arange(70_000)
    assert (sizes >= numbers).all()
    assert (np.diff(sizes) >= 0).all()
    assert (sizes[sizes[:60_000]] == sizes[:60_000]).all()  # a size is its own
    assert ((sizes - numbers)[128:] / numbers[128:]).max() < 1 / PARTS
    assert max(len(set(sizes[n : 2 * n])) for n in (64, 128, 256, 512, 1024, 2048, 4096)) <= PARTS + 1


def config_of(method: str) -> RunConfig:
    settings = {"precision": "fp32", "method": method}
    return settings_only(settings | VIRTUAL[method])


def tuned(kind: str, method: str) -> Any:
    model = ready(tiny.make_model(kind))
    if method == "full":
        return model.requires_grad_(True)
    model = adapters.attach(model.requires_grad_(False), config_of(method))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.2)
    return model.eval()


def measured(model: Any, batch: Any, layout: Layout = "flat") -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = loss_sum(model, batch, layout)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable(model).items() if p.grad is not None}


CASES = [
    *[
        (kind, "full", "flat")
        for kind in (*tiny.FAMILIES, "gemma2", "gemma3", "opt", "qwen3_moe", "mixtral", "gpt_oss")
    ],
    *[(kind, method, "flat") for kind in ("llama", "bloom", "chatglm") for method in ("prompt", "prefix", "lora")],
    *[(kind, method, "flat") for kind in ("llama", "bloom", "gpt2", "chatglm") for method in ENCODED],
    *[(kind, method, "padded") for kind in ("llama", "chatglm") for method in ("full", "prompt", *ENCODED)],
    ("qwen3_5", "full", "padded"),
    ("llama", "full", "documents"),
]


@pytest.mark.parametrize(("kind", "method", "layout"), CASES)
def test_a_filler_changes_neither_loss_nor_gradients(kind: str, method: str, layout: Layout) -> None:
    model, batch = tuned(kind, method), flat(samples(weighted=kind == "llama"), range(9))
    assert rounded(len(batch.ids)) > len(batch.ids)
    assert rounded(batch.targets) > batch.targets
    seen: list[int] = []
    block = next(module for name, module in causal_lm(model).named_modules() if name.endswith((".0", ".h.0")))
    hook = block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()), prepend=True)
    loss, gradients = measured(model, batch, layout)
    hook.remove()
    assert layout == "documents" or all(size in {rounded(size), 9 * rounded(size // 9)} for size in seen), seen
    with without_filler():
        expected, plain = measured(model, batch, layout)
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    assert plain.keys() == gradients.keys()
    for name, gradient in plain.items():
        assert (gradient - gradients[name]).abs().max() <= 1e-5 * largest, name
    with torch.no_grad():
        assert hidden_states(model, batch, layout).shape[0] == len(batch.ids)
        assert held_out_loss(model, [batch], layout) == pytest.approx(loss / batch.weight, rel=1e-5)


def test_a_filler_repeats_the_first_document_so_that_its_positions_are_allowed() -> None:
    """A batch of short rows needs a filler that is longer than the model's longest position."""
    model = tiny.make_model("opt")
    model.model.decoder.embed_positions = type(model.model.decoder.embed_positions)(8, 32)
    row = Sample(np.arange(9, 16).astype(np.int32), np.arange(7) > 0)
    batch = flat([row], [0] * 600)
    there = placed.place(batch, torch.device("cpu"))
    assert there.filler == rounded(4200) - 4200 > 8
    assert there.positions.max() == 6
    assert set(there.ids[-there.filler :].tolist()) == set(row.ids.tolist())
    assert there.documents.bounds[-1] == rounded(4200) == len(there.ids)
    assert np.isfinite(loss_sum(model, batch).item())


@pytest.mark.parametrize("method", ["full", *VIRTUAL])
def test_tokens_that_are_shown_are_the_rows_own(method: str) -> None:
    """Neither the filler's nor virtual ones."""
    model, batch = tuned("llama", method), flat(samples(), range(9))
    done = step.training_step(model, [batch], torch.optim.SGD(trainable(model).values(), 0.0), 1.0)
    assert (done.tokens, done.targets) == (len(batch.ids), len(batch.labels))


@pytest.mark.parametrize("method", list(VIRTUAL))
def test_a_plan_meets_the_sizes_that_a_step_meets(method: str) -> None:
    """Virtual tokens before each document are rows of the model, a prefix is none; the filler comes behind them."""
    config, batch, model = config_of(method), flat(samples(), range(9)), tuned("llama", method)
    rows = len(batch.ids) + 9 * (3 if method in ("prompt", *ENCODED) else 0)
    met: list[tuple[int, int]] = []

    def met_by(work: Callable[[], Any]) -> list[tuple[int, int]]:
        met.clear()
        work()
        return list(met)

    def seen(*args: Any, **how: Any) -> placed.Placed:
        made = place(*args, **how)
        met.append((made.positions.shape[-1], made.label_rows.shape[-1]))
        return made

    place, work = placed.place, plan.Work(config, tiny.make_model("llama").config, [[batch]])
    step.last_block_is_ready(model)  # tried beforehand, on documents of its own
    plan.without_values(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placed, "place", seen)
        real = met_by(lambda: loss_sum(model, batch).backward())
        planned = met_by(lambda: plan.traced(work))
    assert real == [(rounded(rows), rounded(len(batch.labels)))]
    assert set(planned) == set(real)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "full"), ("mistral", "prefix"), ("gemma2", "lora"), ("bloom", "prefix"), ("chatglm", "prompt")],
)
def test_lengths_in_16_bits_on_a_cpu_are_few_and_give_the_same(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared in float32, in which nothing but the lengths that reach attention differs."""
    model, batch = tuned(kind, method), flat(samples(), range(9))
    loss, plain = measured(model, batch)
    monkeypatch.setattr(flash, "HALF", (torch.float32,))
    monkeypatch.setattr(short, "LONGEST", 0)  # short documents need no rows behind their own
    met = set()
    of = apart._OneCall.of

    def seen(part: Any, mask: Any, given: Any, at: int) -> apart._OneCall:
        made = of(part, mask, given, at)
        met.add(made.sides[0].shape[2])
        return made

    monkeypatch.setattr(apart._OneCall, "of", seen)
    again, found = measured(model, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient - found[name]).abs().max() <= 1e-5 * largest, name
    assert met <= {32, 64}
    assert met or kind == "gemma2"  # whose attention is written out


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", "all-linear"), ("gpt2", "all-linear"), ("llama", "down_proj"), ("gpt2", "mlp.c_proj")],
)
def test_products_in_float32_are_those_of_bfloat16(kind: str, targets: str) -> None:
    """Where a processor only imitates bfloat16: losses alike, and layers as they were before; also layers that a last
    block replaces for a moment."""
    config = settings_only({"method": "lora", "lora": {"targets": targets}})
    model = adapters.attach(ready(tiny.make_model(kind).bfloat16().requires_grad_(False), "bf16"), config).eval()
    batch, seen = flat(samples(), range(9)), []
    expected = held_out_loss(model, [batch])
    linear = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch, wide.in_float32(model):
        patch.setattr(torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or linear(x, *rest))
        found = held_out_loss(model, [batch])
    assert set(seen) == {torch.float32}
    assert found == pytest.approx(expected, rel=5e-3)
    assert held_out_loss(model, [batch]) == expected


def test_a_plan_counts_the_kernels_that_the_caches_may_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    here = device.Device("here", "cpu", None)
    for name in processor.CACHES:
        monkeypatch.setenv(name, "128")
    beside = {kind: plan.outside_of(here, kind)["kernels, threads and buffers"] for kind in ("fp32", "bf16")}
    assert beside["bf16"] - beside["fp32"] == 2 * 128 * processor.KERNEL_BYTES == 40 * 2**20
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    assert processor.kernel_bytes() == (128 + processor.UNBOUNDED) * processor.KERNEL_BYTES


def test_a_run_of_different_lengths_keeps_its_memory_and_files() -> None:
    """A short form of benchmarks/resident_memory.py: steps of lengths that the model has not met."""
    process, model = psutil.Process(), ready(tiny.make_model("llama")).requires_grad_(True)
    optimizer, draw = torch.optim.SGD(model.parameters(), 0.0), np.random.default_rng(0)
    data = [Sample(draw.integers(9, 400, n).astype(np.int32), np.arange(n) > 0) for n in range(4, 124)]

    def held(steps: range) -> tuple[float, int]:
        for number in steps:
            step.training_step(model, [flat(data, [number % 120, number * 7 % 120])], optimizer, 1.0)
        return process.memory_info().rss / 2**20, process.num_fds() if hasattr(process, "num_fds") else 0

    before, after = held(range(60)), held(range(60, 180))
    assert after[0] < before[0] * 1.03
    assert after[1] == before[1]


def test_evaluation_batches_of_like_lengths_hold_every_row_once() -> None:
    data = samples()
    for by_length in (False, True):
        batches = list(in_order(data, 4, by_length=by_length))
        assert sorted(row for batch in batches for row in batch.rows) == list(range(9))
    longest = [max(len(data[row]) for row in batch.rows) for batch in batches]
    assert longest == sorted(longest, reverse=True)
