"""Of how many label rows logits are there at once: few on a CPU, many on a GPU, and for a run always as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
from fitune.models.head import loss_rows, set_loss_rows
from fitune.models.kernels import fused
from fitune.models.kernels import loss as loss_kernel
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
def test_the_loss_of_a_chunk_is_cross_entropy_in_half_the_memory(dtype: torch.dtype, weighted: bool) -> None:
    check_a_chunk("cpu", dtype, weighted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_loss_of_a_chunk_is_cross_entropy(dtype: torch.dtype) -> None:
    for words in (400, 4003, LLAMA_3):  # rows in registers, in shared memory, in neither
        check_a_chunk("cuda", dtype, True, words)


def check_a_chunk(device: str, dtype: torch.dtype, weighted: bool, words: int = 4003) -> None:
    """Against autograd's in float64: value and gradient, and the most bytes for each logit."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(50, words)).to(device, dtype)
    labels = torch.randint(words, (50,), device=device)
    weights = torch.rand(50, device=device) if weighted else None
    each = torch.nn.functional.cross_entropy(exact := logits.double().requires_grad_(), labels, reduction="none")
    wanted = (each if weights is None else each * weights).sum()
    leaf, tracer = logits.clone().requires_grad_(), trace.Tracer()
    with tracer:
        got = loss_kernel._chunk_loss(Same(), leaf, labels, weights)
        (gradient,) = torch.autograd.grad(got, leaf)
    tracer.close()
    assert got.dtype == torch.float32
    assert torch.isclose(got.double(), wanted, rtol=1e-5)
    (right,) = torch.autograd.grad(wanted, exact)
    assert (gradient.double() - right).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-6)
    assert torch.equal(leaf, logits)  # what a head gave in float32 is not written over
    most = max(sum(size for _, size in tracer.events[: n + 1]) for n in range(len(tracer.events)))
    assert most / logits.numel() <= 4 + dtype.itemsize + 0.1


class Same(torch.nn.Module):
    """A head whose logits are its input, as a tensor of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1


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
    make = loss_kernel._chunk_loss

    def watched(head: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return make(head, hidden, *rest)

    monkeypatch.setattr(loss_kernel, "_chunk_loss", watched)
    train(resume_config(str(run), {}), resume=True)
    assert max(seen) == 4
    first, second = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, run))
    assert first == second
