"""A template of pieces as a Jinja text, which transformers, vLLM and others render without fitune.

In: a PieceTemplate. Out: the text for `chat_template`. A message may have a `context` (alpaca's input) beside its
`content`. Whether its prompts have the ids of training is seen when it is written: fitune encodes a prompt piece by
piece, others as one text, so tokens may merge over a border. Kinds of conversations where they do can be left out
(`without`): the text refuses those by name. With a `border`, a mark stands between the pieces, so that a few lines of
code can encode them apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fitune.data.templates.pieces import PieceTemplate

# kinds of conversations that may be left out, and how each is called in an error
KINDS = {
    "tools": "tools",
    "empty": "an empty message",
    "context": "a context",
    "turns": "earlier answers",
    "system": "a system text",
    "later": "a system text between turns",
    "thoughts": "thoughts",
}
JOINED = (
    "{%- macro joined(m) -%}"
    "{{- m.content or '' }}{{- '\\n' if m.content and m.context else '' }}{{- m.context or '' }}"
    "{%- endmacro %}"
)


@dataclass(frozen=True)
class Frame:
    """What stands in the text beside the template's pieces.

    Args:
        stop: the stop token as an expression: `eos_token`, or a quoted text.
        bos: does BOS begin a text.
        space: stands behind BOS, where a tokenizer puts no space of its own after a control token.
        border: stands before every piece; none for a text that is encoded as a whole.
        without: kinds of conversations that the text refuses.
        thought: what stands before and behind a thought in front of an answer; none: a thought is refused.
    """

    stop: str
    bos: bool = False
    space: str = ""
    border: str = ""
    without: Collection[str] = ()
    thought: tuple[str, str] | None = None

    @property
    def begin(self) -> str:
        """What begins a text."""
        return self.expression("bos_token", *([quoted(self.space)] if self.space else [])) if self.bos else ""

    def say(self, text: str) -> str:
        """A piece of the template's own text."""
        return self.expression(quoted(text)) if text else ""

    def expression(self, *parts: str) -> str:
        """A piece made of expressions."""
        return f"{{{{- {' ~ '.join([*([quoted(self.border)] if self.border else []), *parts])} }}}}"

    def fill(self, piece: str, slots: Mapping[str, str], before: str = "") -> str:
        """A piece with expressions in its slots, as pieces.fill does it; a blank before a slot goes with the slot.

        Args:
            piece: with `{name}` for each slot.
            slots: an expression for each name.
            before: an expression that goes with the first part.
        """
        out = []
        for n, part in enumerate(re.split(rf"( ?\{{(?:{'|'.join(slots)})\}})", piece)):
            if n % 2:
                blank = [quoted(" ")] if part.startswith(" ") else []
                out.append(self.expression(*blank, f"({slots[part.strip(' {}')]})"))
            elif part or before:
                out.append(self.expression(*([before] if before else []), quoted(part)))
            before = ""
        return "".join(out)


def quoted(text: str) -> str:
    """A string as Jinja writes it."""
    out = text.replace("\\", "\\\\").replace("'", "\\'")
    return "'" + out.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + "'"


def as_jinja(template: PieceTemplate, frame: Frame) -> str:
    """The text, a statement a line: every line takes the break before it away."""
    t = replace(template, tools=None, tool_call=None, tool=None) if "tools" in frame.without else template
    again = [f"{{%- if ns.users %}}{frame.begin}{{%- endif %}}"] if t.bos_each_turn and frame.bos else []
    lines = [
        JOINED,
        *_guards(t, frame),
        frame.begin,
        "{%- set ns = namespace(users=0, tools='') %}",
        "{%- set system = joined(messages[0]) if messages[0].role == 'system' else none %}",
        *_system(t, frame),
        "{%- for m in messages %}",
        "{%- if m.role == 'user' %}",
        *again,
        *_user(t, frame),
        "{%- set ns.users = ns.users + 1 %}",
        *_later_system(t, frame),
        "{%- elif m.role == 'tool' %}",
        *_result(t, frame),
        "{%- elif m.role == 'assistant' %}",
        *_answer(t, frame),
        "{%- endif %}",
        "{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{frame.say(t.opening)}{{%- endif %}}",
    ]
    return "\n".join(line for line in lines if line)


def _refuse(text: str) -> str:
    return f"{{{{- raise_exception({quoted(text)}) }}}}"


def _guards(t: PieceTemplate, frame: Frame) -> list[str]:
    """Refusals of what would get other ids than in training."""
    asked = {
        "empty": "not joined(m)",
        "context": "m.context",
        "turns": "m.role == 'assistant'",
        "system": "m.role == 'system'",
        "later": "m.role == 'system' and not loop.first",
        "thoughts": "m.reasoning_content",
    }
    why = "as one text, its tokens would not be those of the training"
    lines = [
        f"{{%- if {test} %}}{_refuse(f'{KINDS[kind]}: {why}')}{{%- endif %}}"
        for kind, test in asked.items()
        if kind in frame.without
    ]
    return ["{%- for m in messages %}", *lines, "{%- endfor %}"] if lines else []


