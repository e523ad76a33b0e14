"""Prompts to answers, with the template and the stop tokens of training.

In: messages. Out: the text of the answer, streamed if wanted. The prompt comes from the same encoder that made the
training rows; `batching.py` answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from fitune.core.records import SPAN, Conversation, Message
from fitune.data.templates import ChatTemplate, thoughts
from fitune.engine.batching import Batcher, Request, Room
from fitune.engine.drawing import Sampling, Token
from fitune.engine.speech import Speech
from fitune.engine.turns import Turns
from fitune.models.adapters import disabled
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned

SIDE_BY_SIDE = 16  # prompts that are answered together


def base_model(tuned: Tuned, *, base: bool) -> AbstractContextManager[object]:
    """Inside, the model answers as its base model does (if `base`)."""
    return disabled(tuned.model) if base else nullcontext()


@torch.no_grad()
def answer(
    tuned: Tuned,
    messages: Sequence[Message],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    base: bool = False,
    turns: Turns | None = None,
) -> str:
    """The model's answer to a conversation.

    Args:
        tuned: the model.
        messages: ends with a user's turn.
        sampling: how to draw.
        on_text: called with each new piece of the answer.
        base: answer as the base model, without what was tuned.
        turns: held by this thread; whoever waits for the model gets it between two tokens.
    """
    question = [Conversation(tuple(messages))]
    return answers(tuned, question, sampling, on_text=on_text, base=base, turns=turns)[0]


@torch.no_grad()
def reply(
    tuned: Tuned,
    messages: Sequence[Message],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    base: bool = False,
    turns: Turns | None = None,
) -> tuple[str, Message]:
    """The model's answer as `answer` gives it, and as the turn that the conversation goes on from.

    That turn has no frame, and its thought in a field of its own: the template decides what of it is in later prompts.

    Args:
        tuned, messages, sampling, on_text, base, turns: see `answer`.
    """
    if not isinstance(tuned.template, ChatTemplate):
        text = answer(tuned, messages, sampling, on_text=on_text, base=base, turns=turns)
        return text, Message("assistant", text)
    prompt = [tuned.encoder.prompt(messages)]
    row = _generate(tuned, prompt, sampling or Sampling(), on_text=on_text, base=base, turns=turns)[0]
    answered = row[: next((n for n, i in enumerate(row) if i in tuned.encoder.stop_ids), len(row))]
    return _text(tuned, row), tuned.template.read_answer(str(tuned.tokenizer.decode(answered)))


@torch.no_grad()
def answers(
    tuned: Tuned,
    questions: Sequence[Conversation],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    base: bool = False,
    turns: Turns | None = None,
) -> list[str]:
    """The answers to several conversations, generated side by side; each is what it would be alone.

    Raises:
        ModelError: a prompt that is longer than the model can hold.
    """
    sampling = sampling or Sampling()
    gaps = [_gaps(tuned, question) for question in questions]
    if max(gaps, default=0) > 1:
        each = zip(questions, gaps, strict=True)
        return [
            _fill_in(tuned, one, n, sampling, base=base) if n > 1 else answers(tuned, [one], sampling, base=base)[0]
            for one, n in each
        ]
    prompts = [tuned.encoder.prompt(question.messages, question.tools) for question in questions]
    made = _generate(tuned, prompts, sampling, on_text=on_text, base=base, turns=turns)
    return [_text(tuned, row) for row in made]


def _gaps(tuned: Tuned, question: Conversation) -> int:
    """The number of gaps in a prompt that are filled in, each by an answer of its own."""
    gaps = getattr(tuned.template, "gaps", None)
    return int(gaps(question.messages)) if gaps else 0


def _fill_in(tuned: Tuned, question: Conversation, count: int, sampling: Sampling, *, base: bool) -> str:
    """The answers to all gaps, one after the other, each seeing those before it; with [MASK] between them."""
    ids, found = tuned.encoder.prompt(question.messages, question.tools), []
    start = ids[-1]  # <sop>
    for _ in range(count):
        row = _generate(tuned, [ids], sampling, base=base)[0]
        end = next((n for n, i in enumerate(row) if i in tuned.encoder.stop_ids), len(row))
        found.append(_text(tuned, row))
        ids = [*ids, *row[:end], tuned.encoder.stop_id, start]
    return SPAN.join(found)


def _generate(
    tuned: Tuned,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] | None = None,
    base: bool = False,
    turns: Turns | None = None,
) -> list[list[int]]:
    """The new ids behind each prompt, stop tokens left out; `on_text` hears the first one's. Between two tokens whoever
    waits for `turns` gets the model, as it was before.

    Raises:
        ModelError: a prompt that is longer than the model can hold.
    """
    found: list[list[int]] = [[] for _ in prompts]
    speech = Speech(tuned.encoder)

    def take(number: int, token: Token) -> None:
        found[number].append(token.id)
        if on_text is not None and number == 0 and (text := speech.add(token.id)):
            on_text(text)

    with base_model(tuned, base=base):
        batcher = Batcher(tuned, Room(running=max(1, len(prompts))))
    for number, ids in enumerate(prompts):
        batcher.add(Request(ids, sampling, partial(take, number)))
    while batcher.busy:
        with base_model(tuned, base=base), batcher.ready():
            batcher.step()
            while batcher.busy and not (turns and turns.wanted):
                batcher.step()
        if turns and batcher.busy:
            turns.give()
    if on_text is not None and (text := speech.end()):
        on_text(text)
    return found


@torch.no_grad()
def most_probable(tuned: Tuned, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """The ids that a greedy answer begins with, going on where it ends: to compare with another program.

    Args:
        tuned: the model.
        prompts: ids.
        count: how many for each.

    Raises:
        ModelError: a prompt that is longer than the model can hold.
    """
    encoder = copy.copy(tuned.encoder)
    encoder.stop_ids = [causal_lm(tuned.model).config.vocab_size]  # an id that no token has
    return _generate(replace(tuned, encoder=encoder), prompts, Sampling(max_new_tokens=count))


@torch.no_grad()
def continued(tuned: Tuned, prompts: Sequence[list[int]], sampling: Sampling, *, base: bool = False) -> list[str]:
    """Texts behind prompts that no template made, up to a stop token, without special tokens.

    Args:
        tuned: the model.
        prompts: ids.
        sampling: how to draw.
        base: as the base model, without what was tuned.

    Raises:
        ModelError: a prompt that is longer than the model can hold.
    """
    made = _generate(tuned, prompts, sampling, base=base)
    return [str(tuned.tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]


def read(tuned: Tuned, question: Conversation, text: str) -> Message:
    """An answer without the template's frame, its thought in a field of its own; an unfinished thought has no answer.

    Args:
        tuned: whose answer it is.
        question: the prompt: some prompts open the thought themselves.
        text: the answer, as `answers` gives it.
    """
    found = tuned.template.read_answer(text)
    thought, content = (found.thought, found.content) if found.thought else thoughts.split(found.content)
    if not any(kind.close in text for kind in thoughts.KINDS):
        thought, content = _unclosed(tuned, question, content)
    return Message("assistant", content, thought=thought)


def _unclosed(tuned: Tuned, question: Conversation, text: str) -> tuple[str, str]:
    """(thought, answer) of a text without a closing tag."""
    for kind in thoughts.KINDS:
        if text.lstrip().startswith(kind.open):
            return text.lstrip().removeprefix(kind.open).strip(), ""
        if kind.open in str(getattr(tuned.template, "jinja", "")):
            ids = tuned.encoder.prompt(question.messages, question.tools)
            if thoughts.opened(str(tuned.tokenizer.decode(ids[-32:]))) is not None:
                return text.strip(), ""
    return "", text


def expected(tuned: Tuned, row: Conversation) -> Message:
    """The answer that a row ends in, read as the model's own would be: what is trained, without its frame."""
    last = max((turn for turn, message in enumerate(row.messages) if message.role == "assistant"), default=None)
    answer = Message("assistant", "") if last is None else row.messages[last]
    if last is None or SPAN in answer.content:  # several answers, each behind a frame of its own
        return answer
    segments = tuned.template.render(row.messages[: last + 1], row.tools)
    own = [
        tuned.encoder.without_special(s.text) if s.literal else s.text
        for s in segments
        if s.trained and s.turn == last and s.role != "stop"
    ]
    question = replace(row, messages=row.messages[:last])
    return replace(read(tuned, question, tuned.template.answer_text("".join(own))), tool_calls=answer.tool_calls)


def _text(tuned: Tuned, ids: list[int]) -> str:
    """The new tokens up to the first stop token, as text."""
    end = next((n for n, i in enumerate(ids) if i in tuned.encoder.stop_ids), len(ids))
    return tuned.template.answer_text(tuned.encoder.text(ids[:end]))
