"""Conversations to segments of text: the one place where a prompt gets its shape.

In: messages. Out: a list of Segments, each either a piece of the template or a piece of the user's text, each with the
decision whether it is trained. Training and chat call the same `render`: a conversation that ends in an answer is a
training row, one that does not is a prompt for the model to go on from.

Two kinds: PieceTemplate, a row of the table below, and ChatTemplate, the tokenizer's own Jinja template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from fitune.errors import ConfigError, ModelError, did_you_mean
from fitune.records import Message, Segment


class Template(Protocol):
    """What the rest of fitune needs of a template."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def stop(self) -> str | None:
        """The text of the token that ends an answer; None: the tokenizer's EOS."""
        ...

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """Messages to segments; the stop token of a trained answer is a segment of its own, marked by role "stop"."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """For the run folder; `from_dict` reads it back."""
        ...


@dataclass(frozen=True)
class PieceTemplate:
    """A template made of pieces; `{content}` and `{context}` stand for the user's text.

    `user_with_context` is used where a message brings a context (alpaca's input); templates without it put the context
    on a new line below the content. `first_user` replaces `user` for the first turn, where a frame belongs to it.
    """

    name: str
    user: str
    user_with_context: str | None = None
    next_user: str | None = None
    system: str = "{content}\n\n"
    default_system: str | None = None
    tool: str | None = None
    stop: str | None = None
    after_stop: str = ""

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """See Template."""
        segments = [Segment(role="bos")]
        system = [m for m in messages if m.role == "system"]
        if system:
            segments += _fill(self.system, system[0], turn=0)
        elif self.default_system is not None:
            segments += [Segment(self.default_system)]
        users = 0
        for turn, message in enumerate(messages):
            if message.role == "user":
                segments += _fill(self._user_piece(message, users), message, turn)
                users += 1
            elif message.role == "tool":
                if self.tool is None:
                    raise ConfigError(f"template {self.name!r} has no place for tool results")
                segments += _fill(self.tool, message, turn)
            elif message.role == "assistant":
                segments.append(Segment(message.content, literal=False, trained=True, turn=turn, role="assistant"))
                segments.append(Segment(trained=True, turn=turn, role="stop"))
                if self.after_stop and turn + 1 < len(messages):
                    segments.append(Segment(self.after_stop, turn=turn))
        return segments

    def _user_piece(self, message: Message, users_before: int) -> str:
        if users_before and self.next_user is not None:
            return self.next_user
        if message.context and self.user_with_context is not None:
            return self.user_with_context
        return self.user

    def as_dict(self) -> dict[str, Any]:
        """See Template."""
        return {"kind": "pieces", **asdict(self)}


def _fill(piece: str, message: Message, turn: int) -> list[Segment]:
    """The piece with the message's text in its slots, text and template in segments of their own."""
    content = message.content
    if message.context and "{context}" not in piece:
        content = f"{content}\n{message.context}" if content else message.context
    segments = []
    rest = piece
    while rest:
        slots = [(rest.find(slot), slot) for slot in ("{content}", "{context}") if slot in rest]
        if not slots:
            segments.append(Segment(rest, turn=turn, role=message.role))
            break
        at, slot = min(slots)
        if at:
            segments.append(Segment(rest[:at], turn=turn, role=message.role))
        text = content if slot == "{content}" else message.context
        segments.append(Segment(text, literal=False, turn=turn, role=message.role))
        rest = rest[at + len(slot) :]
    return [segment for segment in segments if segment.text]


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)

# Format facts: each string is exactly what the models of that name were trained with.
TABLE: dict[str, PieceTemplate] = {
    template.name: template
    for template in (
        # Stanford Alpaca (2023)
        PieceTemplate(
            "alpaca",
            user=_ALPACA + "### Instruction:\n{content}\n\n### Response:\n",
            user_with_context=_ALPACA_CONTEXT
            + "### Instruction:\n{content}\n\n### Input:\n{context}\n\n### Response:\n",
            next_user="\n\n### Instruction:\n{content}\n\n### Response:\n",
        ),
        # OpenAI's chat markup, as Qwen and many others use it
        PieceTemplate(
            "chatml",
            system="<|im_start|>system\n{content}<|im_end|>\n",
            user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
            tool="<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",
            stop="<|im_end|>",
            after_stop="\n",
        ),
        # nothing but the text: for base models and completion data
        PieceTemplate("plain", system="{content}\n", user="{content}"),
    )
}


MARK = "\ue000fitune\ue001"  # private-use characters: no user's text has them


