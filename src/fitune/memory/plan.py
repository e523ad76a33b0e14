"""What a run will take, before it runs."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fitune import adapters, families, methods, optim, precision
from fitune.config import RunConfig
from fitune.memory import trace
from fitune.memory.trace import Building, Tracer
from fitune.methods import new_tokens
from fitune.model import causal_lm, checkpoint_blocks, outline, trainable
from fitune.records import Batch, Layout
from fitune.step import LossScale, apply_gradients, held_out_loss, make_gradients


@dataclass(frozen=True)
class Work:
    """What a run asks of memory.

    config: resolved. shape: the model's transformers config. steps: micro-batches of some optimizer steps, the one with
    the largest among them. held_out: the largest batch of an evaluation. added: new tokens.
    """

    config: RunConfig
    shape: Any
    steps: Sequence[Sequence[Batch]]
    held_out: Batch | None = None
    layout: Layout = "flat"
    added: Sequence[Any] = field(default_factory=list)


def without_values(work: Work) -> Any:
    """The model of a run with its method on it, on meta."""
    config = work.config
    method = methods.find(config.method)
    storage = config.storage_dtype if method.low_precision_base else config.trainable_dtype
    with Building(), torch.device("meta"):
        base = outline(work.shape, precision=config.precision, quant=config.quant, storage=storage)
        family = families.of(base)
        if work.added:
            new_tokens.add_rows(base, work.added)
        model = adapters.attach(base, config)
        checkpoint_blocks(model, family, config.checkpointing)
    return model


def traced(work: Work, target: str = "cpu") -> Tracer:
    """Everything that the run's steps, an evaluation and a checkpoint allocate."""
    config = work.config
    model = without_values(work)
    tracer = Tracer(target)
    with tracer.during("load"):
        trace.shadows(model, tracer)
    run(model, work, tracer)
    tracer.close()
    return tracer


def run(model: Any, work: Work, tracer: Tracer) -> None:
    """The steps, the evaluation and the checkpoint of a piece of work, on shadows or for real."""
    config = work.config
    model.train()
    parameters = trainable(model)
    scale = LossScale.START if precision.scaled(config) else 1.0
    with tracer, tracer.inside(model, causal_lm(model).base_model):
        optimizer = optim.make(parameters, config, partial(methods.find(config.method).rates, config))
        for number, micro_batches in enumerate(work.steps, start=1):
            with tracer.during(f"step {number}"):
                made = make_gradients(model, micro_batches, work.layout, [], scale)
            with tracer.during(f"update {number}"):
                apply_gradients(model, made, optimizer, config.max_grad_norm, scale)
            for tensor in _tensors(optimizer.state):
                tracer.own(tensor, trace.STATES)
        if work.held_out is not None:
            with tracer.during("evaluation"):
                held_out_loss(model, [work.held_out], work.layout)
        with tracer.during("checkpoint"):
            optim.state_tensors(optimizer, parameters)


def _tensors(state: Any) -> list[torch.Tensor]:
    return [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]
