"""Work that runs out of memory: noticed, and done again with less at once.

In: a piece of work. Out: its result, or an OutOfMemory with the allocator's message. An error is turned into a
value at once: as an exception it would keep the tensors of its frames alive.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from fitune.core.errors import TrainingError
from fitune.core.records import Batch, Source

T = TypeVar("T")
MESSAGES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
SAFE = "; the last checkpoint is good"


@dataclass(frozen=True)
class OutOfMemory:
    """An allocation failed; the allocator's message."""

    message: str


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on a GPU or in main memory?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MESSAGES)


def attempt(work: Callable[[], T]) -> T | OutOfMemory:
    """The result of the work, or OutOfMemory; any other error is raised."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(" ".join(str(error).split())[:200])


def free() -> None:
    """Give back the memory that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def in_fewer(work: Callable[[int], T], rows: int, what: str, report: Callable[[str], None]) -> T:
    """Work that goes over rows without gradients, done again with half as many side by side where memory runs out.

    Args:
        work: is given how many rows go side by side.
        rows: how many at first.
        what: the rows, for people.
        report: is called with one line when they are halved.

    Raises:
        TrainingError: not even one fits.
    """
    while True:
        done = attempt(partial(work, rows))
        if not isinstance(done, OutOfMemory):
            return done
        free()
        if rows == 1:
            raise TrainingError(
                f"out of memory with a single one of the {what}",
                received=done.message,
                fix="a smaller --max-length, or a larger GPU; the checkpoints are good",
            )
        rows = max(1, rows // 2)
        report(f"out of memory: {rows} {what} side by side from here on")


def states_do_not_fit(failed: OutOfMemory, more: str = "") -> TrainingError:
    """The error for an optimizer whose states do not fit; more: what else to say of the fix."""
    return TrainingError(
        "the optimizer's states do not fit into memory",
        received=failed.message,
        fix=f"--optimizer adamw-8bit or adafactor{more}",
    )


def row_does_not_fit(batch: Batch, source: Source | None, failed: OutOfMemory, more: str = "") -> TrainingError:
    """The error for a single row that does not fit; source: where it stands; more: what else to say of the fix."""
    length = len(batch.ids)
    return TrainingError(
        f"one row alone does not fit into memory: {source}, {length:,} tokens",
        received=failed.message,
        expected="a row whose activations fit beside the weights",
        fix=f"--max-length {max(8, length // 2 // 8 * 8)}, --checkpointing, or --precision bf16{more}",
    )