def _no_place(t: PieceTemplate, what: str) -> str:
    return _refuse(f"the template {t.name} has no place for {what}")


def _system(t: PieceTemplate, frame: Frame) -> list[str]:
    head, _, tail = t.system.partition("{content}")
    if t.tools is None:
        lines = [f"{{%- if tools %}}{_no_place(t, 'tools')}{{%- endif %}}"]
        if t.user_with_system is not None:
            return lines
    else:
        lines = [
            "{%- for tool in tools or [] %}",
            "{%- set ns.tools = ns.tools ~ ('' if loop.first else '\\n') ~ (tool | tojson) %}",
            "{%- endfor %}",
        ]
    asked = ["tools"] if t.tools is not None else []
    if t.user_with_system is None:
        asked += ["system is not none"] if t.default_system is None else ["true"]
    own, given = frame.say(head + (t.default_system or "")), frame.say(head) + frame.expression("system")
    lines.append(f"{{%- if {' or '.join(asked)} %}}")
    lines.append(f"{{%- if system is none %}}{own}{{%- else %}}{given}{{%- endif %}}")
    if t.tools is not None:
        text = "system" if t.default_system is None else "(system is none or system)"
        listed = frame.fill(t.tools, {"tools": "ns.tools"}, f"('\\n\\n' if {text} else '')")
        lines.append(f"{{%- if tools %}}{listed}{{%- endif %}}")
    return [*lines, f"{frame.say(tail)}{{%- endif %}}"]


def _later_system(t: PieceTemplate, frame: Frame) -> list[str]:
    """A system text between turns."""
    if not t.later_system:
        said = _no_place(t, "a system text after the first turn")
    else:
        said = frame.fill(t.system, {"content": "joined(m)"})
    return ["{%- elif m.role == 'system' and not loop.first %}", said]


def _user(t: PieceTemplate, frame: Frame) -> list[str]:
    """The piece of a user's turn, by the same order of questions as PieceTemplate._user."""
    branches = [
        ("ns.users", t.next_user),
        ("not ns.users and system is not none", t.user_with_system),
        ("m.context", t.user_with_context),
    ]
    known = [(asked, piece) for asked, piece in branches if piece is not None]
    lines = [f"{{%- {'elif' if n else 'if'} {asked} %}}{_turn(piece, frame)}" for n, (asked, piece) in enumerate(known)]
    return [*lines, f"{{%- else %}}{_turn(t.user, frame)}{{%- endif %}}"] if known else [_turn(t.user, frame)]


def _turn(piece: str, frame: Frame) -> str:
    content = "m.content or ''" if "{context}" in piece else "joined(m)"
    return frame.fill(piece, {"content": content, "context": "m.context or ''", "system": "system"})


def _result(t: PieceTemplate, frame: Frame) -> list[str]:
    if t.tool is None:
        return [_no_place(t, "tool results")]
    first, last = "messages[loop.index0 - 1].role", "messages[loop.index0 + 1].role"
    return [
        f"{{%- if loop.first or {first} != 'tool' %}}{frame.say(t.tool_start)}{{%- endif %}}",
        frame.fill(t.tool, {"content": "joined(m)"}),
        f"{{%- if loop.last or {last} != 'tool' %}}{frame.say(t.tool_end)}{{%- endif %}}",
    ]


def _answer(t: PieceTemplate, frame: Frame) -> list[str]:
    if frame.thought is None:
        lines = [f"{{%- if m.reasoning_content %}}{_no_place(t, 'a thought')}{{%- endif %}}", "{%- set mused = '' %}"]
    else:
        before, behind = map(quoted, frame.thought)
        written = f"{before} ~ m.reasoning_content ~ {behind} if m.reasoning_content else ''"
        lines = [f"{{%- set mused = {written} %}}"]
    lines += ["{%- set said = mused ~ joined(m) %}", frame.say(t.opening), "{%- if m.tool_calls %}"]
    if t.tool_call is None:
        lines.append(_no_place(t, "tool calls"))
    else:
        written = "call.arguments if call.arguments is string else call.arguments | tojson"
        lines += [
            f"{{%- if said %}}{frame.expression('said')}{{%- endif %}}",
            "{%- for one in m.tool_calls %}{%- set call = one.function or one %}",
            f"{{%- if said or not loop.first %}}{frame.say(chr(10))}{{%- endif %}}",
            frame.fill(t.tool_call, {"name": "call.name", "arguments": written}),
            "{%- endfor %}",
        ]
    return [
        *lines,
        f"{{%- else %}}{frame.fill(t.assistant, {'content': 'said'})}{{%- endif %}}",
        frame.expression(frame.stop),
        f"{{%- if not loop.last %}}{frame.say(t.after_stop)}{{%- endif %}}" if t.after_stop else "",
    ]
