"""Steps that do not fit, and steps that are not finite.

In: the micro-batches of a step. Out: the step's result, or an error that says which rows, and what would help. A step
that runs out of memory is done again from where it began (gradients dropped, random numbers put back, no weight had
changed) with every micro-batch in twice as many parts: the objective is a sum over the whole step, and stays the same.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch

from fitune.core.errors import TrainingError
from fitune.core.records import Batch, Layout, Source
from fitune.data.batches import split
from fitune.engine import optim
from fitune.engine.checkpoint import restore_rng, rng_state
from fitune.engine.step import LossScale, Made, StepResult, apply_gradients, loss_sum, make_gradients
from fitune.models.model import causal_lm, trainable
from fitune.models.tensors import finite

T = TypeVar("T")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
MOST_BAD = 3  # steps in a row that are not finite
GOOD = "; the last checkpoint is good"


class Phases(Protocol):
    """What counts memory by the phase of a run (memory.trace.Tracer)."""

    def during(self, phase: str) -> AbstractContextManager[Any]:
        """Inside, what is allocated belongs to that phase."""


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on a GPU or in main memory?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def careful_step(
    model: Any,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    layout: Layout,
    parts: int,
    scale: LossScale,
    sources: Callable[[int], Source | None],
    say: Callable[[str], None],
) -> tuple[StepResult, int]:
    """One optimizer step that survives running out of memory, and float16 gradients beyond their range.

    Args:
        model, micro_batches, optimizer, max_grad_norm, layout: as for `training_step`.
        parts: in how many parts each micro-batch goes through the model.
        scale: of the loss. Gradients that are not finite under it halve it, and the step is done again: no row is
            lost, and no step counts as bad for it.
        sources: where a row stands.
        say: is told when micro-batches are halved.

    Returns:
        The step's result, and the parts that fit, for the steps that follow.

    Raises:
        TrainingError: a single row does not fit, or the optimizer's states do not.
    """
    began = scale.value
    while True:
        pieces = [piece for batch in micro_batches for piece in split(batch, parts)]
        before, reached = rng_state(), [pieces[0]]
        try:
            made = make_gradients(model, pieces, layout, reached, scale.value)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            told = " ".join(str(error).split())[:200]
        else:
            done = _apply(model, made, optimizer, max_grad_norm, scale.value)
            if done.finite or not math.isfinite(done.loss) or not scale.lower():
                scale.value = scale.value if done.finite else began  # what no scale repairs is not the scale's fault
                scale.passed()
                return done, parts
            restore_rng(before)
            continue
        _forget(optimizer)  # outside of `except`: the error would keep the tensors of its frames alive
        if isinstance(optimizer, optim.InBackward):
            raise TrainingError(
                "out of memory; with optimizer_in_backward a step cannot be done again",
                received=told,
                fix="a smaller --batch-size; the last checkpoint is good",
            )
        if len(reached[0].rows) == 1:
            raise _does_not_fit(reached[0], sources, told, GOOD)
        restore_rng(before)
        parts *= 2
        most = max(len(piece.rows) for batch in micro_batches for piece in split(batch, parts))
        say(f"out of memory: the step is done again with micro-batches of at most {most} rows, to the same objective")


def in_fewer(work: Callable[[int], T], rows: int, what: str, say: Callable[[str], None]) -> T:
    """Work that goes over rows without gradients, done again with half as many side by side where memory runs out.

    Args:
        work: is given how many rows go side by side.
        rows: how many at first.
        what: they are, for people.
        say: is told when they are halved.

    Raises:
        TrainingError: not even one fits.
    """
    while True:
        try:
            return work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            told = " ".join(str(error).split())[:200]
        _free()  # outside of `except`: the error would keep the tensors of its frames alive
        if rows == 1:
            raise TrainingError(
                f"out of memory with a single one of the {what}",
                received=told,
                fix="a smaller --max-length, or a larger GPU; the checkpoints are good",
            )
        rows = max(1, rows // 2)
        say(f"out of memory: {rows} {what} side by side from here on")


def rehearse(
    model: Any,
    micro_batches: Sequence[Batch],
    layout: Layout,
    state_bytes: int,
    tracer: Phases,
    sources: Callable[[int], Source | None],
    say: Callable[[str], None],
) -> int:
    """Gradients of the largest step, dropped again, so that what does not fit shows itself before hours of training.
    Random numbers are put back, and no weight changes.

    Args:
        model: in training mode, without an optimizer yet.
        micro_batches: those of the step.
        layout: how documents go through the model.
        state_bytes: what the optimizer will hold; on a GPU that much is held meanwhile.
        tracer: sees what is allocated.
        sources, say: as for `careful_step`.

    Returns:
        In how many parts each micro-batch goes through the model, so that it fits.

    Raises:
        TrainingError: a single row does not fit, or the optimizer's states do not.
    """
    parts, before, device = 1, rng_state(), next(model.parameters()).device
    while True:
        pieces = [piece for batch in micro_batches for piece in split(batch, parts)]
        held: torch.Tensor | None = None
        reached: list[Batch] = []
        try:
            held = torch.empty(state_bytes if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
            with tracer.during("step"):
                make_gradients(model, pieces, layout, reached)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            told = " ".join(str(error).split())[:200]
        else:
            model.zero_grad(set_to_none=True)
            restore_rng(before)
            return parts
        if held is None:
            raise _states_do_not_fit(told, "")
        held = None  # before it is asked for again
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(reached[0].rows) == 1:
            raise _does_not_fit(reached[0], sources, told, "")
        restore_rng(before)
        parts *= 2
        most = max(len(piece.rows) for batch in micro_batches for piece in split(batch, parts))
        say(
            "out of memory in a rehearsal of the largest step: micro-batches have at most "
            f"{most} rows from the start, to the same objective"
        )


def _apply(model: Any, made: Made, optimizer: torch.optim.Optimizer, max_grad_norm: float, scale: float) -> StepResult:
    try:
        return apply_gradients(model, made, optimizer, max_grad_norm, scale)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:200]
    _forget(optimizer)
    raise _states_do_not_fit(told, GOOD)


def _forget(optimizer: torch.optim.Optimizer) -> None:
    """Drop gradients and whatever the failed step left."""
    optimizer.zero_grad(set_to_none=True)
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _states_do_not_fit(told: str, more: str) -> TrainingError:
    return TrainingError(
        "the optimizer's states do not fit into memory",
        received=told,
        fix=f"--optimizer adamw-8bit or adafactor{more}",
    )


def _does_not_fit(batch: Batch, sources: Callable[[int], Source | None], told: str, more: str) -> TrainingError:
    row, length = batch.rows[0], len(batch.ids)
    return TrainingError(
        f"one row alone does not fit into memory: {sources(row)}, {length:,} tokens",
        received=told,
        expected="a row whose activations fit beside the weights",
        fix=f"--max-length {max(8, length // 2 // 8 * 8)}, --checkpointing, or --precision bf16{more}",
    )


def check_finite(
    model: Any, bad: int, done: StepResult, micro_batches: Sequence[Batch], layout: Layout, where: Mapping[str, Any]
) -> int:
    """How many steps in a row were not finite; their weights were not changed.

    Args:
        model: in training mode.
        bad: so many before this one.
        done: what the step gave.
        micro_batches: its rows.
        layout: how documents go through the model.
        where: `sources` of rows, and the `checkpoint` that is good.

    Raises:
        TrainingError: MOST_BAD in a row.
    """
    if done.finite:
        return 0
    if bad + 1 < MOST_BAD:
        return bad + 1
    first, rows = first_non_finite(model, micro_batches, layout)
    told = ", ".join(str(where["sources"](row)) for row in rows[:8])
    raise TrainingError(
        f"{MOST_BAD} steps in a row were not finite, so the run stops; none of them was applied",
        received=f"loss {done.loss}, gradient norm {done.grad_norm}; first non-finite: {first}; rows {told}",
        expected="finite losses and gradients",
        fix=f"a lower --lr, or --precision fp32; look at these rows; the last good checkpoint is {where['checkpoint']}",
    )


def first_non_finite(model: Any, micro_batches: Sequence[Batch], layout: Layout) -> tuple[str, tuple[int, ...]]:
    """What is the first to be NaN or infinite (a weight, an output, a gradient), and the rows that show it."""
    rows = tuple(row for batch in micro_batches for row in batch.rows)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not finite(parameter):
            return f"the weight {name}", rows
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_watch(name, found))
        for name, module in causal_lm(model).named_modules()
        if name and not list(module.children())
    ]
    try:
        for batch in micro_batches:
            _one_backward(model, batch, layout)
            if found:
                return f"the output of {found[0]}", batch.rows
            wrong = [n for n, p in trainable(model).items() if p.grad is not None and not finite(p.grad)]
            if wrong:
                return f"the gradient of {wrong[-1]}", batch.rows
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return "nothing when they are run again", rows


def _watch(name: str, found: list[str]) -> Callable[..., None]:
    def look(module: torch.nn.Module, inputs: object, output: object) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
        if not found and any(t.is_floating_point() and not finite(t) for t in tensors):
            found.append(name)

    return look


def _one_backward(model: Any, batch: Batch, layout: Layout) -> None:
    loss = loss_sum(model, batch, layout)
    if math.isfinite(loss.item()):
        loss.backward()
