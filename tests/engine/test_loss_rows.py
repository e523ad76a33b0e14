"""Of how many label rows logits are there at once: few on a CPU, many on a GPU, and for a run always as many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fitune.checks import guards
from fitune.commands.train import resume_config, train
from fitune.core.config import RunConfig, build
from fitune.core.errors import ConfigError
from fitune.core.events import Watcher
from fitune.engine.checkpoint import RunFolder
from fitune.memory import chunks, device, plan, steps, storage, trace
from fitune.models.head import ScaledHead, loss_rows, set_loss_rows
from fitune.models.kernels import frozen_head, fused, softmax
from fitune.models.kernels import loss as loss_kernel
from fitune.models.kernels.frozen import keep_stored
from fitune.models.kernels.loss import chunk_rows
from fitune.models.kernels.target import AMPERE, CPU, planned

GIB = 2**30
LLAMA_3 = 128_256  # words
SHAPE = LlamaConfig(
    vocab_size=LLAMA_3, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)


def work(labels: int = 4096, **settings: Any) -> plan.Work:
    """32 documents with so many labels."""
    config = build({"model": "m", "data": ["d"], "precision": "bf16", "lora": {"rank": 2}, **settings})
    batch = steps.made_up(32, labels // 32 + 1, LLAMA_3)
    return plan.Work(config, SHAPE, [[batch]], batch)


def gpu(budget: int, total: int | None = None) -> device.Device:
    return device.Device("card", "cuda", budget, total=total)


def reads(config: RunConfig, rows: int | str) -> list[int]:
    """Rows of each time the head is read forward, in a step on a GPU."""
    there = replace(work(), config=config.model_copy(update={"loss_rows": rows}), held_out=None)
    model, tracer = plan.started(there, AMPERE)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    plan.over(model, tracer, there, AMPERE)
    return seen


def test_a_gpu_reads_the_head_a_few_times_where_it_was_read_sixty() -> None:
    assert 60 <= chunk_rows(LLAMA_3) <= 65  # on a CPU: 32 MiB of logits
    assert chunk_rows(LLAMA_3, AMPERE) == 512
    assert chunk_rows(400, AMPERE) == chunk_rows(400) > 10_000
    config = work().config
    assert len(reads(config, 65)) == 64  # as it was
    assert reads(config, "auto") == [512] * 8
    assert reads(config, plan.plan(work(), gpu(80 * GIB), name="m").loss_rows) == [1024] * 4


def test_as_many_rows_as_the_plan_leaves_room_for() -> None:
    roomy = plan.plan(work(), gpu(80 * GIB), name="m")
    assert roomy.loss_rows == 1024
    tight = plan.plan(work(), gpu(round(roomy.needed / chunks.ROOMY) - 2**20), name="m")
    assert tight.loss_rows == 512
    assert tight.fits
    # the plan counts what the rows take: their gradient is written over them; without the kernel that does it, a
    # log-softmax in 32 bits that becomes its gradient, and one of them in 16
    assert 1.9 <= (roomy.needed - tight.needed) / (512 * LLAMA_3) <= 2.1
    assert roomy.closed[storage.LOSS] - tight.closed[storage.LOSS] == 2 * 512 * LLAMA_3
    with fused.eager():
        wide, narrow = (plan.plan(work(loss_rows=rows), gpu(80 * GIB), name="m") for rows in (1024, 512))
    assert 5.9 <= (wide.needed - narrow.needed) / (512 * LLAMA_3) <= chunks.EACH
    assert wide.closed[storage.LOSS] - narrow.closed[storage.LOSS] == 6 * 512 * LLAMA_3
    assert plan.plan(work(2048), gpu(80 * GIB), name="m").loss_rows == 512  # four reads are few enough
    assert plan.plan(work(loss_rows=100), gpu(80 * GIB), name="m").loss_rows == 100
    on_cpu = plan.plan(work(), device.Device("cpu", "cpu", 80 * GIB), name="m")
    assert on_cpu.loss_rows == chunk_rows(LLAMA_3)


def test_what_others_hold_of_a_gpu_changes_the_rows_only_where_they_would_not_fit() -> None:
    needed = plan.plan(work(), gpu(80 * GIB), name="m").needed
    for free in (79, 41, 12):
        assert plan.plan(work(), gpu(free * GIB, 80 * GIB), name="m").loss_rows == 1024
    assert plan.plan(work(), gpu(needed - 1, 80 * GIB), name="m").loss_rows == 512


def test_nothing_is_left_open_in_a_model_of_a_run() -> None:
    model = plan.without_values(work())
    assert loss_rows(model) == chunk_rows(LLAMA_3)
    with planned(AMPERE):
        assert loss_rows(model) == 512
        assert "512 rows at once" in guards.eval_memory(model).text
    set_loss_rows(model, work(loss_rows=7).config)
    for where in (CPU, AMPERE):
        with planned(where):
            assert loss_rows(model) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_chunk_is_cross_entropy(dtype: torch.dtype, weighted: bool) -> None:
    check_a_chunk("cpu", dtype, weighted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_loss_of_a_chunk_is_cross_entropy(dtype: torch.dtype) -> None:
    for words in (400, 4003, LLAMA_3):  # rows in registers, in shared memory, in neither
        check_a_chunk("cuda", dtype, True, words)


def check_a_chunk(device: str, dtype: torch.dtype, weighted: bool, words: int = 4003) -> None:
    """Against autograd's in float64: value and gradient."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(50, words)).to(device, dtype)
    labels = torch.randint(words, (50,), device=device)
    logits[0, labels[0]] = -300  # its probability is zero in float32
    weights = torch.rand(50, device=device) if weighted else None
    each = torch.nn.functional.cross_entropy(exact := logits.double().requires_grad_(), labels, reduction="none")
    wanted = (each if weights is None else each * weights).sum()
    leaf = logits.clone().requires_grad_()
    got = loss_kernel.label_loss(Same(), leaf, labels, words, weights)
    (gradient,) = torch.autograd.grad(got, leaf)
    assert got.dtype == torch.float32
    assert torch.isclose(got.double(), wanted, rtol=1e-5)
    (right,) = torch.autograd.grad(wanted, exact)
    assert (gradient.double() - right).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-6)
    assert torch.equal(leaf, logits)  # what a head gave in float32 is not written over


