"""A last block that works on label rows alone.

In: a transformers decoder block, the last one. Out: the same object with another `forward`: given the label rows of a
flat batch, it makes keys and values of all rows, and queries, attention, output projection, MLP and norms of the label
rows alone: nobody looks at what it would give for others. Without them it is what it was: generation and every forward
pass of transformers' own are untouched.

Everything in a block but attention goes row by row. So the block's own forward runs twice: first on all rows, up to
where its attention has keys and values, which end the pass (`label_rows.KeysAndValues`); then on the label rows, whose
attention takes those. Where q, k and v are layers of their own, the first pass leaves out the queries and the second
one keys and values; where one layer gives all three, the second pass takes what it gave in the first. No part of a
block is named here but these layers, so a method's own layers work as they do elsewhere.

Shapes: T = rows of the batch, L = label rows, W = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fitune.models.attached import FlatState
from fitune.models.family import Family
from fitune.models.kernels.flash import computed_in
from fitune.models.kernels.label_rows import KEYWORD, Ahead, Behind, KeysAndValues, LabelRows

QUERY, KEYS = "q_proj", ("k_proj", "v_proj")
Forward = Callable[..., Any]


def layers(block: nn.Module, family: Family) -> tuple[nn.Module, ...] | None:
    """The layers that give queries, keys and values: three, or one for all; None: they are not known."""
    if not hasattr(block, family.attention):
        return None
    attention = block.get_submodule(family.attention)
    three = [getattr(attention, name, None) for name in (QUERY, *KEYS)]
    if all(isinstance(one, nn.Module) for one in three):
        return tuple(one for one in three if one is not None)
    return (block.get_submodule(family.qkv[0]),) if len(family.qkv) == 1 else None


def by_label_rows(block: Any, family: Family, flat: FlatState | None, *, filled: bool) -> None:
    """Give the block this forward.

    Args:
        family: of its model.
        flat: through which the label rows reach it, where the model hands no keywords to its blocks.
        filled: rows of zeros stand behind the label rows, for a model that wants as many back as it gave.
    """
    kind = type(block)
    if kind not in _MADE.values():
        if kind not in _MADE:
            _MADE[kind] = _class(kind)
        block.__class__ = _MADE[kind]
    block.fitune_family, block.fitune_flat, block.fitune_filled = family, flat, filled


_MADE: dict[type, type] = {}  # by the class that they were made of


def as_it_was(block: nn.Module) -> None:
    """Give a block that is not the last one its own forward back."""
    own = next((kind for kind, made in _MADE.items() if type(block) is made), None)
    if own is not None:
        block.__class__ = own
        del block.fitune_family, block.fitune_flat, block.fitune_filled


def _class(kind: type) -> type:
    """The class of a block, with the forward of this module before its own."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See the module's text."""
        flat = self.fitune_flat
        rows = kwargs.get(KEYWORD) if flat is None else flat.label_rows
        own: Forward = kind.forward  # type: ignore[attr-defined]  # a block of transformers
        if not isinstance(rows, LabelRows):
            return own(self, hidden_states, *args, **kwargs)
        return _by_rows(_Passes(self, own, rows), hidden_states, args, kwargs)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})


@dataclass(frozen=True)
class _Passes:
    """Both passes through a block; own: its forward."""

    block: Any
    own: Forward
    rows: LabelRows

    def run(self, handed: object, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One pass, with what its attention finds in place of the label rows."""
        flat = self.block.fitune_flat
        if flat is None:
            return self.own(self.block, hidden, *args, **{**kwargs, KEYWORD: handed})
        flat.label_rows = handed
        try:
            return self.own(self.block, hidden, *args, **kwargs)
        finally:
            flat.label_rows = self.rows


def _by_rows(passes: _Passes, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the block gives for the label rows: (1, L, W), or as it gives it."""
    block, at = passes.block, passes.rows.rows
    given = layers(block, block.fitune_family)
    assert given is not None
    kept: list[Tensor] = []
    first = {given[0]: _nothing(given[0]) if len(given) > 1 else _keeping(given[0], kept)}
    with _replaced(first):
        try:
            passes.run(Ahead(), hidden, args, kwargs)
        except KeysAndValues as found:
            key, value = found.key, found.value
        else:
            raise NotImplementedError(f"{type(block).__name__}: its attention does not get the label rows")
    second = {one: _nothing(one) for one in given[1:]} or {given[0]: lambda x: kept[0].index_select(1, at)}
    with _replaced(second):
        there = {name: _at(at, name, one) for name, one in kwargs.items()}
        out = passes.run(Behind(passes.rows, key, value), hidden.index_select(1, at), args, there)
    return F.pad(out, (0, 0, 0, hidden.shape[1] - len(at))) if block.fitune_filled else out


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, layers have another forward; afterwards what they had, which may be one of their own (`wide.py`)."""
    own = {layer: vars(layer)["forward"] for layer in forwards if "forward" in vars(layer)}
    for layer, forward in forwards.items():
        layer.forward = forward
    try:
        yield
    finally:
        for layer in forwards:
            del layer.forward
            if layer in own:
                layer.forward = own[layer]


def _keeping(layer: nn.Module, kept: list[Tensor]) -> Forward:
    """Its own forward, which also keeps what it gives."""
    own = layer.forward

    def forward(x: Tensor) -> Tensor:
        kept.append(own(x))
        return kept[0]

    return forward


def _nothing(layer: nn.Module) -> Forward:
    """In place of a layer whose outputs nobody takes: zeros that take no memory."""
    width: int = getattr(layer, "base_layer", layer).out_features  # type: ignore[assignment]  # an attribute that torch takes for a tensor or a module

    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(1, dtype=computed_in(x)).expand(*x.shape[:-1], width)

    return forward


def _at(rows: Tensor, name: str, value: Any) -> Any:
    """An argument of the block for label rows alone: positions, and the angles of rotary positions."""
    if name == "position_ids" and isinstance(value, Tensor):
        return value.index_select(-1, rows)
    if name == "position_embeddings" and isinstance(value, tuple):
        return tuple(one.index_select(-2, rows) for one in value)
    return value