class ChatTemplate:
    """The tokenizer's own Jinja template, split into segments by rendering it turn by turn.

    The text that a turn adds is the difference of two renderings. Where a rendering does not begin with the one before
    it (a template that rewrites earlier turns), the turns cannot be told apart, and the template is refused.
    """

    def __init__(self, jinja: str, tokenizer: Any, stop: str | None) -> None:
        self.name, self.jinja, self.tokenizer, self.stop = "chat_template", jinja, tokenizer, stop

    def _text(self, messages: Sequence[Message], *, generate: bool) -> str:
        turns = [{"role": m.role, "content": _joined(m)} for m in messages]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.jinja, tokenize=False, add_generation_prompt=generate
        )
        return str(text)

    def render(self, messages: Sequence[Message]) -> list[Segment]:
        """See Template."""
        segments: list[Segment] = []
        done = ""
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                whole = self._text(messages[: turn + 1], generate=False)
                segments += self._answer(_difference(whole, done, turn), message, turn, last=turn + 1 == len(messages))
            else:
                answers_next = turn + 1 == len(messages) or messages[turn + 1].role == "assistant"
                if not answers_next:
                    continue  # rendered with the turn after it: some templates refuse a lone system message
                whole = self._text(messages[: turn + 1], generate=True)
                segments += self._split(_difference(whole, done, turn), messages[: turn + 1], done)
            done = whole
        return segments

    def _split(self, text: str, messages: Sequence[Message], done: str) -> list[Segment]:
        """The text that the last message adds, with the user's own words in a segment of their own.

        Where the words begin is found by rendering a mark in their place: words such as `a` stand in the template too.
        """
        message, turn = messages[-1], len(messages) - 1
        marked = self._text([*messages[:-1], replace(message, content=MARK, context="")], generate=True)
        before, _, after = marked.removeprefix(done).partition(MARK)
        for words in (_joined(message), _joined(message).strip()):
            if before + words + after == text:
                pieces = ((before, True), (words, False), (after, True))
                return [Segment(piece, literal, turn=turn, role=message.role) for piece, literal in pieces if piece]
        return [Segment(text, turn=turn, role=message.role)]

    def _answer(self, text: str, message: Message, turn: int, *, last: bool) -> list[Segment]:
        """An answer's text as [content, stop token, what the template puts behind it]."""
        stop = self.stop or self.tokenizer.eos_token
        content, found, after = text.rpartition(stop) if stop else (text, "", "")
        if not found:
            raise ModelError(
                "the chat template does not end an answer with a stop token: a model trained so would never stop",
                received=repr(text[-40:]),
                expected=f"{stop!r} after the answer",
                fix="choose a template by name: --template chatml",
            )
        segments = [Segment(content, literal=False, trained=True, turn=turn, role="assistant")]
        if content.strip() != message.content.strip():
            # the template adds marks of its own (an empty thinking block): they are template, and trained
            before, words, after_words = content.partition(message.content.strip())
            pieces = ((before, True), (words, False), (after_words, True))
            segments = [Segment(p, literal, trained=True, turn=turn, role="assistant") for p, literal in pieces if p]
        segments.append(Segment(trained=True, turn=turn, role="stop"))
        if after and not last:
            segments.append(Segment(after, turn=turn))
        return segments

    def as_dict(self) -> dict[str, Any]:
        """See Template."""
        return {"kind": "chat_template", "jinja": self.jinja, "stop": self.stop}


def _joined(message: Message) -> str:
    return f"{message.content}\n{message.context}" if message.context else message.content


def _difference(whole: str, done: str, turn: int) -> str:
    if not whole.startswith(done):
        raise ModelError(
            f"the chat template rewrites earlier turns (seen at turn {turn + 1}), so training and chat would differ",
            fix="choose a template by name: --template chatml",
        )
    return whole[len(done) :]


def choose(name: str, tokenizer: Any) -> Template:
    """The template that a name means for a tokenizer: `auto` is the tokenizer's own, else alpaca.

    Raises:
        ConfigError: the name is unknown.
    """
    if name in ("auto", "chat_template"):
        if tokenizer.chat_template:
            return ChatTemplate(tokenizer.chat_template, tokenizer, stop=_chat_stop(tokenizer))
        if name == "chat_template":
            raise ConfigError("template 'chat_template': this tokenizer has none", fix="name one: --template alpaca")
        return TABLE["alpaca"]
    if name not in TABLE:
        raise ConfigError(f"unknown template {name!r}", fix=did_you_mean(name, ["auto", "chat_template", *TABLE]))
    return TABLE[name]


def _chat_stop(tokenizer: Any) -> str | None:
    """The special token that the chat template puts behind an answer: often not the tokenizer's EOS."""
    marker = "fitune"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    after = text.rpartition(marker)[2]
    found = [token for token in tokenizer.get_added_vocab() if token and token in after]
    return min(found, key=lambda token: (after.index(token), -len(token)), default=None)


def from_dict(values: dict[str, Any], tokenizer: Any) -> Template:
    """The template that a run folder stores."""
    values = dict(values)
    if values.pop("kind") == "chat_template":
        return ChatTemplate(values["jinja"], tokenizer, values["stop"])
    return PieceTemplate(**values)
