"""One conversation in a Jinja template, rendered turn by turn: what stands before each answer, and the answer.

In: messages, a Renderer. Out: segments. Nothing but what stands behind a prompt is ever trained, and the prompt is the
template's own: with its header, and with the system text that it brings along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from fitune.core.errors import ConfigError, DataError, ModelError, shorten
from fitune.core.records import Message, Segment, ToolCall
from fitune.data.templates import thoughts
from fitune.data.templates.base import Tools, arguments, as_json, joined, no_place_for_tools
from fitune.data.templates.marks import CLOSE, moved, start, turns, unmarked
from fitune.data.templates.rendering import ANSWER, ASKED, CALL, RESULT, SAID, USER, VALUE, Marking, Renderer

_TAG = re.compile(r"<[^<>\n]*>|\[[^\[\]\n]*\]")  # what a border between prompt and answer must not cut
MARKINGS: tuple[Literal["whole", "inner"], ...] = ("whole", "inner")


class Ends:
    """What ends an answer, and what ends one that calls."""

    def __init__(self, renderer: Renderer, stop: str | None) -> None:
        self.renderer, self.stop = renderer, stop

    @cached_property
    def appended(self) -> bool:
        """The template ends an answer with nothing; the token that begins the next turn is its end (GLM)."""
        found = self.renderer.tried([USER, ANSWER])
        if found is None or self.stop is None or self.stop in found.rpartition(SAID)[2]:
            return False
        return next_turn(self.renderer, found) is not None

    @cached_property
    def unwritten(self) -> bool:
        """The template ends an answer with nothing, and the next turn begins with no token: an answer ends in the EOS,
        which stands in no prompt behind it (MiniCPM-2B)."""
        return not self.appended and answered(self.renderer).endswith(SAID)

    @cached_property
    def repeated(self) -> str:
        """What the template puts behind every last answer's stop, where that ends in the stop again (Command-R+)."""
        text = answered(self.renderer).rpartition(SAID)[2]
        after = text.partition(self.stop)[2] if self.stop else ""
        return after if self.stop and self.stop in after else ""

    @cached_property
    def call_stop(self) -> str | None:
        """The token that ends an answer that calls."""
        if not self.renderer.takes_calls:
            return self.stop
        manner = self.renderer.manner
        text = self.renderer.tried([USER, CALL], manner, tools=True) or ""
        if self.appended:
            more = self.renderer.tried([USER, CALL, RESULT], manner, tools=True) or ""
            return _first_behind(self.renderer, text, more) or self.stop
        if self.stop and self.stop in text.rpartition(VALUE)[2]:  # behind the call, not behind the question
            return self.stop
        ended = self.renderer.marks.last_special(text)
        return ended[1] if ended else self.stop


