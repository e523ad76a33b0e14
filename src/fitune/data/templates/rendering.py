"""A Jinja chat template, and what it has a place for, found by rendering probes.

In: messages, tools. Out: text, marked (see marks.py) or as a server would render it. Published templates differ in what
they want of a message: arguments of calls as an object or as JSON text, no content beside calls, ids of calls. What a
template wants is tried on a conversation made for it, never guessed from words in its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fitune.core.errors import ConfigError, DataError, RunawayError, shorten
from fitune.core.records import Message, ToolCall
from fitune.data.templates import thoughts
from fitune.data.templates.base import Tools, arguments, in_parts, joined
from fitune.data.templates.counted import Unsure, counted
from fitune.data.templates.marks import Marks, shown
from fitune.data.templates.sandbox import Runaway
from fitune.data.tokenizer import single_id
from fitune.data.tokenizer.interface import Tokenizer

SystemRole = Literal["auto", "keep", "first-user"]
# How users' texts are marked: whole, without the blanks at their ends, not at all but with special tokens in them
# broken, or (None) not at all, as whoever serves the model renders them
Marking = Literal["whole", "inner", "broken"] | None
CALL_ID = re.compile(r"call\d{5}")  # ids of calls, where a template asks for them: the turn and the number in it
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
DATED = "strftime_now"  # the function by which a template asks for today's date


OTHER = "choose a template by name: --template chatml"


@dataclass(frozen=True)
class Manner:
    """How a template wants calls: beside which content, arguments as an object or as text, with ids or without."""

    content: str | None = ""
    as_text: bool = False
    ids: bool = False


MANNERS = tuple(Manner(content, text, ids) for ids in (False, True) for content in ("", None) for text in (False, True))
ASKED, SAID, MUSED, RULED, GAVE = "fituneasked", "fitunesaid", "fitunemused", "fituneruled", "fitunegave"
NAME, KEY, VALUE = "fitunename", "fitunekey", "fitunevalue"
_PROPERTIES = {KEY: {"type": "string", "description": "a probe"}}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "a probe",
        "parameters": {"type": "object", "properties": _PROPERTIES, "required": []},
    },
}
USER, ANSWER, RESULT = Message("user", ASKED), Message("assistant", SAID), Message("tool", GAVE)
CALL = Message("assistant", "", tool_calls=(ToolCall(NAME, f'{{"{KEY}": "{VALUE}"}}'),))


class Renderer:
    """One template.

    Args:
        jinja: its text.
        tokenizer: whose special tokens it may name.
        date: what it gets for today, as YYYY-MM-DD.
        options: further variables that it reads, such as enable_thinking.
        system_role: what becomes of a system text where the template has no place for one.
    """

    def __init__(
        self, jinja: str, tokenizer: Tokenizer, *, date: str, options: Mapping[str, object], system_role: SystemRole
    ) -> None:
        self.jinja, self.tokenizer, self.date = jinja, tokenizer, date
        self.options, self.system_role = dict(options), system_role
        self.marks = Marks(tokenizer)
        self._formats: set[str] = set()
        self._broken: RunawayError | None = None  # it ran away once: it is asked nothing more

    def text(
        self, messages: Sequence[Message], tools: Tools = (), *, generate: bool = False, marked: Marking = None
    ) -> str:
        """The rendering.

        Args:
            messages: in their order.
            tools: that they may call.
            generate: with the header of the answer that is to come.
            marked: see Marking.

        Raises:
            ConfigError: the template fails, for whatever reason: it is a program that others wrote.
        """
        made = self._tools(tools, marked)
        try:
            return self._render(self._dicts(messages, marked), made, generate)
        except RunawayError:
            raise
        except ConfigError:
            if not any(m.call_id or any(call.id for call in m.tool_calls) for m in messages):
                raise
        # ids of another form than the template wants, such as Mistral's nine characters: it gets some that are right
        return self._render(self._dicts([_without_ids(m) for m in messages], marked), made, generate)

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool) -> str:
        if self._broken is not None:
            raise self._broken
        if self.reads_parts:
            messages = [in_parts(message) for message in messages]
        return self._rendered(messages, tools, generate)

    def _rendered(self, messages: list[dict[str, Any]], tools: list[Any] | None, generate: bool) -> str:
        compiled = self._compiled
        compiled.environment.begin(sum(len(str(message.get("content") or "")) for message in messages))
        try:
            values = {
                **self.tokenizer.special_tokens_map,
                DATED: self._today,
                **self.options,
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": generate,
            }
            return shown(str(compiled.render(values)))
        except Runaway as error:
            raise self._runaway(error) from None
        except Exception as error:  # a template may fail in any way that Python can
            roles = shorten(", ".join(message["role"] for message in messages), 100).strip("'")
            raise ConfigError(
                "the tokenizer's own chat template refuses a conversation",
                received=f"roles {roles}: {shorten(_reason(error), 300)}{self._of}",
                expected="a conversation that this template can write",
                fix="change such rows, leave them out with --skip-bad, or choose a template by name: --template chatml",
            ) from None

    def _today(self, form: str) -> str:
        """The run's date, as a template asks for it."""
        self._formats.add(form)
        return datetime.fromisoformat(self.date).strftime(form)

    @property
    def formats(self) -> set[str]:
        """The forms in which the template asks for the date."""
        self.tried([USER])
        self.tried([USER, ANSWER, USER], tools=self.takes_tools)
        return self._formats

    @cached_property
    def reads_parts(self) -> bool:
        """Does the template read texts as lists of parts alone, as those of models that take images do?"""

        def asked(content: object) -> bool:
            try:
                return ASKED in self._rendered([{"role": "user", "content": content}], None, True)
            except RunawayError:
                raise
            except ConfigError:
                return False

        return not asked(ASKED) and asked(in_parts({"content": ASKED})["content"])

    @cached_property
    def _compiled(self) -> Any:
        # transformers' own environment: sandboxed, with its filters; it has no public way to hand in a date
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return counted(_compile_jinja_template("").environment, self.jinja)
        except Runaway as error:
            raise self._runaway(error) from None
        except Unsure as error:
            raise ConfigError(
                f"the tokenizer's own chat template {error}{self._of}",
                expected="one text, which gives the same prompt for the same conversation, here and where it is served",
                fix=OTHER,
            ) from None
        except Exception as error:
            raise ConfigError(
                f"the tokenizer's own chat template is no Jinja template{self._of}",
                received=shorten(_reason(error), 300),
                fix=OTHER,
            ) from None

    @property
    def _of(self) -> str:
        """Where it comes from, for a message."""
        folder = getattr(self.tokenizer, "name_or_path", "")
        return f" (that of {_file_in(Path(folder))})" if folder else ""

    def check_once(self) -> None:
        """Raises ConfigError where the template writes a conversation twice: its text stands twice in its file."""
        text = self.tried([USER, ANSWER]) or ""
        if re.search(rf"{ASKED}.*{SAID}.*{ASKED}.*{SAID}", text, re.DOTALL):
            raise ConfigError(
                f"the tokenizer's own chat template writes every message twice{self._of}",
                received=shorten(text, 300),
                expected="each message once; does the template's text stand twice in that file?",
                fix=OTHER,
            )

    def _runaway(self, error: Exception) -> RunawayError:
        self._broken = RunawayError(
            f"the tokenizer's own chat template does not end, or makes texts without a measure{self._of}",
            received=str(error),
            expected="what published templates take, many times over",
            fix=OTHER,
        )
        return self._broken

    @property
    def reads(self) -> set[str]:
        """The names of variables that the template reads, but for those that `text` always sets."""
        from jinja2 import meta

        environment = self._compiled.environment
        names: set[str] = meta.find_undeclared_variables(environment.parse(self.jinja))
        return names - set(environment.globals) - {DATED, *GIVEN}

    # ---- messages as templates want them ----

    def _tools(self, tools: Tools, marked: Marking) -> list[Any] | None:
        given = [dict(tool) for tool in tools] or None
        return given if marked is None else self.marks.everywhere(given)

    def _dicts(self, messages: Sequence[Message], marked: Marking) -> list[Any]:
        """Messages as dictionaries; a system text may move into the first user's turn."""
        calls = any(message.tool_calls for message in messages)
        manner = self.manner if calls else Manner()
        out: list[dict[str, Any]] = []
        called: list[tuple[str, str]] = []  # id and name of each call without a result so far
        moved = ""
        for turn, message in enumerate(messages):
            values = self._dict(message, turn, marked, manner, last=turn == len(messages) - 1)
            if message.role == "system" and self.moves_system:
                moved = values["content"]
                continue
            if message.role == "user" and moved:
                values["content"], moved = f"{moved}\n\n{values['content']}", ""
            if manner.ids:
                _with_ids(values, called, turn)
            out.append(values)
        if moved:
            raise DataError(
                "a system text, no place for one in the template, and no user's turn to put it into",
                received=shorten(moved),
                fix="leave such rows out, or choose a template by name: --template chatml",
            )
        return out

    def _dict(self, message: Message, turn: int, marked: Marking, manner: Manner, *, last: bool) -> dict[str, Any]:
        values: dict[str, Any] = {"role": message.role}
        if message.call_id:
            values["tool_call_id"] = self._own(message.call_id, turn, marked and "broken", tags=False)
        if message.name:
            values["name"] = self._own(message.name, turn, marked and "broken", tags=False)
        message = self._apart(message)
        content: str | None = self._own(joined(message), turn, marked, tags=message.role == "assistant")
        thought = message.thought
        place = self.thought_place if thought else None
        if place == "field":
            own = self._own(thought, turn, marked, tags=False)
            values |= {"reasoning_content": own, "thinking": own, "reasoning": own}
        elif place is not None and last and self.answers_at_once:  # earlier answers are served without their thoughts
            content = self.thought_style.written(self._own(thought, turn, marked, tags=False), content or "")
        if message.tool_calls:
            content = content or manner.content
            made = (lambda value: value) if marked is None else self.marks.everywhere
            values["tool_calls"] = [_call(call, manner, made) for call in message.tool_calls]
        return {**values, "content": content}

    def _apart(self, message: Message) -> Message:
        """A thought that stands in the text goes into its field, where the template has one: not all look for tags."""
        place = self.thought_place == "field" and self.thought_style.seen  # between tags, not in a channel of its own
        if message.role != "assistant" or message.thought or not place:
            return message
        thought = thoughts.split(message.content)[0]
        kind = thoughts.tags_in(message.content)
        if kind is None or not message.content.lstrip().startswith(kind.open):
            return message
        return replace(message, content=thoughts.answer_of(message.content), thought=thought)

    def _own(self, text: str, turn: int, marked: Marking, *, tags: bool) -> str:
        """A user's text; in an answer the tags of a thought are the family's, and templates look for them."""
        if marked is None:
            return text
        parts = thoughts.pieces(text) if tags else [text]
        if marked == "broken":
            return "".join(part if n % 2 else self.marks.broken(part) for n, part in enumerate(parts))
        edges = marked == "whole" and not tags  # blanks before an answer are looked at, and nothing of it is cut
        return "".join(part if n % 2 else self.marks.wrapped(part, turn, edges=edges) for n, part in enumerate(parts))

    # ---- what the template has a place for ----

    def tried(self, messages: Sequence[Message], manner: Manner | None = None, *, tools: bool = False) -> str | None:
        """A probe's rendering; None where the template fails on it."""
        try:
            dicts = [self._plain(message, manner or Manner()) for message in messages]
            if manner and manner.ids:
                called: list[tuple[str, str]] = []
                for turn, values in enumerate(dicts):
                    _with_ids(values, called, turn)
            return self._render(dicts, [TOOL] if tools else None, generate=messages[-1].role != "assistant")
        except RunawayError:
            raise
        except ConfigError:
            return None

    @staticmethod
    def _plain(message: Message, manner: Manner) -> dict[str, Any]:
        """A probe's message."""
        values: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thought:
            values |= {"reasoning_content": message.thought, "thinking": message.thought, "reasoning": message.thought}
        if message.tool_calls:
            values["content"] = message.content or manner.content
            values["tool_calls"] = [_call(call, manner) for call in message.tool_calls]
        return values

    @cached_property
    def moves_system(self) -> bool:
        """Do system texts stand in the first user's turn?"""
        if self.system_role != "auto":
            return self.system_role == "first-user"
        found = self.tried([Message("system", RULED), USER])
        return (found is None or RULED not in found) and self.tried([USER]) is not None

    @cached_property
    def takes_tools(self) -> bool:
        """Is a list of tools written into the prompt?"""
        found = self.tried([USER], tools=True)
        return NAME in found if found is not None else "tools" in self.jinja

    @cached_property
    def _manner(self) -> tuple[Manner | None, bool]:
        """How calls are wanted (None: there is no place for them), and whether their results are written."""
        for turns in ((USER, CALL, RESULT, ANSWER), (USER, CALL)):
            for manner in MANNERS:
                found = self.tried(turns, manner, tools=True)
                if found is None or NAME not in found.rpartition(ASKED)[2]:
                    continue
                said = found.rpartition(ASKED)[2]
                # Python's own spelling of a dictionary, or JSON text written as a string in JSON, is not what is served
                if VALUE in said and f"'{KEY}'" not in said and f'\\"{KEY}' not in said:
                    return manner, GAVE in said
        return None, False

    @property
    def manner(self) -> Manner:
        """How this template wants calls."""
        return self._manner[0] or Manner()

    @property
    def takes_calls(self) -> bool:
        """Are calls written?"""
        return self._manner[0] is not None

    @cached_property
    def takes_results(self) -> bool:
        """Are results of calls written?"""
        if self._manner[1]:
            return True
        found = self.tried([USER, ANSWER, RESULT])
        return found is not None and GAVE in found

    @cached_property
    def _thoughts(self) -> list[str]:
        """Renderings of an answer with a thought: in its field, in a part of the content, beside a call, left out."""
        mused = Message("assistant", SAID, thought=MUSED)
        parts = [{"type": "thinking", "thinking": MUSED}, {"type": "text", "text": SAID}]
        found = [self.tried([USER, mused])]
        try:
            asked: list[dict[str, Any]] = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": parts}]
            found.append(self._render(asked, None, False))
        except RunawayError:
            raise
        except ConfigError:
            found.append(None)
        calling = replace(mused, tool_calls=CALL.tool_calls)
        found.append(self.tried([USER, calling], self.manner, tools=True) if self.takes_calls else None)
        return [text or "" for text in (*found, self.tried([USER, ANSWER]))]

    @cached_property
    def thought_place(self) -> Literal["field"] | thoughts.Tags | None:
        """Where a thought goes: into its field, into the content between tags, or nowhere."""
        field, _, calling, _ = self._thoughts
        if MUSED in field or (MUSED in calling and thoughts.style_in(calling, MUSED, SAID)):  # Kimi K2 keeps the latter
            return "field"
        known = (kind for kind in thoughts.KINDS if kind.close in self.jinja)
        held = (kind for kind in thoughts.KINDS if single_id(self.tokenizer, kind.open) is not None)
        return next(known, None) or next(held, None)

    @cached_property
    def thought_style(self) -> thoughts.Style:
        """How the template itself writes a thought; where it never does, as most do."""
        place = self.thought_place
        found = (thoughts.style_in(text, MUSED, SAID) for text in self._thoughts)
        kind = place if isinstance(place, thoughts.Tags) else thoughts.KINDS[0]
        return next(filter(None, found), thoughts.usual(kind))

    @cached_property
    def answers_at_once(self) -> bool:
        """Does an answer's text stand right behind its header, so that a thought may stand in the text?"""
        before, prompt = self._thoughts[-1].partition(SAID)[0], self.tried([USER]) or ""
        header, asked = ("".join(thoughts.pieces(text)[::2]) for text in (before, prompt))
        return asked.startswith(header.rstrip())


FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # the first that is there is read


def _file_in(folder: Path) -> Path:
    """The file of a tokenizer's folder that holds its chat template; the folder, where none is there."""
    return next((folder / name for name in FILES if (folder / name).is_file()), folder)


def _reason(error: Exception) -> str:
    """What a template fails at; some errors have no text of their own."""
    if isinstance(error, RecursionError):
        return "it calls itself without an end"
    return " ".join(str(error).split()) or type(error).__name__


def _call(call: ToolCall, manner: Manner, made: Callable[[object], object] = lambda value: value) -> dict[str, object]:
    given = made(call.arguments if manner.as_text else arguments(call))
    own = {"id": made(call.id)} if call.id else {}
    return {**own, "type": "function", "function": {"name": made(call.name), "arguments": given}}


def _without_ids(message: Message) -> Message:
    calls = tuple(replace(call, id="") for call in message.tool_calls)
    return replace(message, call_id="", tool_calls=calls)


def _with_ids(values: dict[str, Any], called: list[tuple[str, str]], turn: int) -> None:
    """Ids of calls that have none, nine letters and digits as Mistral wants them, and on each result the id and name of
    its call."""
    for n, call in enumerate(values.get("tool_calls", ())):
        call.setdefault("id", f"call{turn:03d}{n:02d}")
        called.append((call["id"], call["function"]["name"]))
    if values["role"] == "tool" and called:
        number, name = called.pop(0)
        values.setdefault("tool_call_id", number)
        values.setdefault("name", name)
