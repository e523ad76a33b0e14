"""The prompts of ChatGLM: rounds in versions 1 and 2, roles that are single ids in version 3.

In: messages. Out: segments. The original code encodes a prompt with all its rounds as one text, so these segments are
`joined`. Earlier answers are part of that text: each answer of a conversation is a sample of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from fitune.core.records import SPAN, Message, Segment, ToolCall
from fitune.data.templates.base import (
    Rendered,
    Tools,
    arguments,
    as_json,
    function_of,
    joined,
    refuse_later_system,
    refuse_tools,
)

# what ChatGLM3's own examples say above a list of tools
TOOL_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"


@dataclass(frozen=True)
class RoundTemplate:
    """[Round n] 问 答, of ChatGLM-6B and ChatGLM2-6B.

    A round is a question and an answer. What a conversation lacks of one is empty in it, as in the original code: the
    answer of a question that another one follows, the question of an answer that nobody asked for.

    Args:
        name: what it is called.
        first_round: the number of the first round.
        gap: what stands between the lines of a round.
        before, after: special tokens around the prompt, by name.
        bare_first: a first question stands without [Round n].
        fills: a prompt may have gaps, [MASK]; each is filled in by an answer behind its own <sop>.
    """

    name: str
    first_round: int
    gap: str
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    bare_first: bool = False
    stop: str | None = None
    fills: bool = False

    @property
    def other_stops(self) -> tuple[str, ...]:
        """See Template."""
        return ()

    def one_answer_per_sample(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """See Template."""
        return any(message.role == "assistant" for message in messages[:-1])

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template. Only the last answer is trained."""
        answer = messages[-1] if messages and messages[-1].role == "assistant" else None
        return self._segments(messages[:-1] if answer else messages, answer, tools)

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        return self._segments(messages, None, tools)

    def read_answer(self, text: str) -> Message:
        """See Template."""
        return Message("assistant", text)

    def _segments(self, prompt: Sequence[Message], answer: Message | None, tools: Tools) -> list[Segment]:
        refuse_tools(self.name, [*prompt, answer] if answer else prompt, tools)
        refuse_later_system(self.name, prompt)
        last = len(prompt)
        gaps = self.gaps(prompt)
        if gaps and (answer is None or len(joined(answer).split(SPAN)) == gaps):
            return self._filled(prompt, answer, last)
        segments = [Segment(token=token) for token in self.before]
        segments += self._prompt(prompt)
        segments += [Segment(token=token) for token in self.after]
        if answer:
            segments.append(Segment(joined(answer), literal=False, trained=True, turn=last, role="assistant"))
            segments.append(Segment(trained=True, turn=last, role="stop"))
        return segments

    def gaps(self, messages: Sequence[Message]) -> int:
        """How many gaps the prompt that ends these messages has."""
        asked = next((m for m in reversed(messages) if m.role == "user"), None)
        return joined(asked).count(SPAN) if self.fills and asked is not None else 0

    def _filled(self, prompt: Sequence[Message], answer: Message | None, last: int) -> list[Segment]:
        """What came before, the prompt with its gaps, and behind a <sop> each what fills them in."""
        segments, turn = self._prompt(prompt[:-1], asks=False), len(prompt) - 1
        for number, text in enumerate(joined(prompt[-1]).split(SPAN)):
            segments += [Segment(token=SPAN, turn=turn)] if number else []
            segments += [Segment(text, literal=False, turn=turn, role="user")] if text else []
        start = Segment(token=self.after[-1])
        for text in joined(answer).split(SPAN) if answer else []:
            filled = Segment(text, literal=False, trained=True, turn=last, role="assistant")
            segments += [start, filled, Segment(trained=True, turn=last, role="stop")]
        return segments if answer else [*segments, start]

    def _prompt(self, messages: Sequence[Message], *, asks: bool = True) -> list[Segment]:
        """All rounds, as one text. asks: it ends where an answer is to begin."""
        rounds, parts, opened = self.first_round, list[Segment](), False
        bare = self.bare_first and [m.role for m in messages if m.role != "system"] in ([], ["user"])
        for turn, message in enumerate(messages):
            text = Segment(joined(message), literal=False, turn=turn, role=message.role)
            if message.role == "system":  # the originals have no place for it: it stands above the rounds
                parts += [text, Segment(self.gap)]
            elif message.role == "assistant":
                parts += [] if opened else self._round(rounds, [], turn)
                parts += [text, Segment(self.gap)]
                rounds, opened = rounds + (not opened), False
            else:
                parts += [Segment(self.gap)] if opened else []
                parts += [text] if bare else self._round(rounds, [text], turn)
                rounds, opened = rounds + 1, True
        return _as_one_text(parts if opened or bare or not asks else [*parts, *self._round(rounds, [], -1)])

    def _round(self, number: int, question: Sequence[Segment], turn: int) -> list[Segment]:
        """A round up to its answer."""
        head, tail = f"[Round {number}]{self.gap}问：", f"{self.gap}答："
        return [Segment(head, turn=turn), *question, Segment(tail, turn=turn)]

    def answer_text(self, text: str) -> str:
        """See Template."""
        return text

    def as_dict(self) -> dict[str, object]:
        """See Template."""
        return {"kind": "rounds", **asdict(self)}


