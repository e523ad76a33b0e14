"""What a piece of work really allocates, and how many operations it executes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np

from fitune.core.config import RunConfig
from fitune.core.records import Batch, Sample
from fitune.data.batches import flat
from fitune.memory import plan
from fitune.memory.counted import count
from fitune.memory.measure import most_allocated
from fitune.memory.trace import Blind, Tracer
from fitune.models import adapters, attached, families
from fitune.models.offload import Host, Waits
from fitune.models.prepare import checkpoint_blocks
from support.against import module


def batch(*lengths: int) -> Batch:
    """Documents of these lengths; all but the first token of each is trained."""
    random = np.random.default_rng(0)
    samples = [Sample(random.integers(9, 380, n).astype(np.int32), np.arange(n) > 0) for n in lengths]
    return flat(samples, range(len(samples)))


def really(base: Any, config: RunConfig, work: plan.Work, host: Host | None = None) -> int:
    """The most bytes that torch's profiler saw of the model and the work together.

    Args:
        base: the real model, as it is loaded.
        config: puts the method on it.
        work: that is done.
        host: where activations wait; None: main memory.
    """
    model = adapters.attach(base, config)
    if host is not None:
        attached.of(model).waits = Waits(host)
    checkpoint_blocks(model, families.of(base), config.checkpointing, config.offload)
    gc.collect()  # what is left of other models must not go while this one is measured
    there = count(model, Tracer())
    return most_allocated(lambda: plan.go(model, work, Blind()), there)


def executed(run: Callable[[], object]) -> int:
    """Operations of what runs."""
    with module("meter").operations() as counted:
        run()
    return int(counted.get_total_flops())
