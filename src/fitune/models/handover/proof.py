"""The proof that a written chat template gives the ids of training, by plain transformers.

In: the run's encoder, the tokenizer as transformers loads it. Out: the Jinja text to write, and what was compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fitune.core.errors import FituneError
from fitune.core.records import Conversation, Message
from fitune.data.encode import Encoder
from fitune.data.templates import ChatTemplate, PieceTemplate, thoughts
from fitune.data.templates.as_jinja import Frame, as_jinja, quoted
from fitune.data.templates.base import arguments, in_parts, joined
from fitune.data.templates.rendering import SAID
from fitune.models.handover.conversations import CONVERSATIONS, EDGES, LEAST, TOOL, talk

PIECES = "fitune_prompt.jinja"  # the prompt with a mark between its pieces, where no chat_template can be written
BORDER = "\ue000"  # the mark: a character for private use
Jinja = str | dict[str, str]  # a chat template, or several by name


@dataclass(frozen=True)
class Proof:
    """Which conversations have the ids of training. without: kinds of conversations that the text refuses."""

    same: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """All that the text takes are the same, ten at least."""
        return not self.differing and len(self.same) >= LEAST


def best(encoder: Encoder, plain: object) -> tuple[Jinja | None, Proof, str]:
    """The Jinja text to write, or None; its proof, or that of the best attempt; why there is none."""
    template = encoder.template
    if isinstance(template, ChatTemplate):
        changed = template.date is not None or template.options or template.moves_system
        own = template.for_others() if changed else template.jinja
        return own, prove(own, plain, encoder), ""
    if not isinstance(template, PieceTemplate):
        return None, Proof(), "its control ids are written by no text"
    attempts = []
    for space in ("", " ") if encoder.bos_id is not None else ("",):
        proof = prove(as_jinja(template, _frame(encoder, space)), plain, encoder)
        without = _to_leave_out(proof)
        text = as_jinja(template, _frame(encoder, space, without))
        again = prove(text, plain, encoder, without)
        if again.holds:
            return text, again, ""
        attempts.append(proof)
    best = max(attempts, key=lambda proof: len(proof.same))
    tried = len(best.same) + len(best.differing)
    reason = (
        f"as one text, {len(best.differing)} of {tried} conversations get other ids than in training, where prompt and "
        f"text are encoded apart (tokens merge over the border), the first: {best.differing[0]}"
    )
    return None, best, reason


def _frame(encoder: Encoder, space: str = "", without: Sequence[str] = (), border: str = "") -> Frame:
    own = str(encoder.tokenizer.convert_ids_to_tokens(encoder.stop_id))
    stop = "eos_token" if own == encoder.tokenizer.eos_token else quoted(own)
    kind = encoder.thought_tags
    thought = None
    if kind is not None:
        before, _, behind = thoughts.written(SAID, "", kind).partition(SAID)
        thought = (before, behind)
    return Frame(stop, encoder.bos_id is not None, space, border, without, thought)


def _to_leave_out(proof: Proof) -> list[str]:
    """The kinds of conversations that are the fault: those of conversations with no other kind in them."""
    kinds = {name: kind for name, kind, _ in CONVERSATIONS}
    return sorted(
        {kind for name in proof.differing for kind in kinds[name] if len(kinds[name]) == 1 or kind == "tools"}
    )


def prove(jinja: Jinja, plain: object, encoder: Encoder, without: Sequence[str] = ()) -> Proof:
    """Compare ids, conversation by conversation; those that the run's template has no place for are left out.

    Args:
        jinja: the Jinja text, or several by name.
        plain: the tokenizer as plain transformers loads it.
        encoder: of the run.
        without: kinds of conversations that the text must refuse.
    """
    same: list[str] = []
    differing: list[str] = []
    for name, kinds, conversation in CONVERSATIONS:
        try:
            expected = _expected(encoder, conversation)
        except FituneError:
            continue
        if expected is None:
            continue
        found = rendered(jinja, plain, conversation, encoder)
        if kinds & set(without):
            differing += [name] if found is not None else []
        else:
            (same if found == expected else differing).append(name)
    return Proof(same, differing, list(without))


def _expected(encoder: Encoder, conversation: Conversation) -> list[int] | None:
    """The ids of training: of a prompt, or of a conversation with its answer where templates of ours end it."""
    if conversation.messages[-1].role != "assistant":
        return encoder.prompt(conversation.messages, conversation.tools)
    sample = encoder.sample(conversation) if isinstance(encoder.template, PieceTemplate) else None
    return None if sample is None else [int(i) for i in sample.ids]


def rendered(
    jinja: Jinja, plain: Any, conversation: Conversation, encoder: Encoder, *, tokenize: bool = True, **how: Any
) -> Any:
    """What transformers makes of a conversation by a chat template: ids, or a text; None: the template refuses it."""
    template = encoder.template
    in_place = isinstance(template, PieceTemplate)
    parts = isinstance(template, ChatTemplate) and template.in_parts
    messages = [as_message(m, context=in_place) for m in conversation.messages]
    plain.chat_template = jinja  # of several, transformers takes the one for tools where there are some
    try:
        return plain.apply_chat_template(
            [in_parts(message) for message in messages] if parts else messages,
            tools=[dict(tool) for tool in conversation.tools] or None,
            add_generation_prompt=conversation.messages[-1].role != "assistant",
            tokenize=tokenize,
            return_dict=False,
            **how,
        )
    except Exception:  # whatever a template or a tokenizer raises: these are not the same ids
        return None


def as_message(message: Message, *, context: bool) -> dict[str, object]:
    """A message as transformers takes it. context: in a place of its own, which templates of fitune's have."""
    values: dict[str, Any] = {"role": message.role, "content": message.content if context else joined(message)}
    if context and message.context:
        values["context"] = message.context
    if message.thought:
        values |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.thought)
    if message.tool_calls:
        values["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments(call)}}
            for call in message.tool_calls
        ]
    if message.call_id:
        values |= {"tool_call_id": message.call_id, "name": message.name}
    return values


