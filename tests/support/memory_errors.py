"""Models that run out of memory on demand."""

from __future__ import annotations

from typing import Any

import torch

from fitune.core.config import build
from fitune.core.records import Source
from fitune.engine import optim
from fitune.engine.step import StepResult
from fitune.engine.step_runner import StepRunner
from fitune.models import adapters
from fitune.models.parts import trainable
from fitune.models.prepare import ready
from support import tiny

OOM = {
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError(),
}


def make(method: str = "lora", **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    config = build({"model": "m", "data": ["d"], "method": method, **changes})
    model = adapters.attach(ready(tiny.make_model("llama")), config).train()
    optimizer = optim.make(trainable(model), config)
    optim.set_learning_rate(optimizer, 1e-2)
    return model, optimizer


def fails_above(model: Any, tokens: int, error: BaseException) -> list[int]:
    """A model whose first layer cannot hold more than so many tokens; what was tried."""
    tried: list[int] = []

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        tried.append(output.shape[-2])
        if output.shape[-2] > tokens:
            raise error

    next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.up_proj")).register_forward_hook(hook)
    return tried


def runner(model: Any, parts: int = 1, messages: list[str] | None = None) -> StepRunner:
    """A runner of steps whose rows stand in f.jsonl, one a line; what it reports goes to `said`."""
    messages = [] if messages is None else messages
    return StepRunner(model, "flat", 1.0, lambda row: Source("f.jsonl", row + 1), messages.append, parts)


def careful(
    model: Any, optimizer: Any, batches: list, parts: int = 1, messages: list[str] | None = None
) -> tuple[StepResult, int]:
    """A step's result, and in how many parts its micro-batches went through the model."""
    steps = runner(model, parts, messages)
    return steps.step(batches, optimizer), steps.parts
