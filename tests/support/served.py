"""Trained = served: what is trained of a row against what transformers renders of the same messages.

In: a kind of template, a row. Out: a Cell: how the ids agree, or by which message the row is refused, or where they
differ. Nothing here asks fitune how it renders: prompts and answers are those of `apply_chat_template`, of a named
template by what the hand-over writes, and of ChatGLM, which no text writes, by its published format: served_chatglm.py.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from transformers.utils.chat_template_utils import render_jinja_template

from fitune.core.errors import FituneError
from fitune.core.records import Sample, Source
from fitune.data.conversations import to_conversation
from fitune.data.encode import Encoder
from fitune.data.templates import TABLE
from fitune.data.templates.jinja import of_tokenizer
from fitune.models.handover.proof import BORDER, PIECES, best, write_pieces
from support import chat_templates as kinds
from support import served_chatglm
from support.encoding import decoded
from support.served_kinds import KINDS, Kind
from support.served_rows import Row, Turn, sent

Interval = tuple[int, int]
QUESTION: Turn = {"role": "user", "content": "?"}


class DifferenceError(Exception):
    """What is trained is not what is served."""


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    how: "same" (one sample, the ids of the rendering), "moved" (so, with the system text in the first question), "each"
    (one sample for each answer, because the template writes the history otherwise), "behind" (each behind the prompt as
    it is served, which is no beginning of the rendering with the answer), "pieces" (the hand-over's chat template
    refuses the prompt, as one text: it is served by the file with its pieces, which are encoded apart), "refused", or
    "differs". why: the message of a refusal, or the first difference.
    """

    how: str
    why: str = ""


@lru_cache
def encoder_of(name: str, date: str) -> Encoder:
    """The encoder of a kind, on a day."""
    kind = KINDS[name]
    if kind.named.startswith("chatglm"):
        return Encoder(served_chatglm.make_tokenizer(kind.named), TABLE[kind.named])
    tokenizer = kinds.make_tokenizer(kind.jinja or None, kind.eos, as_llama=kind.as_llama)
    if kind.named:  # whoever serves the model gets what the hand-over writes
        encoder = Encoder(tokenizer, TABLE[kind.named])
        tokenizer.chat_template = best(encoder, copy(tokenizer))[0]
        return encoder
    return Encoder(tokenizer, of_tokenizer(tokenizer, options=kind.options, date=date))


class Serves(Protocol):
    """What a server makes of messages."""

    def asked(self, history: Sequence[Turn]) -> list[int]:
        """The prompt of an answer."""
        ...

    def answered(self, messages: Sequence[Turn], stop: int | None) -> list[int]:
        """History and answer, up to the token that ends it."""
        ...

    def by_pieces(self, history: Sequence[Turn]) -> bool:
        """Does the chat template refuse the prompt, so that its pieces are encoded apart?"""
        ...


@lru_cache
def pieces_of(name: str) -> str:
    """The file with a prompt's pieces that the hand-over writes for a kind; empty: it writes none."""
    if not KINDS[name].named:
        return ""
    encoder = encoder_of(name, "")
    jinja, proof, _ = best(encoder, copy(encoder.tokenizer))
    if jinja is not None and not proof.without:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        assert write_pieces(Path(folder), encoder, copy(encoder.tokenizer))
        return (Path(folder) / PIECES).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Server:
    """A kind's template as a server applies it. pieces: of the hand-over, for what its chat template refuses."""

    kind: Kind
    tokenizer: Any
    tools: Sequence[Turn] = ()
    pieces: str = ""

    def text(self, messages: Sequence[Turn], *, asks: bool) -> str:
        """What it renders."""
        turns = [sent(turn, arguments_as_text=self.kind.text_arguments) for turn in messages]
        if self.kind.moves:
            for at in [n for n, turn in enumerate(turns) if turn["role"] == "system"][::-1]:
                rules = turns.pop(at)["content"]
                turns[at]["content"] = f"{rules}\n\n{turns[at]['content']}"
        how: dict[str, Any] = {"tools": list(self.tools) or None, "add_generation_prompt": asks, **self.kind.options}
        if not self.kind.none_content:
            try:
                return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))
            except Exception:  # whatever a template raises
                if not self.pieces:
                    raise
            return str(self.tokenizer.apply_chat_template(turns, chat_template=self.pieces, tokenize=False, **how))
        for turn in turns:
            turn["content"] = turn["content"] or None
        named = {**self.tokenizer.special_tokens_map, "chat_template": self.kind.jinja}
        return str(render_jinja_template(conversations=[turns], **named, **how)[0][0])

    def encoded(self, text: str) -> list[int]:
        """The ids of a rendering, or of its pieces."""
        parts = text.split(BORDER) if self.pieces else [text]
        return [int(one) for part in parts for one in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def asked(self, history: Sequence[Turn]) -> list[int]:
        """The prompt of an answer. One that nobody asks for (it comes first, or follows another) stands behind what is
        before any answer there, and the header of prompts."""
        if history and history[-1]["role"] != "assistant":
            return self.encoded(self.text(history, asks=True))
        alone, asked = self.text([QUESTION], asks=False), self.text([QUESTION], asks=True)
        header = asked[len(re.sub(r"<[^<>]*$", "", shared(alone, asked))) :]
        before = self.text([*history, {"role": "assistant", "content": "SAID"}], asks=False).rpartition("SAID")[0]
        tag = re.match(r"<[^<>]*>", header)
        if not tag and header.strip() and before.endswith(header):
            return self.encoded(before)
        at = before.rfind(tag[0], before.rfind(history[-1]["content"]) if history else 0) if tag else -1
        if at >= 0:
            return self.encoded(before[:at] + header)
        return self.encoded(self.text(history, asks=True) if history and tag else before.rstrip())

    def by_pieces(self, history: Sequence[Turn]) -> bool:
        """Does the chat template refuse the prompt?"""
        return bool(self.pieces) and BORDER in self.text(history or [QUESTION], asks=True)

    def answered(self, messages: Sequence[Turn], stop: int | None) -> list[int]:
        """History and answer, up to the token that ends it."""
        last = dict(messages[-1])
        if self.kind.drops and (thought := last.pop("reasoning_content", "")):  # as the model wrote it
            last["content"] = self.kind.written.format(thought, last["content"] or "")
        found = self.encoded(self.text([*messages[:-1], last], asks=False))
        if self.kind.ends_in_nothing:
            return [*found, stop] if stop is not None else found
        assert stop is not None
        return found[: len(found) - found[::-1].index(stop)]


def shared(one: str, other: str) -> str:
    """What two texts begin with."""
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:at]


