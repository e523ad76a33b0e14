"""Conversations to segments of text: the one place where a prompt gets its shape.

In: messages, and the tools that they may call. Out: a list of Segments, each either a piece of the template or a piece
of the user's text, each with the decision whether it is trained. Training and chat call the same `render`: a
conversation that ends in an answer is a training row, one that does not is a prompt for the model to go on from.

    pieces.py   PieceTemplate, and the table of those that are nothing but pieces of text
    chatglm.py  ChatGLM 1, 2, 3: rounds that are encoded as one text, and roles that are single ids
    jinja.py    ChatTemplate, the tokenizer's own (with marks.py, rendering.py and thoughts.py)
    user.py     a user's own, from a YAML file
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fitune.core.errors import Collector, ConfigError, did_you_mean
from fitune.core.files import expand
from fitune.data.templates import chatglm, jinja, pieces, user
from fitune.data.templates.base import Template
from fitune.data.templates.jinja import ChatTemplate
from fitune.data.templates.pieces import PieceTemplate
from fitune.data.templates.rendering import SystemRole
from fitune.data.tokenizer.interface import Tokenizer

__all__ = ["TABLE", "ChatTemplate", "PieceTemplate", "Template", "choose", "from_dict"]

TABLE: dict[str, Template] = {template.name: template for template in (*pieces.ROWS, *chatglm.ROWS)}


def choose(
    name: str,
    tokenizer: Tokenizer | None,
    *,
    system_role: SystemRole = "auto",
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> Template:
    """The template that a name means for a tokenizer.

    Args:
        name: `auto` (ChatGLM's, or the tokenizer's own, else alpaca), `chat_template` (the tokenizer's own), a name of
            the table, or the path of a YAML file.
        tokenizer: whose own it may be; None: there is none at hand, and the name is neither auto nor chat_template.
        system_role, options, date: of the tokenizer's own, see ChatTemplate.

    Raises:
        ConfigError: the name is unknown, or the YAML file cannot be used; the folder's files contradict each other.
    """
    family = getattr(tokenizer, "family", None)
    own = name in ("auto", "chat_template") and bool(getattr(tokenizer, "chat_template", None))
    own = own and not (name == "auto" and family in TABLE)
    if (options or system_role == "first-user") and not own:
        raise ConfigError(
            "template_options and system_role are for the tokenizer's own chat template",
            received=f"template {name!r}, template_options {dict(options or {})}, system_role {system_role}",
            expected="--template chat_template, and a tokenizer that has one",
            fix="leave them out, or choose that template",
        )
    if name.endswith((".yaml", ".yml")):
        return user.load(expand(name))
    if name == "auto" and (named := getattr(tokenizer, "contradiction", None)):
        kinds = sorted(set(named.values()))
        raise ConfigError(
            f"template: the files of this folder name {' and '.join(kinds)}, whose prompts differ",
            received="; ".join(named),
            expected="one of them",
            fix=" or ".join(f"--template {kind}" for kind in kinds),
        )
    if name == "auto" and family in TABLE:
        return TABLE[family]  # ChatGLM's ids cannot be written as text, so not by a Jinja template either
    if name in ("auto", "chat_template"):
        if tokenizer is not None and tokenizer.chat_template:
            template = jinja.of_tokenizer(tokenizer, system_role=system_role, options=options, date=date)
            _check_options(options or {}, template)
            return template
        if name == "chat_template":
            raise ConfigError("template 'chat_template': this tokenizer has none", fix="name one: --template alpaca")
        return TABLE["alpaca"]
    if name not in TABLE:
        known = ["auto", "chat_template", *TABLE]
        raise ConfigError(
            f"unknown template {name!r}",
            received=name,
            expected=f"{', '.join(known)}, or the path of a .yaml file",
            fix=did_you_mean(name, known),
        )
    return TABLE[name]


def _check_options(options: Mapping[str, object], template: ChatTemplate) -> None:
    """Refuse options that the template never reads: they would change nothing.

    Raises:
        ConfigError: each of them is named, with the nearest that it reads.
    """
    known = template.reads()
    problems = Collector()
    for option in options:
        if option not in known:
            problems.problems.append(
                ConfigError(
                    f"template_options: the chat template never reads {option!r}",
                    received=f"{option}={options[option]}",
                    expected=", ".join(sorted(known)) or "nothing: it reads no options",
                    fix=did_you_mean(option, known) or "leave it out",
                )
            )
    problems.raise_any()


def from_dict(values: dict[str, Any], tokenizer: Tokenizer) -> Template:
    """The template that a run folder stores.

    Raises:
        ConfigError: it was stored by another version of fitune.
    """
    values = dict(values)
    kind = values.pop("kind", None)
    readers: dict[str, Callable[[], Template]] = {
        "chat_template": lambda: ChatTemplate(values.pop("jinja"), tokenizer, values.pop("stop"), **values),
        "pieces": lambda: PieceTemplate(**values),
        "rounds": lambda: chatglm.RoundTemplate(**values),
        "roles": lambda: chatglm.RoleTemplate(**values),
    }
    try:
        return readers[str(kind)]()
    except (KeyError, TypeError) as error:
        raise ConfigError(
            "the stored template cannot be read", received=f"kind {kind!r}, {error}", expected=", ".join(readers)
        ) from error