class Same(torch.nn.Module):
    """A head whose logits are its input, as a tensor of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


def most(work: Callable[[], Any]) -> int:
    """Bytes that are there at once while something works."""
    with trace.Tracer() as tracer:
        work()
    tracer.close()
    return max(accumulate(size for _, size in tracer.events))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_become_their_gradient_where_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "BLOCK_BYTES", 4 * 4003 * 5)  # rows in float32 beside 16 bits
    logits, labels = torch.randn(200, 4003).to(dtype), torch.randint(4003, (200,))
    again = softmax.reader(logits.clone())
    taken = most(lambda: softmax.in_place(logits, labels, again))
    assert taken <= 4 * 4003 * (0 if dtype == torch.float32 else max(5, torch.get_num_threads())) + 200 * 100


# ---- a frozen head, by blocks of the vocabulary ----


def frozen(
    dtype: torch.dtype, *, sure: bool = False, bias: bool = False
) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A head, hidden states and labels; of half of the rows the most likely entry is the label. sure: nearly all of
    the probability is there."""
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 4003, bias=bias).requires_grad_(False)
    if sure:
        head.weight.mul_(8)
    head, hidden = head.to(dtype), torch.randn(50, 24).mul_(4).to(dtype)
    labels = torch.randint(4003, (50,))
    labels[::2] = head(hidden)[::2].argmax(1)
    return head, hidden.requires_grad_(), labels