@dataclass(frozen=True)
class RoleTemplate(Rendered):
    """ChatGLM3: a role is one id, then a line with what it is about (the name of a tool), then the text.

    The model itself writes that line after <|assistant|>, so it is trained. The next role's id ends an answer.
    """

    name: str = "chatglm3"
    stop: str | None = None

    @property
    def other_stops(self) -> tuple[str, ...]:
        """See Template."""
        return ("<|user|>", "<|observation|>")

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        segments = self._segments(messages, tools)
        if messages and messages[-1].role == "assistant":
            segments.pop()  # not what would end it: the next answer's role does
        return [*segments, Segment(token="<|assistant|>")]  # noqa: S106  # no password

    def read_answer(self, text: str) -> Message:
        """See Template."""
        return Message("assistant", self.answer_text(text))

    def _segments(self, messages: Sequence[Message], tools: Tools) -> list[Segment]:
        if tools and not (messages and messages[0].role == "system"):
            messages = [Message("system", TOOL_SYSTEM), *messages]
            return [replace(s, turn=max(-1, s.turn - 1)) for s in self._segments(messages, tools)]
        segments = [Segment(token="[gMASK]"), Segment(token="sop")]  # noqa: S106  # no password
        for turn, message in enumerate(messages):
            after = messages[turn + 1] if turn + 1 < len(messages) else None
            if message.role == "assistant":
                segments += self._answer(message, turn, after)[_ended_by_role(messages, turn) :]
                continue
            if not _ended_by_role(messages, turn):
                segments.append(Segment(token=_role(message), turn=turn))
            segments.append(Segment("\n", turn=turn))
            text = Segment(joined(message), literal=False, turn=turn, role=message.role)
            listed = tools if message.role == "system" and not turn else ()
            segments += _as_one_text([text, *_tools(listed, turn)])
        return segments

    def _answer(self, message: Message, turn: int, after: Message | None) -> list[Segment]:
        """<|assistant|>, then for each call and for the text a line and what belongs to it, then what ends it."""
        parts = [(f"{call.name}\n", _call(call)) for call in message.tool_calls] or [("\n", joined(message))]
        if message.tool_calls and message.content:
            parts.insert(0, ("\n", message.content))  # what it says before it calls
        segments: list[Segment] = []
        for line, text in parts:
            segments.append(Segment(token="<|assistant|>", turn=turn, trained=bool(segments)))  # noqa: S106
            segments.append(Segment(line, trained=True, turn=turn, role="assistant"))
            segments.append(Segment(text, literal=False, trained=True, turn=turn, role="assistant"))
        if after is not None and after.role in ("assistant", "system"):  # a header, at which no server stops
            return [*segments, Segment(token=_role(after), turn=turn)]
        stop = _role(after) if after else ("<|observation|>" if message.tool_calls else None)
        return [*segments, Segment(token=stop, trained=True, turn=turn, role="stop")]

    def answer_text(self, text: str) -> str:
        """See Template."""
        return text.removeprefix("\n").removeprefix(" ")

    def as_dict(self) -> dict[str, object]:
        """See Template."""
        return {"kind": "roles", **asdict(self)}


def _role(message: Message) -> str:
    return {"tool": "<|observation|>"}.get(message.role, f"<|{message.role}|>")


def _ended_by_role(messages: Sequence[Message], turn: int) -> bool:
    """Did the answer before this turn end in this turn's own role id?"""
    return turn > 0 and messages[turn - 1].role == "assistant"


def _tools(tools: Tools, turn: int) -> list[Segment]:
    """The list of tools below the system's text."""
    if not tools:
        return []
    listed = as_json([dict(function_of(tool)) for tool in tools], indent=4)
    return [Segment(f"\n{listed}", literal=False, turn=turn, role="system")]


def _call(call: ToolCall) -> str:
    """A call as the Python that ChatGLM3 writes."""
    values = ", ".join(f"{name}={value!r}" for name, value in arguments(call).items())
    return f"```python\ntool_call({values})\n```"


def _as_one_text(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, each joined to the one before it."""
    kept = [segment for segment in segments if segment.text]
    return [Segment(s.text, s.literal, s.trained, s.turn, s.role, joined=n > 0) for n, s in enumerate(kept)]


ROWS: tuple[RoundTemplate | RoleTemplate, ...] = (
    # the prompt attends both ways, and [gMASK] <sop> ends it; the model's EOS is <eop>
    RoundTemplate("chatglm", first_round=0, gap="\n", after=("[gMASK]", "<sop>"), bare_first=True, fills=True),
    RoundTemplate("chatglm2", first_round=1, gap="\n\n", before=("[gMASK]", "sop")),
    RoleTemplate(),
)
