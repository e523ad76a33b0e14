"""Conversations to samples: the one place that decides which tokens are trained.

In: a Conversation, a Template, a tokenizer. Out: Sample(ids, mask). Each segment is encoded apart, in training and in
chat alike, so a token never spans the border between prompt and answer. The stop token is an id, added after cutting.

Cutting, where a row is longer than max_length: oldest exchanges first, then the text of the prompt, and only then the
answer, which then keeps no stop token (a cut answer must not teach to stop in mid-sentence).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from fitune.config import LengthPolicy, TrainOn
from fitune.errors import Collector, ConfigError, DataError
from fitune.records import Conversation, DataReport, Message, Sample, Segment
from fitune.templates import TABLE, Template
from fitune.templates.base import Tools
from fitune.tokenizer import adds_bos, encode, opens_with_space, single_id


@dataclass(frozen=True)
class _Piece:
    """Segments that are encoded as one, nearly always a single one. content: text that may be cut."""

    ids: list[int]
    trained: bool
    content: bool
    role: str
    segments: tuple[Segment, ...]


class Encoder:
    """Encodes with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer.
        template: gives a conversation its shape.
        max_length: longest sample in tokens; None does not cut.
        train_on: which of the assistant's turns are trained: all, the last one, or those that call a tool.

    Raises:
        ConfigError: the template needs special tokens that the vocabulary lacks.

    Example:
        >>> sample = Encoder(tokenizer, template, 512).sample(conversation)
        >>> tokenizer.decode(sample.ids[sample.mask])  # what is trained
    """

    def __init__(
        self, tokenizer: Any, template: Template, max_length: int | None = None, train_on: TrainOn = "all"
    ) -> None:
        self.tokenizer, self.template, self.max_length, self.train_on = tokenizer, template, max_length, train_on
        self.bos_id = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        stop = single_id(tokenizer, template.stop) if template.stop else None
        self.stop_id = int(tokenizer.eos_token_id if stop is None else stop)
        others = {self._token(token) for token in template.other_stops}
        self.stop_ids = sorted({self.stop_id, int(tokenizer.eos_token_id), *others})
        self._opens_with_space = opens_with_space(tokenizer)
        self._literals: dict[tuple[str, bool], list[int]] = {}  # few pieces, and every row has all of them

    def with_max_length(self, max_length: int | None) -> Encoder:
        """The same encoder, cutting elsewhere."""
        other = copy(self)
        other.max_length = max_length
        return other

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids of a prompt that the model is to go on from."""
        return [i for piece in self._pieces(messages, tools, set()) for i in piece.ids]

    def samples(self, conversation: Conversation) -> list[Sample]:
        """The samples of a row: one, or one per answer where the template wants that."""
        if not self.template.one_answer_per_sample or conversation.format == "text":
            sample = self.sample(conversation)
            return [] if sample is None else [sample]
        answers = sorted(self.trained_turns(conversation.messages))
        rows = [replace(conversation, messages=conversation.messages[: turn + 1]) for turn in answers]
        return [sample for sample in map(self._sample_last, rows) if sample is not None]

    def sample(self, conversation: Conversation) -> Sample | None:
        """The row as ids and mask, or None where not one trained token is left of it.

        Where the template wants one answer per sample, this is the sample of the last answer.
        """
        encoder = self._plain() if conversation.format == "text" else self
        return encoder._sample(conversation, self.trained_turns)

    def _plain(self) -> Encoder:
        """The same encoder for plain text, which no template frames, beside conversations too."""
        other = copy(self)
        other.template, other.stop_id = TABLE["plain"], int(self.tokenizer.eos_token_id)
        return other

    def _sample_last(self, conversation: Conversation) -> Sample | None:
        return self._sample(conversation, lambda messages: {len(messages) - 1})

    def _sample(self, conversation: Conversation, choose: Callable[[Sequence[Message]], set[int]]) -> Sample | None:
        def render(messages: Sequence[Message]) -> list[_Piece]:
            return self._pieces(messages, conversation.tools, choose(messages))

        pieces = render(conversation.messages)
        whole_trained = sum(len(p.ids) for p in pieces if p.trained)
        whole_length = _length(pieces)
        needed = _needed(pieces, conversation.messages, choose(conversation.messages))
        if self.max_length is not None and whole_length > self.max_length:
            pieces = self._cut(pieces, self.max_length, render, conversation.messages)
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
            ends_whole=next(p.role == "stop" for p in reversed(pieces) if p.trained),
            prompt_length=int(mask.argmax()),
            needed=needed,
        )

    def trained_turns(self, messages: Sequence[Message]) -> set[int]:
        """The turns that are trained."""
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if self.train_on == "last":
            return set(answers[-1:])
        if self.train_on == "tool-calls":
            return {turn for turn in answers if messages[turn].tool_calls}
        return set(answers)

    def _pieces(self, messages: Sequence[Message], tools: Tools, chosen: set[int]) -> list[_Piece]:
        """Ids of the rendering, piece by piece."""
        segments = self.template.render(messages, tools)
        pieces: list[_Piece] = []
        after_text = False
        for n, segment in enumerate(segments):
            if segment.joined:
                continue  # encoded with the one before it
            group = (segment, *takewhile(lambda s: s.joined, segments[n + 1 :]))
            pieces.append(self._piece(group, chosen, after_text=after_text))
            after_text = bool(segment.text)
        return pieces

    def _piece(self, group: tuple[Segment, ...], chosen: set[int], *, after_text: bool = False) -> _Piece:
        first = group[0]
        continued = after_text and self._opens_with_space
        trained = first.trained and first.turn in chosen
        content = any(s.text and not s.literal for s in group)
        return _Piece(self._ids(group, continued=continued), trained, content, first.role, group)

    def _ids(self, group: tuple[Segment, ...], *, continued: bool = False) -> list[int]:
        first = group[0]
        if first.role == "bos":
            return [] if self.bos_id is None else [self.bos_id]
        if first.token is not None:
            return [self._token(first.token)]
        if first.role == "stop":
            return [self.stop_id]
        text = "".join(s.text for s in group)
        if not all(s.literal for s in group):
            return encode(self.tokenizer, text, literal=False, continued=continued)
        if (text, continued) not in self._literals:
            self._literals[text, continued] = encode(self.tokenizer, text, literal=True, continued=continued)
        return self._literals[text, continued]

    def _token(self, name: str) -> int:
        found = single_id(self.tokenizer, name)
        if found is None:
            raise ConfigError(
                f"template {self.template.name!r} needs the special token {name!r}, which this tokenizer lacks",
                received=type(self.tokenizer).__name__,
                expected=f"a tokenizer with {name!r} in its vocabulary",
                fix="choose another template, or --template auto",
            )
        return found

    def _cut(
        self,
        pieces: list[_Piece],
        limit: int,
        render: Callable[[Sequence[Message]], list[_Piece]],
        messages: Sequence[Message],
    ) -> list[_Piece]:
        """A row cut to `limit` tokens: oldest exchanges, then the prompt's text, then the answer's end."""
        system = [m for m in messages if m.role == "system"]
        turns = [m for m in messages if m.role != "system"]
        while _length(pieces) > limit:
            starts = [n for n, m in enumerate(turns) if m.role == "user" and n > 0]
            if not starts:
                break
            turns = turns[starts[0] :]
            pieces = render([*system, *turns])
        for n, piece in enumerate(pieces):  # the prompt's texts, the oldest first, each from its end
            excess = _length(pieces) - limit
            if piece.content and not piece.trained and excess > 0:
                pieces[n] = self._shorter(piece, max(0, len(piece.ids) - excess))
        while (excess := _length(pieces) - limit) > 0:  # the row's end: first the stop token, then the answer
            last = pieces.pop()
            if last.role != "stop" and excess < len(last.ids):
                pieces.append(replace(last, ids=last.ids[: len(last.ids) - excess]))
        return pieces

    def _shorter(self, piece: _Piece, length: int) -> _Piece:
        """The piece in `length` tokens or, where the template's share of it is more, without the user's text."""
        if len(piece.segments) == 1:
            return replace(piece, ids=piece.ids[:length])
        # encoded as one text with pieces of the template: only the users' texts get shorter, then all is encoded anew
        segments, ids = list(piece.segments), piece.ids
        for n, segment in enumerate(segments):
            text = segment.text
            while not segment.literal and text and len(ids) > length:
                text = text[: max(0, len(text) - (len(ids) - length))]
                segments[n] = replace(segment, text=text)
                ids = self._ids(tuple(segments))
        return replace(piece, ids=ids, segments=tuple(segments))


