"""Can a model's last block work on label rows alone? Found by trying it.

In: a model. Out: yes or no. The last block alone is run, between the model's own embedding and final norm, on two small
documents: on all rows, and on label rows. Where a model's own code cannot do the second, or gives other values, the
last block works on all rows, as the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fitune.core.errors import ModelError
from fitune.core.records import Batch, Sample
from fitune.data.batches import flat
from fitune.engine.out_of_memory import is_out_of_memory
from fitune.models import attached, families
from fitune.models.attached import ByRows, compute_dtype
from fitune.models.interfaces import CausalLM, causal_lm
from fitune.models.kernels.last_block import as_it_was, by_label_rows, layers
from fitune.models.load import outline
from fitune.models.switches import evaluating

LENGTHS = (6, 9)
LABELLED = (1, 2, 4)  # ids of each document that have a label: rows between labels, and behind them
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}  # of the largest value: sums in other orders
Run = Callable[[CausalLM, Batch, bool], Tensor]  # (model, batch, by label rows) to hidden states of the label rows


def ready(model: nn.Module, run: Run) -> bool:
    """Is the last block ready to work on label rows alone? It is tried once, and kept with the model.

    Args:
        run: the forward pass of a model without what a method lays before documents.
    """
    inner, known = causal_lm(model), attached.of(model)
    try:
        family = families.of(inner)
    except ModelError:
        return False
    *others, block = family.block_list(inner)
    for one in others:  # a method may have put blocks behind the one that was the last
        as_it_was(one)
    if known.label_rows == "no" or layers(block, family) is None:
        return False
    if known.label_rows is None:
        known.label_rows = _tried(inner, family, run)
    by_label_rows(block, family, known.flat, filled=known.label_rows == "filled")
    return known.label_rows != "no"


WAYS: tuple[ByRows, ...] = ("rows", "filled")
_without_values: dict[type, ByRows] = {}  # by the model's class: its code decides


def _tried(inner: CausalLM, family: families.Family, run: Run) -> ByRows:
    """Which way gives the right values; of a model without values one that can run, in a plain twin of it."""
    if next(inner.parameters()).device.type != "meta":
        return _first(inner, family, run)
    if type(inner) not in _without_values:
        twin = outline(inner.config, precision="fp32")
        _without_values[type(inner)] = _first(twin, family, run)
    return _without_values[type(inner)]


def _first(inner: CausalLM, family: families.Family, run: Run) -> ByRows:
    for way in WAYS:
        if _right(way, inner, family, run):
            return way
    return "no"


def _right(way: ByRows, inner: CausalLM, family: families.Family, run: Run) -> bool:
    """Are the values those of all rows?"""
    by_label_rows(family.block_list(inner)[-1], family, attached.of(inner).flat, filled=way == "filled")
    vocabulary = inner.config.vocab_size
    samples = []
    for length in LENGTHS:
        ids = (np.arange(length) * 7919 + 13) % vocabulary
        samples.append(Sample(ids.astype(np.int32), np.isin(np.arange(length), LABELLED)))
    batch = flat(samples, range(len(samples)))
    try:
        with torch.no_grad(), evaluating(inner):
            first = _takes_tuples(inner, family, batch, run)
            with _alone(inner, family, first=first):
                expected, found = run(inner, batch, False), run(inner, batch, True)
    except Exception as error:  # whatever a model's own code says to a call that it does not know
        if is_out_of_memory(error):
            raise
        return False
    if found.shape != expected.shape or found.device.type == "meta":
        return found.shape == expected.shape
    scale = float(expected.float().abs().max().clamp_min(1e-6))
    return bool((found.float() - expected.float()).abs().max() <= TOLERANCE[compute_dtype(inner)] * scale)


def _takes_tuples(inner: CausalLM, family: families.Family, batch: Batch, run: Run) -> bool:
    """Does the model's code not take hidden states as a block gives them here? Then the last block is tried first."""
    try:
        with _alone(inner, family, first=False):
            run(inner, batch, False)
    except Exception as error:  # as above
        if is_out_of_memory(error):
            raise
        return True
    return False


class _Through(nn.Module):
    """A block that gives what it gets, and has all else of the one in whose place it stands."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        vars(self)["own"] = block

    def __getattr__(self, name: str) -> Any:
        """Whatever the model's code asks a block for."""
        return getattr(vars(self)["own"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(1, T, W), as it came."""
        return hidden_states


@contextmanager
def _alone(inner: CausalLM, family: families.Family, *, first: bool) -> Iterator[None]:
    """Inside, the last block alone does something.

    Args:
        first: it is the first one, too; else it stands in its place, where the model's code may give it other things.
    """
    parent, _, leaf = family.blocks.rpartition(".")
    blocks, holder = family.block_list(inner), inner.get_submodule(parent)
    before = [] if first else [_Through(block) for block in blocks[:-1]]
    setattr(holder, leaf, nn.ModuleList([*before, blocks[-1]]))
    try:
        yield
    finally:
        setattr(holder, leaf, blocks)