class Dialogue:
    """One conversation and its renderings, each made once.

    Args:
        messages: the conversation.
        tools: that it may call.
        renderer: renders it.
        ends: what ends its answers.
    """

    def __init__(self, messages: Sequence[Message], tools: Tools, renderer: Renderer, ends: Ends) -> None:
        self.messages, self.tools, self.renderer, self.ends = messages, tools, renderer, ends
        self._prompts: dict[int, str] = {}
        self._wholes: dict[int, str] = {}
        _refuse(renderer, messages, tools)

    @cached_property
    def marked(self) -> Marking:
        """The marks that leave the rendering as it is; where none do, users' texts are searched for."""
        messages = self.messages or (ANSWER,)
        asks = messages[-1].role != "assistant"
        plain = self.renderer.text(messages, self.tools, generate=asks)
        for marked in MARKINGS:
            if unmarked(self.renderer.text(messages, self.tools, generate=asks, marked=marked)) == plain:
                return marked
        return "broken"

    def _text(self, messages: Sequence[Message], *, generate: bool) -> str:
        text = self.renderer.text(messages, self.tools, generate=generate, marked=self.marked)
        return self._located(text, messages) if self.marked == "broken" else text

    def _located(self, text: str, messages: Sequence[Message]) -> str:
        """A rendering with marks around those texts that can be found in it."""
        at = 0
        for turn, message in enumerate(messages):
            own = self.renderer.marks.broken(joined(message).strip())
            found = text.find(own, at) if own else -1
            if found >= 0:
                mark = self.renderer.marks.wrapped(joined(message).strip(), turn)
                text, at = text[:found] + mark + text[found + len(own) :], found + len(mark)
        return text

    def whole(self, turn: int) -> str:
        """The rendering up to and with an answer."""
        if turn not in self._wholes:
            self._wholes[turn] = self._text(self.messages[: turn + 1], generate=False)
        return self._wholes[turn]

    def prompt(self, turn: int) -> str:
        """The rendering before an answer, with its header."""
        if turn not in self._prompts:
            before = self.messages[:turn]
            asked = bool(before) and before[-1].role not in ("assistant", "system")
            text = None if asked else self._unasked(before)
            self._prompts[turn] = self._text(before, generate=True) if text is None else text
        return self._prompts[turn]

    def _unasked(self, before: Sequence[Message]) -> str | None:
        """The prompt of an answer that nobody asked for: a greeting, a second answer in a row.

        What stands before such an answer is seen in a rendering with one; its header is that of any answer.
        """
        if before and before[-1].role == "system" and self._text(before, generate=True).endswith(self._header):
            return None
        if before and not self._header:
            return None
        text = self._text([*before, ANSWER], generate=False)
        at = start(text, len(before))
        if at is None or not self._header:
            return None if at is None else text[:at].rstrip()
        found = self._headed(text[:at])
        return None if found is None else text[: found[0]] + self._header

    def _headed(self, text: str, begin: int | None = None) -> tuple[int, int] | None:
        """Where the header stands that comes last in what is before an answer, or first from `begin` on: both its ends.

        An opened thought or an empty one, and words that begin the answer, stand in the header and perhaps not before
        an answer that was given; a header before another message's text is not this one's.
        """
        last = text.rfind(CLOSE) + 1
        header = self._header
        thought = min((header.index(kind.open) for kind in thoughts.KINDS if kind.open in header), default=0)
        line = header[: header.find("\n") + 1]
        for written in filter(None, (header, header[:thought], line if _TAG.search(line) else "")):
            found = text.rfind(written, last) if begin is None else text.find(written, begin)
            if found >= 0:
                return found, found + len(written)
        return None

    @cached_property
    def _header(self) -> str:
        """What the template writes before an answer that is to come."""
        try:
            plain = self.renderer.text([USER], self.tools)
            asked = self.renderer.text([USER], self.tools, generate=True)
        except ConfigError:
            return ""
        if plain == asked:  # the header is always there (Command-R7B)
            header = asked.rpartition(ASKED)[2].partition(self.ends.stop or ASKED)[2]
            return header if _TAG.search(header) else ""
        at = _shared(plain, asked)  # where nothing is to come, some end the conversation with a token
        return asked[at:].lstrip() if ASKED in asked[:at] else ""

    def stable(self, turn: int) -> bool:
        """Does the prompt of this answer hold the earlier answers as they were when they were the last ones?"""
        answers = [n for n, message in enumerate(self.messages[:turn]) if message.role == "assistant"]
        if answers and self.ends.unwritten:
            return False
        nexts = [*answers[1:], turn]
        return all(
            self.prompt(after).startswith(self._kept(answer))
            and self.whole(answer) == self.prompt(answer) + self._behind(answer)
            for answer, after in zip(answers, nexts, strict=True)
        )

    def _kept(self, answer: int) -> str:
        """An answer's rendering up to its stop token: what stands behind it may differ where a turn follows."""
        _, _, after = self._ended(self.whole(answer), answer)
        return self.whole(answer)[: len(self.whole(answer)) - len(after)]

    # ---- segments ----

    def prompt_segments(self, turn: int) -> list[Segment]:
        """What stands before an answer; earlier answers can be trained where they stand as they were made."""
        answers = [n for n, message in enumerate(self.messages[:turn]) if message.role == "assistant"]
        if not answers or not self.stable(turn):
            return self._segments(self.prompt(turn), max(0, turn - 1))
        segments = self._segments(self.prompt(answers[0]), max(0, answers[0] - 1))
        for answer, after in zip(answers, [*answers[1:], turn], strict=True):
            text, stop, _ = self._ended(self.whole(answer)[len(self.prompt(answer)) :], answer)
            rest = self.prompt(after)[len(self._kept(answer)) :]
            answered = self._answer(text, answer, stop)
            if stop is None and self.ends.appended:  # the token of the turn that follows, where a server stops at it
                stop = self.renderer.marks.first_special(rest)
                stop = stop if stop in (self.ends.stop, self.ends.call_stop) else None
                rest = rest.lstrip().removeprefix(stop) if stop else rest
                answered = self._answer(text, answer, stop) if stop else answered[:-1]
            segments += answered
            segments += self._segments(rest, max(answer, after - 1))
        return segments

    def answer_segments(self, turn: int) -> list[Segment]:
        """An answer behind its prompt, and its stop token."""
        text, stop, _ = self._ended(self._behind(turn), turn)
        if stop is None:
            stop = self.ends.call_stop if self.messages[turn].tool_calls else self.ends.stop
        return self._answer(text, turn, stop)

    def _segments(self, text: str, turn: int, *, trained: bool = False) -> list[Segment]:
        def role(turn: int) -> str:
            return self.messages[turn].role if 0 <= turn < len(self.messages) else ""

        return self.renderer.marks.segments(text, trained=trained, turn=turn, role=role)

    def _answer(self, text: str, turn: int, stop: str | None) -> list[Segment]:
        token = None if stop in (None, self.ends.stop) else stop
        ending = Segment(trained=True, turn=turn, role="stop", token=token)
        return [*self._segments(text, turn, trained=True), ending]

    def _behind(self, turn: int) -> str:
        """An answer as text, behind its prompt."""
        prompt, whole, message = self.prompt(turn), self.whole(turn), self.messages[turn]
        thought, answer = message.thought, message.content
        if not thought:
            thought, answer = thoughts.written_apart(answer, opened=thoughts.opened(prompt) is not None)
        if thought and thoughts.closed(prompt):
            raise DataError(
                "the template closes the thought before the answer begins, and the row has one",
                received=shorten(thought),
                expected="an answer without a thought",
                fix="set in template_options what opens the thought, or leave such rows out",
            )
        text = whole[len(prompt) :] if whole.startswith(prompt) else self._other_header(prompt, whole, turn)
        if start(text, turn) == 0 and not whole.startswith(prompt):  # blanks before it may be the answer's own
            own = answer[: len(answer) - len(answer.lstrip())]
            text = own + text if whole[: start(whole, turn)].endswith(own) else text
        if thought and self.renderer.thought_place is None and not thoughts.written_in(text, thought, answer):
            raise DataError(
                "the template has no place for a thought, and the vocabulary has no tags for one",
                received=shorten(thought),
                expected="a template that reads reasoning_content, or names <think>",
                fix="--template chatml with the thought in the content, or leave the thoughts out of the data",
            )
        mark = self.renderer.marks.wrapped(thought, turn)
        header = self._own_header(text, turn)
        text = header + thoughts.behind(
            prompt + header, text.removeprefix(header), mark, answer, self.renderer.thought_style
        )
        self._check_answer(text, turn, thought, answer)
        return text

    def _own_header(self, text: str, turn: int) -> str:
        """The header of an answer that brings its own, because the template writes none for one that is to come."""
        header = "" if self._header else text[: start(text, turn) or 0]
        return header if _TAG.search(header) and thoughts.tags_in(header) is None else ""

    def _other_header(self, prompt: str, whole: str, turn: int) -> str:
        """The answer in a rendering that does not begin with its prompt: what stands behind what both have."""
        shared = _shared(prompt, whole)
        rest = whole[shared:]
        if self._header and self._header in prompt[shared:] and not turns(prompt[shared:]):
            # what ends the turn before is another in the two: each has its own header, or the answer has none
            at, near = start(whole, turn), max(0, shared - len(self._header))
            found = self._headed(whole[:at]) if at is not None else self._headed(whole, near)
            if found and found[0] >= near:
                return whole[found[1] :]
            return self._alone(turn) if at is None else whole[at:]
        if turns(prompt[shared:]) or turns(rest) - {turn}:  # the difference reaches into the prompt's texts
            return self._alone(turn)
        if not prompt[shared:]:
            return rest
        rest = rest.lstrip()
        found = self._headed(rest, 0)  # a header that the prompt has not: R1's calls behind results
        return rest[found[1] :] if found and found[0] == 0 else rest

    def _alone(self, turn: int) -> str:
        """An answer as it stands behind a question, where it cannot be separated from the rest in its own place."""
        alone = Dialogue((USER, self.messages[turn]), self.tools, self.renderer, self.ends)
        prompt, whole = alone.prompt(1), alone.whole(1)
        at = len(prompt) if whole.startswith(prompt) else start(whole, 1)
        if at is None and (found := alone._headed(whole)):
            at = found[1]
        if at is None:
            raise ModelError(
                "the chat template writes a conversation otherwise once it is answered, and the answer cannot be "
                "separated from the rest",
                received=shorten(unmarked(whole)),
                fix="choose a template by name: --template chatml",
            )
        return moved(whole[at:], 1, turn)

    def _ended(self, text: str, turn: int) -> tuple[str, str | None, str]:
        """(answer, its stop token, what the template puts behind it); None where the template ends it with nothing."""
        usual = self.ends.call_stop if self.messages[turn].tool_calls else self.ends.stop
        kept = text.removesuffix(self.ends.repeated)
        more = text[len(kept) :]
        for stop in dict.fromkeys((usual, self.ends.stop)):
            before, found, after = kept.rpartition(stop) if stop else (kept, "", "")
            if found and not turns(after):
                return before, stop, after + more
        if (self.ends.appended or self.ends.unwritten or more) and usual is not None:
            return kept, None, more
        raise ModelError(
            "the chat template does not end an answer with a stop token: a model trained so would never stop",
            received=repr(unmarked(text)[-40:]),
            expected=f"{usual!r} after the answer",
            fix="choose a template by name: --template chatml",
        )

    def check(self, last: int) -> None:
        """Refuse a conversation of which the template leaves something out."""
        there = turns(self.prompt(last))
        for turn, message in enumerate(self.messages[:last]):
            if (
                self.marked != "broken"
                and message.role != "assistant"
                and joined(message).strip()
                and turn not in there
            ):
                raise _left_out(f"turn {turn + 1}, of the role {message.role}", joined(message))

    def _check_answer(self, text: str, turn: int, thought: str, answer: str) -> None:
        """Refuse an answer of which the template leaves something out, or a call of it."""
        plain, calls = unmarked(text), self.messages[turn].tool_calls
        for call in calls:
            if plain.count(call.name) < sum(call.name == one.name for one in calls) or not _holds(plain, call):
                raise _left_out(f"a call in turn {turn + 1}", f"{call.name} {call.arguments}")
        if self.marked == "broken" or not answer.strip():
            return
        rest = thoughts.peeled(plain, thought)[1]
        found = thoughts.squeezed(answer) in thoughts.squeezed(rest)
        if not found and calls:
            raise _left_out(f"the text beside a call in turn {turn + 1}", answer)
        kind = thoughts.tags_in(answer)
        if kind is not None and answer.strip() not in rest:
            raise DataError(
                f"the chat template takes {kind.close!r} in the answer in turn {turn + 1} for the end of a thought",
                received=shorten(answer),
                expected=f"a thought between {kind.open!r} and {kind.close!r}, and an answer without these tags",
                fix="write the thought into reasoning_content, or leave such rows out with --skip-bad",
            )
        if not found:
            raise _left_out(f"the answer in turn {turn + 1}", answer)


