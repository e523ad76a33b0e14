"""Conversations to samples: the one place that decides which tokens are trained.

In: a Conversation, a Template, a tokenizer. Out: Sample(ids, mask). Each segment is encoded apart, in training and in
chat alike, so a token never spans the border between prompt and answer. The stop token is an id, added after cutting.

Cutting, where a row is longer than max_length: oldest exchanges first (each with a system's text right before it), then
the user's text, and only then the answer, which then keeps no stop token (a cut answer must not teach to stop in
mid-sentence). What a system or a tool says, the descriptions of tools and calls of tools are never cut inside: half a
JSON object teaches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import numpy as np

from fitune.core.config import TrainOn
from fitune.core.errors import ConfigError, DataError, FituneError, RunawayError
from fitune.core.records import SPAN, Conversation, Message, Sample, Segment
from fitune.data import pairs
from fitune.data.documents import split
from fitune.data.fields import in_row
from fitune.data.pieces import Group, Piece, before_turns, is_users, length_of, weights_of, with_system
from fitune.data.templates import TABLE, ChatTemplate, Template, thoughts
from fitune.data.templates.base import Tools
from fitune.data.tokenizer import adds_bos, encode, encode_many, opens_with_space, single_id, special
from fitune.data.tokenizer.interface import Tokenizer

Known = dict[tuple[str, bool], list[int]]  # ids of texts that were encoded together, by text and `continued`


@dataclass(frozen=True)
class _Draft:
    """A sample to be: the encoder it is for, its conversation, the turns that are trained, its groups."""

    encoder: Encoder
    conversation: Conversation
    choose: Callable[[Sequence[Message]], set[int]]
    groups: list[Group]


class Encoder:
    """Encodes with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer.
        template: gives a conversation its shape.
        max_length: longest sample in tokens; None does not cut.
        train_on: which of the assistant's turns are trained: all, the last one, or those that call a tool.
        answer_tokens: special tokens of the vocabulary that answers are to produce; in all other text they stay text.
        both: a row of preferences becomes two samples, with the chosen and with the rejected answer.

    Raises:
        ConfigError: the template needs special tokens that the vocabulary lacks.
        ConfigError, Problems: answer tokens that are none.

    Example:
        >>> sample = Encoder(tokenizer, template, 512).sample(conversation)
        >>> tokenizer.decode(sample.ids[sample.mask])  # what is trained
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        max_length: int | None = None,
        train_on: TrainOn = "all",
        answer_tokens: Sequence[str] = (),
        *,
        both: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.max_length, self.train_on = tokenizer, template, max_length, train_on
        self.both = both  # samples of a row of preferences
        self.split = False  # documents of plain text that are too long become several samples, instead of being cut
        self.bos_id = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        stop = single_id(tokenizer, template.stop) if template.stop else None
        self.stop_id = int(tokenizer.eos_token_id if stop is None else stop)
        others = {self._token(token) for token in template.other_stops}
        self.stop_ids = sorted({self.stop_id, int(tokenizer.eos_token_id), *others})
        self._opens_with_space = opens_with_space(tokenizer)
        self._literals: dict[tuple[str, bool], list[int]] = {}  # few pieces, and every row has all of them
        self._specials = special.ids(tokenizer)
        self.control = special.control(tokenizer, self.stop_ids, self._frame())
        self.marks = special.marks(tokenizer, answer_tokens, self.control)

    def with_max_length(self, max_length: int | None, *, split: bool | None = None) -> Encoder:
        """The same encoder, cutting (or splitting documents of plain text) elsewhere."""
        other = copy(self)
        other.max_length = max_length
        other.split = self.split if split is None else split
        return other

    def _frame(self) -> str:
        """What the template writes around texts, the parts of an answer left out."""
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        try:
            segments = self.template.prompt(turns)
        except FituneError:  # it wants other turns; its own text has the names of its tokens too
            return json.dumps(self.template.as_dict(), ensure_ascii=False)
        return " ".join(s.token or s.text for s in segments if s.literal and not s.trained)

    def text(self, ids: Sequence[int]) -> str:
        """What a model wrote, for a person: without special tokens, but for those that answers may name, and tags of
        thoughts, which some vocabularies count among them."""
        return special.readable(self.tokenizer, ids, [*self.marks.answers.values(), *self._tags])

    def without_special(self, text: str) -> str:
        """The template's own text as `text` shows it."""
        kept = {*self.marks.answers.values(), *self._tags}
        gone = [t.content for i, t in self.tokenizer.added_tokens_decoder.items() if t.special and i not in kept]
        for token in sorted(gone, key=len, reverse=True):
            text = text.replace(token, "") if token else text
        return text

    @cached_property
    def _tags(self) -> list[int]:
        """Ids of tags of thoughts."""
        ids = (single_id(self.tokenizer, tag) for kind in thoughts.KINDS for tag in (kind.open, kind.close))
        return [i for i in ids if i is not None]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids of a prompt that the model is to go on from."""
        messages = self._with_thoughts(messages)
        groups = self._grouped(self.template.prompt(messages, tools), messages, set())
        return [i for piece in self._pieces(groups, {}) for i in piece.ids]

    def samples(self, conversation: Conversation) -> list[Sample]:
        """The samples of a row: one, or one per answer where the template wants that."""
        return self.samples_of([conversation])[0]

    def samples_of(
        self, conversations: Sequence[Conversation], on_bad: Callable[[int, DataError], None] | None = None
    ) -> list[list[Sample]]:
        """The samples of many rows; their texts are encoded in one call, side by side on all cores.

        Args:
            conversations: the rows.
            on_bad: receives the number of a row that the template cannot write, and why; it has no samples then.

        Raises:
            DataError: a row that the template cannot write, where there is no on_bad.
        """
        drafts: list[list[_Draft]] = []
        for number, conversation in enumerate(conversations):
            try:
                drafts.append(self._drafts(conversation))
            except RunawayError as error:  # the next row would take as long
                raise in_row(error, conversation) from None
            except FituneError as error:
                named = in_row(error, conversation)
                if on_bad is None:
                    raise named from error
                on_bad(number, named)
                drafts.append([])
        groups = [group for row in drafts for draft in row for group in draft.groups]
        known = self._encode_together(groups)
        return [self._made(row, known) for row in drafts]

    def sample(self, conversation: Conversation) -> Sample | None:
        """The row as ids and mask, or None where not one trained token is left of it.

        Where the template wants one answer per sample, this is the sample of the last answer.
        """
        draft = self._draft(conversation, self.trained_turns)
        return draft.encoder._finish(draft, {})

    def _drafts(self, conversation: Conversation) -> list[_Draft]:
        if self.both and conversation.rejected:
            return [self._side(conversation), self._side(conversation.other())]
        if conversation.format == "text" or not self.one_answer_per_sample(conversation):
            return [self._draft(conversation, self.trained_turns)]
        answers = sorted(self.trained_turns(conversation.messages))
        rows = [replace(conversation, messages=conversation.messages[: turn + 1]) for turn in answers]
        return [self._draft(row, lambda messages: {len(messages) - 1}) for row in rows]

    def _side(self, row: Conversation) -> _Draft:
        """One answer of a row of preferences."""
        return self._draft(row, lambda messages: set(self.side_turns(row, messages)))

    def side_turns(self, row: Conversation, left: Sequence[Message] | None = None) -> list[int]:
        """The turns of one side of a row of preferences that are trained (`left`: of what cutting has left of it): what
        stands behind the prompt of both. Where each answer would be a sample of its own, the last one is."""
        behind = 1 if self.one_answer_per_sample(row) else len(row.messages) - row.fork
        messages = row.messages if left is None else left
        return sorted(turn for turn in self.trained_turns(messages) if turn >= len(messages) - behind)

    def _made(self, drafts: Sequence[_Draft], known: Known) -> list[Sample]:
        """The samples of a row's drafts; of two sides, cut alike."""
        if self.both and drafts and drafts[0].conversation.rejected:
            sides = [lambda limit, one=draft: self.with_max_length(limit)._finish(one, known) for draft in drafts]
            alike = drafts[0].conversation.desirable is None
            return pairs.cut(sides, self.max_length, alike=alike)
        return [sample for draft in drafts for sample in draft.encoder._samples(draft, known)]

    def one_answer_per_sample(self, conversation: Conversation) -> bool:
        """Does each answer of this row become a sample of its own?"""
        return self.template.one_answer_per_sample(conversation.messages, conversation.tools)

    def _refuse_gaps(self, messages: Sequence[Message]) -> None:
        """Raises ConfigError for answers that fill in gaps, where the template has no place for them."""
        several = any(m.role == "assistant" and SPAN in m.content for m in messages)
        if (
            several
            and not getattr(self.template, "fills", False)
            and any(m.role == "user" and SPAN in m.content for m in messages)
        ):
            raise ConfigError(
                f"a row fills in several {SPAN}, and the template {self.template.name!r} has no place for that",
                expected="ChatGLM-6B and its template",
                fix="--template chatglm",
            )

    def _draft(self, conversation: Conversation, choose: Callable[[Sequence[Message]], set[int]]) -> _Draft:
        encoder = self._plain() if conversation.format == "text" else self
        self._refuse_gaps(conversation.messages)
        groups = encoder._groups(conversation.messages, conversation.tools, choose(conversation.messages))
        return _Draft(encoder, conversation, choose, groups)

    def _plain(self) -> Encoder:
        """The same encoder for plain text, which no template frames, beside conversations too."""
        other = copy(self)
        other.template, other.stop_id = TABLE["plain"], int(self.tokenizer.eos_token_id)
        return other

    def _encode_together(self, groups: Sequence[Group]) -> Known:
        """Ids of the groups' texts, those of the template left out."""
        known: Known = {}
        for continued in (False, True):
            parts = (part for group in groups if group.content for part in self._parts(group))
            texts = list({part[0]: None for part in parts if isinstance(part, tuple) and part[1] == continued})
            ids = encode_many(self.tokenizer, texts, continued=continued)
            known.update(((text, continued), one) for text, one in zip(texts, ids, strict=True))
        return known

    def _samples(self, draft: _Draft, known: Known) -> list[Sample]:
        if self.split and draft.conversation.format == "text":
            whole = self.with_max_length(None)._finish(draft, known)
            return [] if whole is None else split(whole, self.max_length, self.bos_id)
        sample = self._finish(draft, known)
        return [] if sample is None else [sample]

    def _finish(self, draft: _Draft, known: Known) -> Sample | None:
        conversation, choose = draft.conversation, draft.choose
        pieces = self._pieces(draft.groups, known)
        whole_trained = sum(len(p.ids) for p in pieces if p.group.trained)
        whole_length = length_of(pieces)
        needed, intact = self._needed(draft, pieces, known)
        cut_text = 0
        if self.max_length is not None and whole_length > self.max_length:
            pieces, cut_text = self._cut(pieces, self.max_length, conversation, choose)
        ids = np.fromiter((i for p in pieces for i in p.ids), np.int32)
        mask = np.repeat([p.group.trained for p in pieces], [len(p.ids) for p in pieces]).astype(np.bool_)
        if len(mask):
            mask[0] = False  # nothing precedes the first token, so it cannot be predicted
        if not mask.any():
            return None
        lost_answer = whole_trained - sum(len(p.ids) for p in pieces if p.group.trained)
        return Sample(
            ids,
            mask,
            source=conversation.source,
            cut_prompt=whole_length - len(ids) - lost_answer,
            cut_answer=lost_answer,
            ends_whole=next(p.group.role == "stop" for p in reversed(pieces) if p.group.trained),
            prompt_length=int(mask.argmax()),
            needed=needed,
            weights=weights_of(pieces),
            intact=intact,
            cut_text=cut_text,
        )

    def trained_turns(self, messages: Sequence[Message]) -> set[int]:
        """The turns that are trained: of those that `train_on` names all but what is context only."""
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        if self.train_on == "last":
            answers = answers[-1:]
        if self.train_on == "tool-calls":
            answers = [turn for turn in answers if messages[turn].tool_calls]
        return {turn for turn in answers if messages[turn].weight}

    def _groups(self, messages: Sequence[Message], tools: Tools, chosen: set[int]) -> list[Group]:
        """The rendering of a row, in the groups that are encoded as one."""
        messages = self._with_thoughts(messages)
        return self._grouped(self.template.render(messages, tools), messages, chosen)

    @cached_property
    def thought_tags(self) -> thoughts.Tags | None:
        """The tags of thoughts that the vocabulary knows."""
        return next((kind for kind in thoughts.KINDS if single_id(self.tokenizer, kind.open) is not None), None)

    def _with_thoughts(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Thoughts as text between tags, for templates that are not the tokenizer's own; those know their place.

        Raises:
            ConfigError: the vocabulary has no tags for them.
        """
        if isinstance(self.template, ChatTemplate) or not any(message.thought for message in messages):
            return messages
        kind = self.thought_tags
        if kind is None:
            raise ConfigError(
                f"template {self.template.name!r} has no place for a thought, and the vocabulary has no tags for one",
                received="an answer with a thought in a field of its own",
                expected="a vocabulary with <think>, or a chat template that reads reasoning_content",
                fix="--new-tokens '<think>' '</think>', or leave the thoughts out of the data",
            )
        return [
            replace(m, content=thoughts.written(m.thought, m.content, kind), thought="") if m.thought else m
            for m in messages
        ]

    def _grouped(self, segments: Sequence[Segment], messages: Sequence[Message], chosen: set[int]) -> list[Group]:
        groups: list[Group] = []
        after_text, chat = False, isinstance(self.template, ChatTemplate)
        for n, segment in enumerate(segments):
            if segment.joined:
                continue  # encoded with the one before it
            group = (segment, *takewhile(lambda s: s.joined, segments[n + 1 :]))
            trained = segment.trained and segment.turn in chosen
            weight = messages[segment.turn].weight if trained else 1.0
            groups.append(Group(group, trained, continued=after_text and self._opens_with_space, weight=weight))
            # in a chat template's own rendering what stands behind a stop token goes on, too
            after_text = bool(segment.text) or (chat and segment.role == "stop")
        return groups

    def _pieces(self, groups: Sequence[Group], known: Known) -> list[Piece]:
        return [Piece(self._ids(group, known), group) for group in groups]

    def _ids(self, group: Group, known: Known) -> list[int]:
        first = group.segments[0]
        if first.role == "bos":
            return [] if self.bos_id is None else [self.bos_id]
        if first.token is not None:
            return [self._token(first.token)]
        if first.role == "stop":
            return [self.stop_id]
        text, continued = group.text, group.continued
        if not group.literal:
            return [i for part in self._parts(group) for i in self._part_ids(part, known)]
        if (text, continued) not in self._literals:
            self._literals[text, continued] = encode(self.tokenizer, text, literal=True, continued=continued)
        return self._literals[text, continued]

    def _parts(self, group: Group) -> list[tuple[str, bool] | int]:
        """A text in the parts that are encoded apart, each with its `continued`; and ids of answer tokens."""
        found: list[str | int] = []
        for segment in group.segments:
            own = (
                special.parsed(self._specials, segment.text)
                if segment.literal
                else self.marks.split(segment.text, answer=segment.role == "assistant")
            )
            if found and own and isinstance(found[-1], str) and isinstance(own[0], str):
                found[-1], own = found[-1] + own[0], own[1:]  # encoded as one with what stands before it
            found += own
        continued = [group.continued, *[self._opens_with_space] * len(found)]
        return [part if isinstance(part, int) else (part, continued[n]) for n, part in enumerate(found)]

    def _part_ids(self, part: tuple[str, bool] | int, known: Known) -> list[int]:
        if isinstance(part, int):
            return [part]
        found = known.get(part)
        text, continued = part
        return encode(self.tokenizer, text, literal=False, continued=continued) if found is None else found

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

    def _needed(self, draft: _Draft, pieces: list[Piece], known: Known) -> tuple[int, int]:
        """Tokens that must stay so that no answer loses any, and so that nothing goes but old exchanges: each takes
        its answer along, so where that is trained all must stay."""
        messages = draft.conversation.messages
        last = max((turn for turn, message in enumerate(messages) if message.role == "user"), default=0)
        if any(turn < last for turn in draft.choose(messages)):
            return length_of(pieces), length_of(pieces)
        system, turns = before_turns(messages)
        left = [*system, *turns[with_system(turns, max(0, last - len(system))) :]]
        if len(left) < len(messages):
            pieces = self._pieces(self._groups(left, draft.conversation.tools, draft.choose(left)), known)
        return sum(map(self._least, pieces)), length_of(pieces)

    def _least(self, piece: Piece) -> int:
        """Tokens of a piece that no cutting of a prompt takes away."""
        if not piece.group.cuttable:
            return len(piece.ids)
        left = tuple(segment for segment in piece.group.segments if not is_users(segment))
        return len(self._ids(Group(left, trained=False), {})) if left else 0

    def _cut(
        self,
        pieces: list[Piece],
        limit: int,
        conversation: Conversation,
        choose: Callable[[Sequence[Message]], set[int]],
    ) -> tuple[list[Piece], int]:
        """A row cut to `limit` tokens: oldest exchanges, then the user's text, then the answer's end; and how many
        tokens of user's texts that stay were cut."""
        system, turns = before_turns(conversation.messages)
        while length_of(pieces) > limit:
            starts = [with_system(turns, n) for n, message in enumerate(turns) if message.role == "user"]
            first = next(filter(None, starts), None)
            if first is None:
                break
            turns = turns[first:]
            left = [*system, *turns]
            pieces = self._pieces(self._groups(left, conversation.tools, choose(left)), {})
        kept = length_of(pieces)
        # the longest text first, each from its end: of an instruction and its long input, the input
        for n in sorted(range(len(pieces)), key=lambda n: -len(pieces[n].ids)):
            excess = length_of(pieces) - limit
            if pieces[n].group.cuttable and excess > 0:
                pieces[n] = self._shorter(pieces[n], max(0, len(pieces[n].ids) - excess))
        cut_text = kept - length_of(pieces)
        while (excess := length_of(pieces) - limit) > 0:  # the row's end: first the stop token, then the answer
            last = pieces.pop()
            if last.group.role != "stop" and excess < len(last.ids):
                pieces.append(replace(last, ids=last.ids[: len(last.ids) - excess]))
        return pieces, cut_text

    def _shorter(self, piece: Piece, length: int) -> Piece:
        """The piece in `length` tokens or, where the template's share of it is more, without the user's text."""
        group = piece.group
        if len(group.segments) == 1:
            return replace(piece, ids=piece.ids[:length])
        # encoded as one text with pieces of the template: only the users' texts get shorter, then all is encoded anew
        ids = piece.ids
        for n, segment in enumerate(group.segments):
            text = segment.text
            while is_users(segment) and text and len(ids) > length:
                text = text[: max(0, len(text) - (len(ids) - length))]
                parts = list(group.segments)
                parts[n] = replace(segment, text=text)
                group = Group(tuple(parts), group.trained)
                ids = self._ids(group, {})
        return Piece(ids, group)
