"""Rows of preferences: two answers to one prompt, or answers that are marked as good or bad.

In: a row and its format, or conversations as they are read. Out: conversations with the rejected answer beside the
chosen one; of labelled answers (KTO) with an answer to another prompt, which the distance to the reference is estimated
with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from fitune.core.errors import shorten
from fitune.core.records import Conversation, Message
from fitune.data.columns import LABELS, good
from fitune.data.fields import FieldError, Row, missing
from fitune.data.formats import Format, completion
from fitune.data.turns import LEAVE_OUT, ending_in_answer, turns_of

RESPONSE, MESSAGES = "rejected_response", "rejected_messages"  # ms-swift's, beside the whole conversation
SFT = "--objective sft trains the answers of rows without"


def rejected_of(row: Row, fmt: Format) -> list[Message] | None:
    """The whole conversation with the rejected answer; None: the row has none.

    Raises:
        FieldError: a field of it is wrong.
    """
    if fmt.name == "preference" and not missing(row.get("rejected")):
        try:
            return fmt.convert({**row, "chosen": row["rejected"]})
        except FieldError as error:
            error.field = error.field.replace("chosen", "rejected", 1)
            raise
    if not missing(row.get(MESSAGES)):
        return ending_in_answer(turns_of(row[MESSAGES], MESSAGES), MESSAGES)
    if not missing(row.get(RESPONSE)):
        return [*fmt.convert(row)[:-1], *completion(row, RESPONSE)]
    return None


def paired(conversation: Conversation, rejected: Sequence[Message]) -> Conversation:
    """The conversation with the rejected answer beside its own.

    Args:
        conversation: ends in the chosen answer.
        rejected: the whole conversation with the other one.

    Raises:
        FieldError: they are not answers to one prompt.
    """
    chosen = conversation.messages
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), len(chosen))
    fork = min(same, len(chosen) - 1, len(rejected) - 1)
    for name, messages in (("chosen", chosen[fork:]), ("rejected", rejected[fork:])):
        if messages[0].role != "assistant":
            raise FieldError(
                "rejected",
                "chosen and rejected do not answer one prompt",
                received=f"{name} goes on with {messages[0].role}: {shorten(messages[0].content)}",
                expected="the same turns before both answers",
                fix=LEAVE_OUT,
            )
        weights = [message.weight for message in messages if message.role == "assistant"]
        if set(weights) - {0, 1} or not any(weights):
            raise FieldError(
                name,
                "answers of preferences have no weights",
                received=", ".join(f"{weight:g}" for weight in weights),
                expected="1, or 0 for what is context only",
                fix=LEAVE_OUT,
            )
    return replace(conversation, rejected=tuple(rejected[fork:]), fork=fork)


def needs_pair(row: Row) -> FieldError:
    """The error for a row without two answers."""
    return FieldError(
        "rejected",
        "missing (a row of preferences)",
        received=f"the columns {', '.join(map(str, row))}",
        expected="chosen and rejected, each an answer or a whole conversation",
        fix=f"{SFT} rejected ones; --map COLUMN=chosen COLUMN=rejected",
    )


def label_of(row: Row) -> bool | None:
    """Is the answer marked as a good one? None: it is not marked."""
    return next((mark for mark in (good(row, name) for name in LABELS) if mark is not None), None)


def needs_label(row: Row) -> FieldError:
    """The error for a row without a mark."""
    return FieldError(
        "label",
        "missing (an answer that is marked as good or bad)",
        received=f"the columns {', '.join(map(str, row))}",
        expected=f"true or false in one of {', '.join(LABELS)}",
        fix=f"{SFT} labels; --map COLUMN=label",
    )


def unpaired(conversation: Conversation) -> list[Conversation]:
    """The two answers of a row of preferences as a good one and a bad one."""
    alone = replace(conversation, rejected=(), fork=0)
    bad = replace(conversation.other(), rejected=(), fork=0)
    return [replace(alone, desirable=True), replace(bad, desirable=False)]


def mismatched(rows: Iterable[tuple[int, Conversation]]) -> Iterator[tuple[int, Conversation]]:
    """Labelled answers, each with the answer of the nearest row before it that has another prompt (Ethayarajh et al.
    2024, section 4.1: the distance to the reference is estimated with answers to other prompts).

    The first rows take the first answer behind them. A row has none only where all prompts are the same; then its own
    answer stands there.
    """
    waiting: list[tuple[int, Conversation]] = []
    before: list[Conversation] = []  # the last two with different prompts
    for number, row in rows:
        other = next((one for one in reversed(before) if one.prompt() != row.prompt()), None)
        if other is None:
            waiting.append((number, row))
        else:
            yield from ((at, _with(one, row)) for at, one in waiting)
            waiting.clear()
            yield number, _with(row, other)
        before = [*[one for one in before if one.prompt() != row.prompt()][-1:], row]
    yield from ((at, _with(one, one)) for at, one in waiting)


def _with(row: Conversation, other: Conversation) -> Conversation:
    """A row with the last answer of another one behind its own prompt."""
    fork = len(row.prompt())
    answer = next(m for m in reversed(other.messages) if m.role == "assistant")
    return replace(row, rejected=(answer,), fork=fork)


def texts(conversation: Conversation) -> Iterator[Message]:
    """All messages, those of the rejected answer among them."""
    return chain(conversation.messages, conversation.rejected)
