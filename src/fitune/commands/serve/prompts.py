"""What a client asks, as the ids of a prompt: rendered and encoded as in training.

In: checked requests. Out: ids; Refused names the message that the template has no place for.
"""

from __future__ import annotations

from collections.abc import Sequence

from fitune.commands.serve.asked import AskedChat
from fitune.commands.serve.errors import Refused
from fitune.core.errors import FituneError
from fitune.core.records import Conversation
from fitune.data.conversations import SURROGATE, asked_of
from fitune.data.fields import FieldError
from fitune.models.load import Tuned


def of_chat(tuned: Tuned, asked: AskedChat) -> tuple[Conversation, list[int]]:
    """The question, and the ids of its prompt.

    Raises:
        Refused: the messages are no conversation, or the template has no place for them.
    """
    tools = [] if asked.tool_choice == "none" else asked.tools or []
    try:
        question = asked_of([_named(turn) for turn in asked.messages], tools)
        return question, tuned.encoder.prompt(question.messages, question.tools)
    except FieldError as error:
        text = "; ".join(part for part in (f"{error.field}: {error.what}", _more(error)) if part)
        raise Refused(400, text, param=error.field.split(".")[0] or "messages") from None
    except FituneError as error:
        raise Refused(400, str(error), param="messages") from None


def _named(turn: dict[str, object]) -> dict[str, object]:
    """OpenAI calls the system's role developer too."""
    return {**turn, "role": "system"} if turn.get("role") == "developer" else turn


def _more(error: FieldError) -> str:
    parts = {"received": error.received, "expected": error.expected, "fix": error.fix}
    return "; ".join(f"{name}: {value}" for name, value in parts.items() if value is not None)


def of_text(tuned: Tuned, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a bare prompt; special tokens that a text names are parsed, as whoever renders a template himself
    needs it. Begins with the tokenizer's first token, where it has one.

    Raises:
        Refused: an id is none of the vocabulary.
    """
    encoder = tuned.encoder
    if not isinstance(prompt, str):
        rows = tuned.model.get_input_embeddings().weight.shape[0]
        if wrong := [i for i in prompt if not 0 <= i < rows]:
            raise Refused(400, f"prompt: {wrong[0]} is no id; expected: 0 to {rows - 1}", param="prompt")
        return list(prompt)
    if SURROGATE.search(prompt):
        raise Refused(400, "prompt: half a character (a lone surrogate)", param="prompt")
    ids = [int(i) for i in encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    before = [encoder.bos_id] if encoder.bos_id is not None and ids[:1] != [encoder.bos_id] else []
    return [*before, *ids]