def judged(name: str, row: Row) -> Cell:
    """The cell of a kind of template and a row."""
    kind, encoder = KINDS[name], encoder_of(name, datetime.now().date().isoformat())
    if not kind.lists_tools:
        row = {key: value for key, value in row.items() if key != "tools"}
    messages: list[Turn] = row["messages"]
    try:
        conversation = to_conversation(row, Source("rows.jsonl", 7), name="messages")
        samples = encoder.samples(conversation)
    except FituneError as error:
        return Cell("refused", str(error))
    trained = [turn for turn, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight", 1) != 0]
    split = encoder.one_answer_per_sample(conversation)
    groups = [[turn] for turn in trained] if split else [trained]
    tools = row.get("tools", ())
    server = (
        served_chatglm.Published(kind.named, served_chatglm.make_tokenizer(kind.named).model, tools)
        if kind.named.startswith("chatglm")
        else Server(kind, encoder.tokenizer, tools, pieces_of(name))
    )
    hows = set()
    try:
        if len(samples) != len(groups):
            raise DifferenceError(f"{len(samples)} samples for {len(groups)}")
        for sample, turns in zip(samples, groups, strict=True):
            hows |= compare(sample, messages, turns, kind, server, encoder)
    except DifferenceError as error:
        return Cell("differs", str(error))
    moved = kind.moves and any(turn["role"] == "system" for turn in messages)
    found = next((how for how in ("behind", "pieces") if how in hows), "")
    return Cell(found or ("each" if split else "moved" if moved else "same"))


def compare(
    sample: Sample, messages: Sequence[Turn], turns: Sequence[int], kind: Kind, server: Serves, encoder: Encoder
) -> set[str]:
    """How each answer of a sample agrees.

    Raises:
        DifferenceError: it does not, or something else is trained.
    """
    ids, hows = sample.ids.tolist(), set()
    wanted: set[int] = set()
    for turn in turns:
        after = messages[turn + 1]["role"] if len(turns) > 1 and turn + 1 < len(messages) else ""
        how, (start, end) = placed(ids, sample, messages[: turn + 1], after, kind, server, encoder)
        hows.add(how)
        wanted |= set(range(max(1, start), end))  # nothing stands before a first id
    found = {at for at, one in enumerate(sample.mask.tolist()) if one}
    if found != wanted:
        raise DifferenceError(
            f"trained: {decoded(encoder, [ids[at] for at in sorted(found ^ wanted)])!r} too much or not"
        )
    return hows


def placed(
    ids: list[int], sample: Sample, messages: Sequence[Turn], after: str, kind: Kind, server: Serves, encoder: Encoder
) -> tuple[str, Interval]:
    """How an answer agrees, and where it stands in a sample. after: the role of the turn behind it there, if any."""
    name = (messages[-1].get("tool_calls") and kind.call_end) or kind.end
    if kind.ends_in_nothing and after:
        name = {"user": "<|user|>", "tool": "<|observation|>"}.get(after, "")
    stop = encoder.tokenizer.convert_tokens_to_ids(name) if name else None
    try:
        prompt, whole = server.asked(messages[:-1]), server.answered(messages, stop)
    except Exception as error:  # whatever a template raises
        raise DifferenceError(f"the server refuses it: {error}") from None
    thought = messages[-1].get("reasoning_content", "")
    own = kind.own_tags and (messages[-1]["content"] or "").startswith("<think>")
    if whole[: len(prompt)] == prompt and not own and thought in decoded(encoder, whole[len(prompt) :]):
        _same(ids, whole, encoder)
        return ("pieces" if server.by_pieces(messages[:-1]) else "same"), (len(prompt), len(whole))
    _same(ids, prompt, encoder)
    end = next((at for at in range(len(prompt), len(ids)) if not sample.mask[at]), len(ids))
    found, text = decoded(encoder, ids[len(prompt) : end]), kind.answer(messages[-1], decoded(encoder, prompt))
    if found != text:
        raise DifferenceError(f"behind the prompt: {found!r}, not {text!r}")
    return "behind", (len(prompt), end)


def _same(ids: list[int], served: list[int], encoder: Encoder) -> None:
    at = next((n for n, (one, other) in enumerate(zip(ids, served, strict=False)) if one != other), None)
    if at is not None:
        mine, others = (
            decoded(encoder, ids[max(0, at - 8) : at + 12]),
            decoded(encoder, served[max(0, at - 8) : at + 12]),
        )
        raise DifferenceError(f"id {at}: trained {mine!r}, served {others!r}")
    if len(ids) < len(served):
        raise DifferenceError(f"served too: {decoded(encoder, served[len(ids) :])!r}")
