"""GGUF files changed on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fitune.models.handover.gguf import Draft
from fitune.models.handover.gguf.names import Piece


def with_values(draft: Draft, values: Mapping[str, Any]) -> Draft:
    """A draft with other metadata; None takes a key away."""
    changed = {**draft.metadata, **values}
    return replace(draft, metadata={key: value for key, value in changed.items() if value is not None})


def with_tensor(draft: Draft, name: str, change: Callable[[Tensor], Tensor]) -> Draft:
    """A draft in which one tensor has other numbers."""
    assert any(piece.name == name for piece in draft.pieces)
    return replace(draft, pieces=[_changed(piece, change) if piece.name == name else piece for piece in draft.pieces])


def without_tensor(draft: Draft, name: str) -> Draft:
    """A draft that lacks a tensor."""
    assert any(piece.name == name for piece in draft.pieces)
    return replace(draft, pieces=[piece for piece in draft.pieces if piece.name != name])


def _changed(piece: Piece, change: Callable[[Tensor], Tensor]) -> Piece:
    def read(parts: tuple[Callable[[], Tensor], ...]) -> Tensor:
        return change(torch.cat([part() for part in parts])).contiguous()

    return Piece(piece.name, piece.shape, (partial(read, piece.parts),))
