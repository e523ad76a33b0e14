"""The rule about hidden states of frozen blocks that are kept for later epochs.

In: a model, the rows of a run. Out: a Finding, as in datachecks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fitune.core.records import Batch, Finding, Units
from fitune.data.batches import flat
from fitune.engine.checkpoint import restore_rng, rng_state
from fitune.engine.frozen_states import FrozenStates, states_of
from fitune.engine.state_store import InMemory
from fitune.engine.step import label_hidden, place
from fitune.models import families
from fitune.models.interfaces import causal_lm
from fitune.models.switches import training
from fitune.models.tensors import same_bits

ALONE = 3  # rows that are tried by themselves


def frozen_states(why: str | None, count: int, *, asked: bool) -> Finding:
    """What frozen blocks give for a row has the same bits alone, in the run's own batches and among other rows, and
    they draw no random numbers; else it is not kept for later epochs.

    Args:
        why: as `refusal` found it.
        count: of the frozen blocks.
        asked: the user asked to keep it, so the run is refused where that cannot be.
    """
    if why is None:
        text = f"the lowest {count} blocks give a row the same bits in every batch tried: a later epoch begins there"
        return Finding("frozen-states", "ok", text)
    if asked:
        text = f"states of the lowest {count} blocks cannot be kept: {why}"
        return Finding("frozen-states", "refuse", text, "--frozen-cache off")
    return Finding("frozen-states", "ok", f"states of the lowest {count} blocks are not kept: {why}")


@torch.no_grad()
def refusal(model: nn.Module, samples: Units, batches: Sequence[NDArray[np.integer]], count: int) -> str | None:
    """Why what frozen blocks give cannot be kept; None: it can. It is tried.

    Args:
        model: with its method on it.
        samples: all rows.
        batches: rows of some micro-batches, the largest among them.
        count: of the frozen blocks.
    """
    if unlike := families.of(causal_lm(model)).partial:
        return f"this model's blocks {unlike}, and experts compute as many rows together as a batch sends them"
    before = rng_state()
    try:
        with training(model):
            return _tried(model, samples, batches, count)
    except NotImplementedError as error:
        return str(error)
    finally:
        restore_rng(before)


def _tried(model: nn.Module, samples: Units, batches: Sequence[NDArray[np.integer]], count: int) -> str | None:
    before = rng_state()
    own = [flat(samples, rows) for rows in batches]
    outputs = [states_of(model, batch, count) for batch in own]
    if not all(same_bits(state, now) for state, now in zip(before.values(), rng_state().values(), strict=True)):
        return "they draw random numbers (dropout)"
    known: dict[int, Tensor] = {}
    for batch, output in zip(own, outputs, strict=True):
        if (wrong := _differs(known, batch, output.states[0])) is not None:
            return wrong
    for rows in _others(samples, batches):
        batch = flat(samples, rows)
        if (wrong := _differs(known, batch, states_of(model, batch, count).states[0])) is not None:
            return wrong
    return _behind(model, own[0], count)


def _others(samples: Units, batches: Sequence[NDArray[np.integer]]) -> list[list[int]]:
    """The same rows among others, and some of them alone: the shortest, the longest, and the first."""
    first = [int(row) for row in batches[0]]
    every = list(dict.fromkeys(int(row) for rows in batches for row in rows))
    by_length = sorted(first, key=lambda row: len(flat(samples, [row]).ids))
    alone = list(dict.fromkeys([by_length[0], by_length[-1], first[0]]))[:ALONE]
    mixed = [every[::-1][: len(first)], every[1::2]]
    return [*(some for some in mixed if some), *([row] for row in alone)]


def _differs(known: dict[int, Tensor], batch: Batch, states: Tensor) -> str | None:
    """Compares rows with what they were before, and remembers new ones."""
    for row, (start, end) in zip(batch.rows, pairwise(batch.bounds.tolist()), strict=True):
        now = states[start:end]
        there = known.setdefault(row, now.clone())
        if not same_bits(there, now):
            off = float((there.float() - now.float()).abs().max())
            return f"row {row} has other bits in another batch (up to {off:.1e} off)"
    return None


def _behind(model: nn.Module, batch: Batch, count: int) -> str | None:
    """The last hidden states of a batch that begins behind the frozen blocks are those of one that goes through."""
    lengths = np.zeros(max(batch.rows) + 1, np.int64)
    lengths[list(batch.rows)] = np.diff(batch.bounds)
    states = FrozenStates(count, lengths, lambda width, kind: InMemory(int(lengths.sum()), width, kind))
    there = place(model, batch)
    with states.through(model, batch, there):
        through = label_hidden(model, batch, placed=there)
    with states.through(model, batch, there):
        behind = label_hidden(model, batch, placed=there)
    states.close()
    return None if same_bits(through, behind) else "blocks above them see more than their hidden states"
