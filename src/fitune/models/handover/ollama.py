"""An Ollama Modelfile: the file, the template in Ollama's language, the stops, the parameters of the run.

In: the run's encoder, the chat template as others render it. Out: the text of a Modelfile. Ollama has a language of its
own (Go's text/template) and no Jinja, so the template is taken apart by rendering: what it puts around a system text, a
question, an answer. Put together again from these pieces it must give every conversation that it is tried on, character
by character; a template that does more than that (tools, thoughts that it drops) cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fitune.core.errors import ModelError
from fitune.core.records import Conversation
from fitune.models.handover.conversations import CONVERSATIONS, talk

Render = Callable[[Conversation], str | None]
S, U, V, A = "\ue001", "\ue002", "\ue003", "\ue004"  # texts that are found again: characters for private use


@dataclass(frozen=True)
class Frame:
    """What a template writes around texts.

    Args:
        begin: where there is no system text.
        before_system, after_system: around one.
        before_user: in front of a question.
        after_user: behind one that an answer follows; opening: behind the last one.
        after_assistant: behind an answer.
    """

    begin: str
    before_system: str
    after_system: str
    before_user: str
    after_user: str
    opening: str
    after_assistant: str
    system: bool = True

    def text(self, conversation: Conversation) -> str:
        """A conversation, put together from the pieces."""
        turns = list(conversation.messages)
        first = turns.pop(0).content if turns[0].role == "system" else None
        made = self.begin if first is None else f"{self.before_system}{first}{self.after_system}"
        for n, turn in enumerate(turns):
            if turn.role == "user":
                behind = self.opening if n == len(turns) - 1 else self.after_user
                made += f"{self.before_user}{turn.content}{behind}"
            else:
                made += f"{turn.content}{self.after_assistant}"
        return made

    def go(self) -> str:
        """The same in Ollama's language."""
        begin = _literal(self.begin)
        if self.system:
            system = f"{_literal(self.before_system)}{{{{ .System }}}}{_literal(self.after_system)}"
            begin = f"{{{{ if .System }}}}{system}{{{{ else }}}}{begin}{{{{ end }}}}"
        behind = _literal(self.after_user)
        last = ""
        if self.opening != self.after_user:
            last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            behind = f"{{{{ if $last }}}}{_literal(self.opening)}{{{{ else }}}}{behind}{{{{ end }}}}"
        user = f"{_literal(self.before_user)}{{{{ .Content }}}}{behind}"
        assistant = f"{{{{ .Content }}}}{_literal(self.after_assistant)}"
        return (
            f'{begin}{{{{ range $i, $_ := .Messages }}}}{last}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
        )


def frame(render: Render, names: Sequence[str]) -> Frame:
    """The pieces of a chat template.

    Args:
        render: a conversation as others render it, with the opening of an answer; None where the template refuses it.
        names: of control tokens.

    Raises:
        ModelError: it is more than pieces around texts.
    """
    one, two = render(talk(U)), render(talk(U, A, V))
    with_system = render(talk(U, system=S))
    if one is None or two is None:
        raise _refused("it refuses a question, or a second one")
    between = _cut(two, (U, A, V))
    before, behind = one.split(U) if one.count(U) == 1 else ("", "")
    if between is None or not one.count(U) == 1:
        raise _refused("it does not write each text once, in its order")
    begin_user, after_user, answer_user, opening = between
    pieces = [begin_user, answer_user]
    system = _cut(with_system, (S, U)) if with_system is not None else None
    if system is not None:
        pieces.append(system[1])
    before_user = _common_end(pieces, names)
    made = Frame(
        begin=begin_user.removesuffix(before_user) if before == begin_user else before.removesuffix(before_user),
        before_system=system[0] if system else "",
        after_system=system[1].removesuffix(before_user) if system else "",
        before_user=before_user,
        after_user=after_user,
        opening=opening if behind == opening else behind,
        after_assistant=answer_user.removesuffix(before_user),
        system=system is not None,
    )
    check(made, render)
    return made


def check(made: Frame, render: Render) -> None:
    """Raises ModelError where the pieces do not give what the template gives."""
    tried = 0
    for name, kinds, conversation in CONVERSATIONS:
        if kinds & {"tools", "context"} or conversation.messages[-1].role != "user":
            continue
        later = any(message.role == "system" for message in conversation.messages[1:])
        if later or ("system" in kinds and not made.system):
            continue  # Ollama puts every system text in front
        expected = render(conversation)
        if expected is None:
            continue
        tried += 1
        if made.text(conversation) != expected:
            raise _refused(f"its pieces do not give {name}: {made.text(conversation)[:80]!r} for {expected[:80]!r}")
    if tried < 10:
        raise _refused(f"it takes only {tried} of the conversations that it was tried on")


def _refused(why: str) -> ModelError:
    return ModelError(
        "this chat template cannot be written in Ollama's language",
        received=why,
        expected="a template that writes each text as it is, with the same words around it in every turn",
        fix="--to gguf: llama.cpp's own server renders the template that is in the file",
    )


def _cut(text: str | None, marks: Sequence[str]) -> list[str] | None:
    """What stands around marks that must each be there once, in this order."""
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    found: list[str] = []
    rest = text
    for mark in marks:
        before, _, after = rest.partition(mark)
        if any(other in before for other in marks):
            return None
        found, rest = [*found, before], after
    return [*found, rest]


def _common_end(texts: Sequence[str], names: Sequence[str]) -> str:
    """What all texts end in; it begins in the middle of no control token."""
    shortest = min(texts, key=len)
    length = next((n for n in range(len(shortest)) if len({text[-1 - n] for text in texts}) > 1), len(shortest))
    while any(_inside(text, len(text) - length, names) for text in texts):
        length -= 1
    return shortest[len(shortest) - length :]


def _inside(text: str, place: int, names: Sequence[str]) -> bool:
    """Is a place in the middle of a name?"""
    return any(text.startswith(name, start) for name in names for start in range(max(0, place - len(name) + 1), place))


def _literal(text: str) -> str:
    """Text in the template; what its language or the Modelfile would read otherwise stands as a string, escaped."""
    if "{{" not in text and '"""' not in text:
        return text
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    for character, code in (('\\"', "\\u0022"), ("{", "\\u007b"), ("}", "\\u007d")):
        quoted = quoted.replace(character, code)
    return f'{{{{ "{quoted}" }}}}'


def modelfile(file: str, template: str, stops: Sequence[str], parameters: Mapping[str, object]) -> str:
    """The text of a Modelfile.

    Args:
        file: the GGUF beside it.
        template: in Ollama's language.
        stops: texts that end an answer.
        parameters: others, by Ollama's names.
    """
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in parameters.items()]
    return "\n".join(lines) + "\n"
