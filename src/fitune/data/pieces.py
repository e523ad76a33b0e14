"""What a sample is made of before it is one: segments that are encoded together, and their ids.

In: segments of a rendered conversation. Out: groups and pieces, with what decides whether they may be cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitune.core.records import Message, Segment


@dataclass(frozen=True)
class Group:
    """Segments that are encoded as one, nearly always a single one. continued: other text stands right before it."""

    segments: tuple[Segment, ...]
    trained: bool
    continued: bool = False
    weight: float = 1.0  # of its tokens in the loss

    @property
    def text(self) -> str:
        """What is encoded."""
        return "".join(s.text for s in self.segments)

    @property
    def literal(self) -> bool:
        """All of it is the template's."""
        return all(s.literal for s in self.segments)

    @property
    def content(self) -> bool:
        """There is text in it that is not the template's."""
        return any(s.text and not s.literal for s in self.segments)

    @property
    def cuttable(self) -> bool:
        """There is text of a user in it: the only part of a prompt that is cut inside."""
        return not self.trained and any(s.text and is_users(s) for s in self.segments)

    @property
    def role(self) -> str:
        """Of the first segment."""
        return self.segments[0].role


@dataclass(frozen=True)
class Piece:
    """A group and its ids, which may have been cut."""

    ids: list[int]
    group: Group


def weights_of(pieces: Sequence[Piece]) -> NDArray[np.float32] | None:
    """The weight of each token in the loss; None: the same for all, as nearly everywhere."""
    if all(piece.group.weight == 1 for piece in pieces if piece.group.trained):
        return None
    return np.repeat([p.group.weight for p in pieces], [len(p.ids) for p in pieces]).astype(np.float32)


def length_of(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def is_users(segment: Segment) -> bool:
    return segment.role == "user" and not segment.literal


def before_turns(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system's text that a row begins with, which stays whatever is cut, and the turns behind it."""
    first = messages[0].role == "system" if messages else False
    return list(messages[:first]), list(messages[first:])


def with_system(turns: Sequence[Message], turn: int) -> int:
    """Where an exchange begins: with the system's texts right before its question."""
    while turn and turns[turn - 1].role == "system":
        turn -= 1
    return turn