def _holds(text: str, call: ToolCall) -> bool:
    """Do the texts and numbers of a call's arguments stand in a rendering, as they are or as JSON?"""
    left: list[object] = [arguments(call)]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            written = {str(value), as_json(value).strip('"'), json.dumps(value).strip('"')}
            if not any(one in text for one in written):
                return False
    return True


def _left_out(what: str, text: str) -> DataError:
    return DataError(
        f"the chat template leaves out {what}",
        received=shorten(text),
        expected="a template with a place for it",
        fix="leave such rows out, or choose a template by name: --template chatml",
    )


def _shared(one: str, other: str) -> int:
    """How much two renderings have in common, without cutting a tag in two."""
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    for text in (one, other):
        for tag in _TAG.finditer(text, max(0, at - 80)):
            if tag.start() < at < tag.end():
                at = tag.start()
    return at


def answered(renderer: Renderer) -> str:
    """The rendering of a question and its answer; with tools, where the template fails without."""
    messages = [USER, ANSWER]
    return renderer.tried(messages) or renderer.tried(messages, tools=True) or ""


def next_turn(renderer: Renderer, answered: str) -> str | None:
    """The special token that begins the turn behind an answer, given the rendering that ends with it."""
    return _first_behind(renderer, answered, renderer.tried([USER, ANSWER, USER]) or "")


def _first_behind(renderer: Renderer, text: str, more: str) -> str | None:
    return renderer.marks.first_special(more.removeprefix(text)) if text and more.startswith(text) else None


def _refuse(renderer: Renderer, messages: Sequence[Message], tools: Tools) -> None:
    name = "the tokenizer's own"
    if tools and not renderer.takes_tools:
        raise no_place_for_tools(name)
    if any(message.tool_calls for message in messages) and not renderer.takes_calls:
        raise no_place_for_tools(name, "tool calls")
    if any(message.role == "tool" for message in messages) and not renderer.takes_results:
        raise no_place_for_tools(name, "tool results")