def _length(pieces: list[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _needed(pieces: list[_Piece], messages: Sequence[Message], chosen: set[int]) -> int:
    """Tokens that must stay so that no answer loses any: an exchange that is dropped takes its answer along."""
    last = max((turn for turn, message in enumerate(messages) if message.role == "user"), default=0)
    if any(turn < last for turn in chosen):
        return _length(pieces)

    def can_go(piece: _Piece) -> bool:
        return not piece.trained and (piece.content or (piece.role != "system" and 0 <= piece.segments[0].turn < last))

    return sum(len(piece.ids) for piece in pieces if not can_go(piece))


def encode_all(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    report: DataReport,
    *,
    policy: LengthPolicy = "cut",
    whole: Sequence[list[Sample]] | None = None,
) -> list[Sample]:
    """Every row as its samples; what was kept, cut and dropped is counted in `report`, by rows.

    Args:
        conversations: the rows.
        encoder: with its max_length.
        report: is added to.
        policy: what becomes of a row that is too long: cut it, drop it, or refuse the run.
        whole: the samples of each row uncut, where they are at hand already.

    Raises:
        DataError, Problems: too long rows, under the policy `refuse`.
    """
    problems = Collector()
    limit = encoder.max_length
    samples: list[Sample] = []
    for number, conversation in enumerate(conversations):
        made = encoder.with_max_length(None).samples(conversation) if whole is None else whole[number]
        if limit is not None and any(len(sample) > limit for sample in made):
            with problems.gather():
                made = _too_long(conversation, made, encoder, policy)
        report.dropped += not made
        report.kept += bool(made)
        report.cut_prompt += any(sample.cut_prompt > 0 for sample in made)
        report.cut_answer += any(sample.cut_answer > 0 for sample in made)
        samples += made
    problems.raise_any()
    report.samples = len(samples)
    report.tokens = sum(len(sample) for sample in samples)
    report.trained_tokens = sum(int(sample.mask.sum()) for sample in samples)
    return samples


def _too_long(conversation: Conversation, made: list[Sample], encoder: Encoder, policy: LengthPolicy) -> list[Sample]:
    """The samples of a row that is too long, as the policy wants them."""
    if policy == "drop":
        return []
    if policy == "refuse":
        where = conversation.source
        raise DataError(
            "the row is too long",
            file=where.file if where else None,
            line=where.line if where else None,
            received=f"{max(map(len, made))} tokens",
            expected=f"at most {encoder.max_length} (max_length)",
            fix="a larger --max-length, or --length-policy cut",
        )
    return encoder.samples(conversation)
