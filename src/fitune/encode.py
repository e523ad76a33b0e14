"""Conversations to samples: the one place that decides which tokens are trained.

In: a Conversation, a Template, a tokenizer. Out: Sample(ids, mask). Each segment is encoded apart, in training and in
chat alike, so a token never spans the border between prompt and answer. The stop token is an id, added after cutting.

Cutting, where a row is longer than max_length: oldest exchanges first, then the text of the prompt, and only then the
answer, which then keeps no stop token (a cut answer must not teach to stop in mid-sentence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fitune.records import Conversation, DataReport, Message, Sample
from fitune.templates import Template
from fitune.tokenizer import adds_bos, encode, single_id


@dataclass(frozen=True)
class _Piece:
    """A segment's ids. content: a user's text, which may be cut; the template's own pieces may not."""

    ids: list[int]
    trained: bool
    content: bool
    turn: int
    role: str


class Encoder:
    """Encodes with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer.
        template: gives a conversation its shape.
        max_length: longest sample in tokens; None does not cut.

    Example:
        >>> sample = Encoder(tokenizer, template, 512).sample(conversation)
        >>> tokenizer.decode(sample.ids[sample.mask])  # what is trained
    """

    def __init__(self, tokenizer: Any, template: Template, max_length: int | None = None) -> None:
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.bos_id = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        stop = single_id(tokenizer, template.stop) if template.stop else None
        self.stop_id = int(tokenizer.eos_token_id if stop is None else stop)
        self.stop_ids = sorted({self.stop_id, int(tokenizer.eos_token_id)})
        self._literals: dict[str, list[int]] = {}  # a template has few pieces, and every row has all of them

    def with_max_length(self, max_length: int) -> Encoder:
        """The same encoder, cutting elsewhere."""
        return Encoder(self.tokenizer, self.template, max_length)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a prompt that the model is to go on from."""
        return [i for piece in self._pieces(messages) for i in piece.ids]

    def sample(self, conversation: Conversation) -> Sample | None:
        """The row as ids and mask, or None where not one trained token is left of it."""
        pieces = self._pieces(conversation.messages)
        whole_trained = sum(len(p.ids) for p in pieces if p.trained)
        whole_length = sum(len(p.ids) for p in pieces)
        if self.max_length is not None and whole_length > self.max_length:
            pieces = _cut(pieces, self.max_length, self._pieces, conversation.messages)
        ids = np.fromiter((i for p in pieces for i in p.ids), np.int32)
        mask = np.fromiter((p.trained for p in pieces for _ in p.ids), np.bool_)
        if len(mask):
            mask[0] = False  # nothing precedes the first token, so it cannot be predicted
        if not mask.any():
            return None
        lost_answer = whole_trained - sum(len(p.ids) for p in pieces if p.trained)
        return Sample(
            ids,
            mask,
            source=conversation.source,
            cut_prompt=whole_length - len(ids) - lost_answer,
            cut_answer=lost_answer,
            ends_whole=pieces[-1].role == "stop",
        )

    def _pieces(self, messages: Sequence[Message]) -> list[_Piece]:
        pieces = []
        for segment in self.template.render(messages):
            if segment.role == "bos":
                ids = [] if self.bos_id is None else [self.bos_id]
            elif segment.role == "stop":
                ids = [self.stop_id]
            elif segment.token is not None:
                ids = [segment.token]
            elif segment.literal:
                ids = self._literal(segment.text)
            else:
                ids = encode(self.tokenizer, segment.text, literal=False)
            pieces.append(_Piece(ids, segment.trained, not segment.literal, segment.turn, segment.role))
        return pieces

    def _literal(self, text: str) -> list[int]:
        if text not in self._literals:
            self._literals[text] = encode(self.tokenizer, text, literal=True)
        return self._literals[text]


def _length(pieces: list[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _cut(pieces: list[_Piece], limit: int, render: Any, messages: Sequence[Message]) -> list[_Piece]:
    """The pieces of a row, cut to `limit` tokens: oldest exchanges, then the prompt's text, then the answer's end."""
    system = [m for m in messages if m.role == "system"]
    turns = [m for m in messages if m.role != "system"]
    while _length(pieces) > limit:
        starts = [n for n, m in enumerate(turns) if m.role == "user" and n > 0]
        if not starts:
            break
        turns = turns[starts[0] :]
        pieces = render([*system, *turns])
    for n, piece in enumerate(pieces):  # the prompt's texts, the oldest first, each from its end
        if piece.content and not piece.trained:
            excess = _length(pieces) - limit
            if excess > 0:
                pieces[n] = replace(piece, ids=piece.ids[: max(0, len(piece.ids) - excess)])
    while _length(pieces) > limit:  # the row's end: first the stop token, then the answer
        last = pieces[-1]
        excess = _length(pieces) - limit
        pieces = (
            pieces[:-1]
            if last.role == "stop" or excess >= len(last.ids)
            else [
                *pieces[:-1],
                replace(last, ids=last.ids[: len(last.ids) - excess]),
            ]
        )
    return pieces


def encode_all(conversations: Sequence[Conversation], encoder: Encoder, report: DataReport) -> list[Sample]:
    """Every row as a sample; what was kept, cut and dropped is counted in `report`."""
    samples = []
    for conversation in conversations:
        sample = encoder.sample(conversation)
        if sample is None:
            report.dropped += 1
            continue
        report.cut_prompt += sample.cut_prompt > 0
        report.cut_answer += sample.cut_answer > 0
        samples.append(sample)
    report.kept = len(samples)
    report.tokens = sum(len(sample) for sample in samples)
    report.trained_tokens = sum(int(sample.mask.sum()) for sample in samples)
    return samples