def exceptions(jinja: Jinja, plain: Any, encoder: Encoder) -> list[str]:
    """What a user may type that others encode otherwise than fitune, whatever the template."""
    found = []
    named = next((t for t in plain.all_special_tokens if plain.convert_tokens_to_ids(t) in encoder.stop_ids), None)
    typed, expected = written(encoder, talk(f"Say {named} now"))
    if named is not None and rendered(jinja, plain, typed, encoder) != expected:
        literal = rendered(jinja, plain, typed, encoder, sanitize_control_tokens=True) == expected
        unless = ", unless `sanitize_control_tokens=True` is given" if literal else ""
        found.append(
            f"the name of a control token, such as `{named}`, in a message: text in fitune, the control token in "
            f"transformers{unless}"
        )
    differing = [
        name
        for name, (edge, ids) in {name: written(encoder, one) for name, one in EDGES.items()}.items()
        if rendered(jinja, plain, edge, encoder) != ids
    ]
    return [
        *found,
        *([f"{', '.join(differing)}: it becomes one token with what stands beside it"] if differing else []),
    ]


def written(encoder: Encoder, conversation: Conversation) -> tuple[Conversation, list[int] | None]:
    """A conversation and its prompt, with a tool where the template fails without one; None where it fails so too."""
    for one in (conversation, replace(conversation, tools=(TOOL,))):
        try:
            return one, encoder.prompt(one.messages, one.tools)
        except FituneError:
            continue
    return conversation, None


def write_pieces(folder: Path, encoder: Encoder, plain: object) -> bool:
    """The prompt with a mark between its pieces, where encoding these apart gives the ids of training."""
    if not isinstance(encoder.template, PieceTemplate):
        return False
    jinja = as_jinja(encoder.template, _frame(encoder, border=BORDER))
    for _, _, conversation in CONVERSATIONS:
        try:
            expected = _expected(encoder, conversation)
        except FituneError:
            continue
        text = rendered(jinja, plain, conversation, encoder, tokenize=False)
        if text is None or _by_pieces(plain, text) != expected:
            return False
    (folder / PIECES).write_text(jinja, encoding="utf-8", newline="\n")
    return True


def _by_pieces(plain: Any, text: str) -> list[int]:
    pieces = text.split(BORDER)
    return [i for piece in pieces for i in plain(piece, add_special_tokens=False)["input_ids"]]
