"""The tokenizer's own Jinja template: conversations to segments, as whoever serves the model renders them.

In: messages, tools. Out: segments. A conversation is rendered up to each answer, without it (what the model is asked)
and with it. Where each rendering begins with the one before, the whole conversation is one sample. Many templates write
an answer otherwise once something follows it (Qwen3 and GLM-4.5 drop its thought): then each answer is a sample of its
own, `one_answer_per_sample`, behind the history as it is served. Where the prompt is no beginning of what is rendered
with the answer (R1 kinds end it in an opened thought), it stays as it is served, and the answer stands behind it.

    dialogue.py   one conversation, rendered turn by turn
    rendering.py  the template itself, and what it has a place for
    marks.py      where users' texts stand in a rendering
    thoughts.py   thoughts and their tags
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from fitune.core.errors import ConfigError, FituneError
from fitune.core.records import Message, Segment
from fitune.data.templates import thoughts
from fitune.data.templates.base import Tools
from fitune.data.templates.dialogue import Dialogue, Ends, answered, next_turn
from fitune.data.templates.rendering import ANSWER, DATED, MUSED, SAID, USER, Renderer, SystemRole
from fitune.data.tokenizer.interface import Tokenizer

NAMED = "default", "tool_use"  # templates that a tokenizer may have beside each other


class ChatTemplate:
    """A Jinja template.

    Args:
        jinja: its text, or several by name: `default`, and `tool_use` where there are tools.
        tokenizer: whose it is.
        stop: the token that ends an answer; None: the tokenizer's EOS.
        date: what the template gets for today, as YYYY-MM-DD; None: today. A run keeps it.
        options: further variables that it reads, such as enable_thinking.
        system_role: what becomes of a system text: keep, first-user (it goes into the first user's turn), or auto
            (that, where the template has no place for it).
    """

    name = "chat_template"

    def __init__(
        self,
        jinja: str | Mapping[str, str],
        tokenizer: Tokenizer,
        stop: str | None,
        *,
        date: str | None = None,
        options: Mapping[str, object] | None = None,
        system_role: SystemRole = "auto",
    ) -> None:
        self.jinja, self.tokenizer, self.stop = jinja if isinstance(jinja, str) else dict(jinja), tokenizer, stop
        texts = {"default": jinja} if isinstance(jinja, str) else dict(jinja)
        if "default" not in texts:
            raise ConfigError(
                "the tokenizer has several chat templates, and none is called default",
                received=", ".join(texts),
                expected="default",
                fix="name one of them default in tokenizer_config.json, or choose a template: --template chatml",
            )
        dated = any(DATED in text for text in texts.values())
        self.date = (date or datetime.now().date().isoformat()) if dated else None
        self.options, self.system_role = dict(options or {}), system_role
        self._renderers = {
            name: Renderer(
                text, tokenizer, date=self.date or "2000-01-01", options=self.options, system_role=system_role
            )
            for name, text in texts.items()
            if name in NAMED
        }
        self._last: Dialogue | None = None

    # ---- what the rest of fitune asks ----

    @property
    def other_stops(self) -> tuple[str, ...]:
        """See Template."""
        found = {ends.call_stop for ends in self._ends.values()}
        return tuple(sorted(stop for stop in found if stop and stop != self.stop))

    def one_answer_per_sample(self, messages: Sequence[Message], tools: Tools = ()) -> bool:
        """See Template."""
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        return len(answers) > 1 and not self._dialogue(messages, tools).stable(answers[-1])

    def render(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        one, last = self._dialogue(messages, tools), len(messages) - 1
        if not messages or messages[-1].role != "assistant":
            return one.prompt_segments(last + 1)
        before, after = one.prompt_segments(last), one.answer_segments(last)
        one.check(last)
        return [*before, *after]

    def prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """See Template."""
        return self._dialogue(messages, tools).prompt_segments(len(messages))

    def read_answer(self, text: str) -> Message:
        """See Template."""
        with_thought, before, after = self._frame
        if with_thought is not None and (found := with_thought.fullmatch(text.strip())):
            return Message("assistant", found["said"], thought=found["mused"])
        bare = text.strip()
        if before and bare.startswith(before):
            text = bare.removeprefix(before).strip()
        return Message("assistant", text.strip().removesuffix(after) if after else text)

    def answer_text(self, text: str) -> str:
        """See Template."""
        return text

    @property
    def framed(self) -> bool:
        """Does more than a thought's tags stand around an answer (channels)? Then only the whole of it can be read."""
        return any(piece.strip() for piece in thoughts.pieces(self._frame[1])[::2])

    def as_dict(self) -> dict[str, object]:
        """See Template."""
        values: dict[str, Any] = {"kind": "chat_template", "jinja": self.jinja, "stop": self.stop}
        more = {"date": self.date, "options": self.options, "system_role": self.system_role}
        return values | {name: value for name, value in more.items() if value and value != "auto"}

    def for_others(self) -> str:
        """The template as whoever serves the model is to have it: with the run's date and options written into it, and
        with system texts moved where the run moved them.

        Where there are several, the default one.
        """
        text = self.jinja if isinstance(self.jinja, str) else self.jinja["default"]
        before = ""
        for name, value in self.options.items():
            before += f"{{%- set {name} = {name} if {name} is defined else {_quoted(value)} -%}}\n"
        if self.date is not None:
            asked = self._renderers["default"].formats
            dates = {form: datetime.fromisoformat(self.date).strftime(form) for form in sorted(asked)}
            before += f"{{%- macro {DATED}(form) -%}}{{{{ {_quoted(dates)}[form] }}}}{{%- endmacro -%}}\n"
        return (_MOVED if self.moves_system else "") + before + text

    def reads(self) -> set[str]:
        """The names of variables that it reads, but for those that it is always given."""
        return set().union(*(renderer.reads for renderer in self._renderers.values()))

    @property
    def in_parts(self) -> bool:
        """Does it read texts as lists of parts alone?"""
        return self._renderers["default"].reads_parts

    @property
    def moves_system(self) -> bool:
        """Do system texts stand in the first user's turn?"""
        return self._renderers["default"].moves_system

    # ---- inside ----

    def _renderer(self, tools: Tools) -> tuple[Renderer, Ends]:
        name = "tool_use" if tools and "tool_use" in self._renderers else "default"
        return self._renderers[name], self._ends[name]

    @cached_property
    def _ends(self) -> dict[str, Ends]:
        stop = self.stop or self.tokenizer.eos_token
        return {name: Ends(renderer, stop) for name, renderer in self._renderers.items()}

    def _dialogue(self, messages: Sequence[Message], tools: Tools) -> Dialogue:
        """The conversation with its renderings; that of the last call is kept, because a row is asked for twice."""
        messages, last = tuple(messages), self._last
        if last is None or last.messages is not messages or last.tools is not tools:
            self._last = last = Dialogue(messages, tools, *self._renderer(tools))
        return last

    @cached_property
    def _frame(self) -> tuple[re.Pattern[str] | None, str, str]:
        """What the template puts around a thought and an answer (a pattern), before an answer alone, and behind it."""
        bare = self._framed("")
        before, _, after = bare.partition(SAID)
        framed = self._framed(MUSED)
        opening, found, between = framed.partition(SAID)[0].partition(MUSED)
        if not found:
            return None, before.strip(), after.strip()
        parts = (re.escape(opening.strip()), re.escape(between.strip()), re.escape(framed.partition(SAID)[2].strip()))
        pattern = r"{}\s*(?P<mused>.*?)\s*{}\s*(?P<said>.*?)\s*{}".format(*parts)
        return re.compile(pattern, re.DOTALL), before.strip(), after.strip()

    def _framed(self, thought: str) -> str:
        """A probe's answer as it stands behind its prompt; nothing where the template has no place for it."""
        try:
            one = Dialogue((USER, Message("assistant", SAID, thought=thought)), (), *self._renderer(()))
            return "".join(segment.text for segment in one.answer_segments(1) if segment.role != "stop")
        except FituneError:
            return ""


def of_tokenizer(
    tokenizer: Tokenizer,
    *,
    system_role: SystemRole = "auto",
    options: Mapping[str, object] | None = None,
    date: str | None = None,
) -> ChatTemplate:
    """The tokenizer's own template, with the token that ends its answers.

    Args:
        tokenizer: has a chat_template, or several by name.
        system_role, options, date: see ChatTemplate.

    Raises:
        ConfigError: it writes every message twice.
    """
    assert tokenizer.chat_template is not None

    def with_stop(stop: str | None) -> ChatTemplate:
        jinja = tokenizer.chat_template or ""
        return ChatTemplate(jinja, tokenizer, stop, system_role=system_role, options=options, date=date)

    found = with_stop(None)._renderers["default"]
    found.check_once()
    return with_stop(find_stop(found))


# system texts go into the question behind them, before a template that has no place for one
_MOVED = """{%- set moved = namespace(rules='', turns=[]) -%}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- set moved.rules = m.content ~ '\\n\\n' -%}
    {%- elif m.role == 'user' and moved.rules -%}
        {%- set moved.turns = moved.turns + [{'role': 'user', 'content': moved.rules ~ m.content}] -%}
        {%- set moved.rules = '' -%}
    {%- else -%}{%- set moved.turns = moved.turns + [m] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = moved.turns -%}
"""


def _quoted(value: object) -> str:
    """A JSON value as Jinja writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {_quoted(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_quoted, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def find_stop(renderer: Renderer) -> str | None:
    """The special token that the template puts behind an answer (often not the tokenizer's EOS) or, where it puts none,
    before the turn that follows; the EOS, where it follows at once (Command-R7B ends the text, then the turn)."""
    text = answered(renderer)
    after = text.rpartition(SAID)[2]
    found = [token for token in renderer.tokenizer.get_added_vocab() if token and token in after]
    if not found:
        return next_turn(renderer, text)
    stop = min(found, key=lambda token: (after.index(token), -len(token)))
    eos = renderer.tokenizer.eos_token
    goes_on = (renderer.tried([USER, ANSWER, USER]) or "").rpartition(SAID)[2]  # an end of the text alone is no stop
    return str(eos) if eos and all(f"{stop}{eos}" in text for text in (after, goes_on)) else stop