def in_float64(head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, weights: Any) -> list[torch.Tensor]:
    """Loss and gradient of the rows, from the logits that the head gives in its own dtype; float16 is computed in
    float32."""
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, head.weight.double())
    rounded = (logits if hidden.dtype == torch.float16 else head(hidden)).detach().double()
    each = torch.nn.functional.cross_entropy(logits + (rounded - logits).detach(), labels, reduction="none")
    total = (each if weights is None else each * weights).sum()
    return [total.detach(), *torch.autograd.grad(total, exact)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_a_frozen_heads_loss_is_cross_entropy(
    dtype: torch.dtype, sure: bool, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_head, "ROWS", 20)  # three parts
    for weights in (None, torch.rand(50)):
        head, hidden, labels = frozen(dtype, sure=sure)
        loss = loss_kernel.label_loss(head, hidden, labels, 4003, weights, rows)
        (grad,) = torch.autograd.grad(loss, hidden)
        total, right = in_float64(head, hidden, labels, weights)
        assert torch.isclose(loss.double(), total, rtol=1e-5)
        # of each row too: the gradient of one that is nearly sure of its label is small, and not noise
        for one, other in ((grad, right), *zip(grad[::2], right[::2], strict=True)):
            assert (one.double() - other).norm() <= 4 * max(torch.finfo(dtype).eps, 5e-6) * other.norm() + 1e-12
        with torch.no_grad():
            assert torch.isclose(loss_kernel.label_loss(head, hidden, labels, 4003, weights, rows), loss, rtol=1e-5)


@pytest.mark.parametrize("fault", ["a label that is counted", "a block that is forgotten", "weights"])
def test_a_fault_in_a_frozen_heads_loss_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, labels = frozen(torch.float32)
    total, right = in_float64(head, hidden, labels, None)
    if fault == "a label that is counted":
        keep = frozen_head._Rows._keep_labels_out
        monkeypatch.setattr(frozen_head._Rows, "_keep_labels_out", lambda self, x, start: keep(self, x.clone(), start))
    elif fault == "a block that is forgotten":
        blocks = frozen_head.Matrix.blocks
        monkeypatch.setattr(frozen_head.Matrix, "blocks", lambda self, number: list(blocks(self, number))[:-1])
    each = torch.full((50,), 1.01) if fault == "weights" else None
    loss = loss_kernel.label_loss(head, hidden, labels, 4003, each, rows=7)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert abs(loss.double() / total - 1) > 1e-4
    assert (grad.double() - right).norm() > 1e-3 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [-300.0, -60.0, 0.0, 60.0, 300.0])
@pytest.mark.parametrize("unlikely", [False, True])
def test_logits_of_any_size_have_their_loss(dtype: torch.dtype, offset: float, unlikely: bool) -> None:
    """All entries far from zero, as models of GPT-2 have them, or one of a row far above its label."""
    head, hidden, labels = frozen(dtype)
    with torch.no_grad():
        hidden[:, 0], head.weight[:, 0] = 1.0, offset  # the same for every entry
        if unlikely:
            hidden[::3, 1], head.weight[7, 1] = 20.0, 10.0
    total, right = in_float64(head, hidden, labels, None)
    loss = loss_kernel.label_loss(head, hidden, labels, 4003)
    (grad,) = torch.autograd.grad(loss, hidden)
    assert torch.isclose(loss.double(), total, rtol=1e-5)
    # of the column that all entries share, the gradient is what is left of a difference
    assert (grad.double() - right)[:, 1:].norm() <= 4 * max(torch.finfo(dtype).eps, 1e-5) * right[:, 1:].norm()


def test_without_a_second_look_a_label_far_below_the_others_has_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_head, "LARGE", float("nan"))  # no sum is larger
    head, hidden, labels = frozen(torch.float32)
    with torch.no_grad():
        hidden[::3, 1], head.weight[7, 1] = 20.0, 10.0
    assert not loss_kernel.label_loss(head, hidden, labels, 4003).isfinite()


def test_a_row_that_is_not_finite_has_a_loss_that_is_not() -> None:
    head, hidden, labels = frozen(torch.float32)
    with torch.no_grad():
        hidden[3, 0] = float("nan")
        rows = frozen_head.losses(frozen_head.Matrix(head.weight, None, torch.float32), hidden, labels, 2**21)
    assert rows[3].isnan()
    assert rows.isfinite().sum() == 49


def test_a_bias_a_stored_weight_and_one_in_16_bits_are_seen() -> None:
    head, hidden, labels = frozen(torch.float32, bias=True)
    total, right = in_float64(head, hidden, labels, None)
    stored = torch.nn.Sequential(torch.nn.Linear(24, 4003)).requires_grad_(False)
    stored.load_state_dict({f"0.{name}": value.bfloat16() for name, value in head.state_dict().items()}, assign=True)
    keep_stored(stored, torch.float32)
    for one, off in ((head, 1e-5), (stored[0], 2e-2)):
        assert loss_kernel.as_matrix(one, hidden, gradient=True) is not None
        loss = loss_kernel.label_loss(one, hidden, labels, 4003)
        (grad,) = torch.autograd.grad(loss, hidden)
        assert torch.isclose(loss.double(), total, rtol=off)
        assert (grad.double() - right).norm() <= off * right.norm()


