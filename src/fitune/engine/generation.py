"""Prompts to answers, with the template and the stop tokens of training.

In: messages. Out: the text of the answer, streamed if wanted. transformers generates; the prompt comes from the same
encoder that made the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, TextStreamer

from fitune.core.errors import ModelError
from fitune.core.records import SPAN, Conversation, Message
from fitune.data.encode import Encoder
from fitune.data.templates import ChatTemplate, thoughts
from fitune.models.adapters import disabled
from fitune.models.configs import longest_row
from fitune.models.interfaces import causal_lm
from fitune.models.load import Tuned
from fitune.models.methods import virtual
from fitune.models.switches import SDPA, attention, computing, evaluating

SIDE_BY_SIDE = 16  # prompts that are answered together


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None


@dataclass(frozen=True)
class _Reader:
    """The part of a tokenizer that a streamer needs, with the encoder's own way to read ids."""

    encoder: Encoder

    def decode(self, ids: list[int], **_: object) -> str:
        """Text of ids."""
        return self.encoder.text(ids)


class _Streamer(TextStreamer):
    """Hands each finished piece of text to a function; waits for the rest of a character that is not whole."""

    def __init__(self, encoder: Encoder, on_text: Callable[[str], None]) -> None:
        super().__init__(_Reader(encoder), skip_prompt=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


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
) -> str:
    """The model's answer to a conversation.

    Args:
        tuned: the model.
        messages: ends with a user's turn.
        sampling: how to draw.
        on_text: called with each new piece of the answer.
        base: answer as the base model, without what was tuned.
    """
    return answers(tuned, [Conversation(tuple(messages))], sampling, on_text=on_text, base=base)[0]


@torch.no_grad()
def reply(
    tuned: Tuned,
    messages: Sequence[Message],
    sampling: Sampling | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    base: bool = False,
) -> tuple[str, Message]:
    """The model's answer as `answer` gives it, and as the turn that the conversation goes on from.

    That turn has no frame, and its thought in a field of its own: the template decides what of it is in later prompts.

    Args:
        tuned, messages, sampling, on_text, base: see `answer`.
    """
    if not isinstance(tuned.template, ChatTemplate):
        text = answer(tuned, messages, sampling, on_text=on_text, base=base)
        return text, Message("assistant", text)
    before = virtual.of(tuned.model) if not base else None
    prompts = [tuned.encoder.prompt(messages)]
    count = before.count if before else 0
    row = _generate(tuned, prompts, sampling or Sampling(), on_text=on_text, base=base, virtual_tokens=count)[0]
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
) -> list[str]:
    """The answers to several conversations, padded on the left and generated side by side.

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
    before = virtual.of(tuned.model) if not base else None
    if before is not None and len(questions) > 1:
        # side by side, padding would stand between the virtual tokens and the prompt, as it never does in training
        return [answers(tuned, [one], sampling, on_text=on_text)[0] for one in questions]
    prompts = [tuned.encoder.prompt(question.messages, question.tools) for question in questions]
    made = _generate(tuned, prompts, sampling, on_text=on_text, base=base, virtual_tokens=before.count if before else 0)
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
        row = _generate(tuned, [ids], sampling, on_text=None, base=base, virtual_tokens=0)[0]
        end = next((n for n, i in enumerate(row) if i in tuned.encoder.stop_ids), len(row))
        found.append(_text(tuned, row))
        ids = [*ids, *row[:end], tuned.encoder.stop_id, start]
    return SPAN.join(found)


def _generate(
    tuned: Tuned,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    on_text: Callable[[str], None] | None,
    base: bool,
    virtual_tokens: int,
) -> list[list[int]]:
    """The new ids behind each prompt.

    Raises:
        ModelError: a prompt that is longer than the model can hold.
    """
    width = max(len(prompt) for prompt in prompts)
    limit = longest_row(causal_lm(tuned.model).config, virtual_tokens)
    if width >= limit:
        raise ModelError(
            "the prompt is longer than the model can hold",
            received=f"{width} tokens",
            expected=f"fewer than {limit}",
            fix="shorten it; in a chat, /reset starts a new conversation",
        )
    stops = tuned.encoder.stop_ids
    # The mask says what is padding, never the id, so any id will do.
    ids = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts], device=tuned.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=tuned.device)
    generation = GenerationConfig(
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        top_p=sampling.top_p if sampling.temperature > 0 else None,
        top_k=0 if sampling.temperature > 0 else None,
        max_new_tokens=min(sampling.max_new_tokens, limit - width),
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    model = tuned.model
    with evaluating(model), attention(model, SDPA), base_model(tuned, base=base), computing(model):
        out = tuned.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=generation,
            streamer=_Streamer(tuned.encoder, on_text) if on_text else None,
        )
    return [row[width:].tolist() for row in out]


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
