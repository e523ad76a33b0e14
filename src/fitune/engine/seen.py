"""Which token sees which: measured, by changing one token at a time and looking at what becomes of the others.

In: a model, a flat batch. Out: (T, T) booleans for the attention of the first block, and the positions that the model
is given. Nothing is taken from what a config promises, so a mask that is wrong is shown wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fitune.core.records import Batch, Layout
from fitune.engine.step import hidden_states, place
from fitune.models import families
from fitune.models.interfaces import causal_lm, decoder

TRIES = 4  # other embeddings that each token is given: with one alone a weight may be too small to be seen


def positions(model: nn.Module, batch: Batch) -> NDArray[np.int64]:
    """(rows of positions, T): one row in most models; ChatGLM-6B has two, places and block positions."""
    inner = causal_lm(model)
    own = getattr(decoder(inner), "flat_positions", None)
    if own is None:
        return batch.positions[None].astype(np.int64)
    ids = torch.from_numpy(batch.ids).to(next(inner.parameters()).device)
    made: Tensor = own(ids, batch.bounds.tolist())
    return made.reshape(-1, len(batch.ids)).cpu().numpy().astype(np.int64)


def sees(model: nn.Module, batch: Batch, layout: Layout = "flat") -> NDArray[np.bool_]:
    """(T, T): row i, column j: what the first block makes of token i depends on token j.

    Args:
        model: with or without a method's wrapper; its virtual tokens are not among the columns.
        batch: flat, of any number of documents; each of its T tokens costs a few forward passes.
        layout: as the model would be given it in training.
    """
    inner = causal_lm(model)
    block = families.of(inner).block_list(inner)[0]
    count, training = len(batch.ids), model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = _first(model, batch, layout, block, None)
            found = torch.zeros(count, count, dtype=torch.bool)
            for token in range(count):
                for number in range(TRIES):
                    other = _first(model, batch, layout, block, (token, number))
                    found[:, token] |= (other != plain).any(-1)
    finally:
        model.train(training)
    return found.numpy()


def _first(model: nn.Module, batch: Batch, layout: Layout, block: nn.Module, change: tuple[int, int] | None) -> Tensor:
    """(T, W): what the first block gives; change: the token whose embedding is another one, and the number of that."""
    placed = place(model, batch, layout)
    given: list[Tensor] = []
    with _changed(model, batch, change), _watched(block, given):
        hidden_states(model, batch, layout, placed)
    if placed.keep is not None:
        return given[0].reshape(-1, given[0].shape[-1])[placed.keep].float().cpu()
    parts = [one.reshape(-1, one.shape[-1])[_rows(batch, one)] for one in given]
    return torch.cat(parts)[: len(batch.ids)].float().cpu()


def _rows(batch: Batch, values: Tensor) -> Tensor:
    """Where the tokens of what a module is given stand in it: all in a row, or padded to one width on the right."""
    documents = len(batch.bounds) - 1
    rows, width = (values.shape[0], values.shape[1]) if values.dim() == 3 else (1, values.shape[0])
    if rows == 1 or documents == 1:
        return torch.arange(rows * width)
    return torch.cat([torch.arange(end - first) + n * width for n, (first, end) in enumerate(pairwise(batch.bounds))])


@contextmanager
def _watched(block: nn.Module, given: list[Tensor]) -> Iterator[None]:
    def keep(_: nn.Module, __: object, out: object) -> None:
        made = out[0] if isinstance(out, tuple) else out
        assert isinstance(made, Tensor)
        given.append(made.detach())

    handle = block.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _changed(model: nn.Module, batch: Batch, change: tuple[int, int] | None) -> Iterator[None]:
    """The embedding of one token of the batch is another; documents that go one by one are counted through."""
    before = 0

    def other(_: nn.Module, __: object, out: Tensor) -> Tensor | None:
        nonlocal before
        rows = _rows(batch, out)
        first, before = before, before + len(rows)
        if change is None or not first <= change[0] < min(before, len(batch.ids)):
            return None
        flat = out.reshape(-1, out.shape[-1]).clone()
        direction = torch.randn(flat.shape[-1], generator=torch.Generator().manual_seed(change[1]))
        flat[rows[change[0] - first]] = direction.to(flat) * flat.abs().mean()
        return flat.view(out.shape)

    handle = causal_lm(model).get_input_embeddings().register_forward_hook(other)
    try:
        yield
    finally:
        handle.remove()