def test_what_is_more_than_a_frozen_matrix_goes_through_its_own_forward() -> None:
    head, hidden, labels = frozen(torch.float32)
    scaled, trained, patched = ScaledHead(head, 0.5, 3.0), copy.deepcopy(head).requires_grad_(), copy.deepcopy(head)
    vars(patched)["forward"] = lambda x: head(x) * 2  # as libraries do it
    hooked = copy.deepcopy(head)
    hooked.register_forward_hook(lambda module, args, out: out.index_fill(-1, labels[:1], 5.0))
    for one in (scaled, trained, patched, hooked):
        assert loss_kernel.as_matrix(one, hidden, gradient=True) is None
        right = torch.nn.functional.cross_entropy(one(hidden), labels, reduction="sum")
        loss = loss_kernel.label_loss(one, hidden, labels, 4003)
        assert torch.isclose(loss, right, rtol=1e-5)
        (got,), (wanted,) = (torch.autograd.grad(each, hidden) for each in (loss, right))
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_hook_that_looks_on_changes_nothing() -> None:
    head, hidden, _ = frozen(torch.float32)
    head.register_forward_pre_hook(loss_kernel.looks_on(lambda module, args: None))
    assert loss_kernel.as_matrix(head, hidden, gradient=True) is not None


@pytest.mark.parametrize("trained", [False, True])
def test_a_batch_without_labels_has_no_loss(trained: bool) -> None:
    head, hidden, labels = frozen(torch.float32)
    head.requires_grad_(trained)
    loss = loss_kernel.label_loss(head, hidden[:0], labels[:0], 4003, rows=7)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not trained or (head.weight.grad is not None and not head.weight.grad.any())


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_only_a_block_of_logits_is_there_at_once(dtype: torch.dtype, each: int) -> None:
    head, hidden, labels = frozen(dtype)
    others = 50 * 24 * 4 * 6 + 50 * 8 * 20  # sums as wide as the hidden states, and single numbers
    there = most(lambda: loss_kernel.label_loss(head, hidden, labels, 4003, rows=2))
    assert 2 * 4003 * each * 0.9 <= there <= 2 * 4003 * each + others


class Settings(Watcher):
    """Keeps what is shown with --verbose; with `stops` it ends the run from inside after a step."""

    def __init__(self, *, stops: bool = False) -> None:
        self.stops = stops
        self.shown: Mapping[str, Any] = {}

    def settings(self, values: Mapping[str, str]) -> None:
        self.shown = values

    def step(self, record: Any) -> None:
        if self.stops and record.step == 2:
            raise KeyError("stopped")


def test_a_resumed_run_keeps_its_rows_whatever_is_suggested_then(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", 4 * 400 * 4)  # four rows
    whole, run, watch = tmp_path / "whole", tmp_path / "run", Settings()
    settings = {"model": str(model_folder), "data": [str(data_file)], "max_steps": 3, "save_every": 1, "batch_size": 2}
    settings |= {"sample_prompts": 0, "val_share": 0}
    train(build({**settings, "output": str(whole)}), watch=watch)
    assert RunFolder(whole).read_config().loss_rows == RunFolder(whole).read("plan")["loss_rows"] == 4
    assert watch.shown["loss"] == "logits of 4 rows at once"

    with pytest.raises(KeyError):
        train(build({**settings, "output": str(run)}), watch=Settings(stops=True))
    monkeypatch.setattr(loss_kernel, "CHUNK_BYTES", 4 * 400 * 2)
    with pytest.raises(ConfigError, match="loss_rows 2"):
        resume_config(str(run), {"loss_rows": 2})
    seen: list[int] = []
    make = frozen_head.losses

    def watched(head: Any, hidden: torch.Tensor, labels: torch.Tensor, logits: int, *rest: Any) -> torch.Tensor:
        seen.append(logits)
        return make(head, hidden, labels, logits, *rest)

    monkeypatch.setattr(frozen_head, "losses", watched)
    train(resume_config(str(run), {}), resume=True)
    assert set(seen) == {4 * 400}
    first, second = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, run))
    assert first == second
