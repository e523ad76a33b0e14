"""Columns of a row beside its conversation: pictures, labels, weights, thoughts, and names that no format knows.

In: a row. Out: what refuses it, what it weighs in the loss, and a proposal of `--map` for columns of unknown names. A
column that means something else than its name says is left out with `--map COLUMN=ignore`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from fitune.core.errors import shorten
from fitune.core.records import Message
from fitune.data.fields import FieldError, Row, missing
from fitune.data.turns import FLAGS as TURN_FLAGS
from fitune.data.turns import LEAVE_OUT, MEDIA_KEY, THOUGHTS, no_media, weight_of

IGNORE = "ignore"  # what a column is mapped to that is to be left alone
# Of KTO and its kin: is the answer a good one? Only where the value is one of MARKS; else it is any column
BAD_LABELS = ("undesirable", "is_bad", "is_undesirable", "is_rejected")  # true says the contrary
LABELS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "is_good", "is_preferred", "is_positive",
          *BAD_LABELS)  # fmt: skip
MARKS = {  # true is 1 and false is 0
    1: True, 0: False, -1: False, "true": True, "false": False, "1": True, "0": False, "-1": False,
    "1.0": True, "0.0": False, "desirable": True, "undesirable": False, "good": True, "bad": False,
    "chosen": True, "rejected": False, "thumbs_up": True, "thumbs_down": False,
}  # fmt: skip
FLAGS = ("loss", *TURN_FLAGS)  # of a row, where true or false: a number may be a loss that was measured
WEIGHTS = ("weight", "loss_weight", "loss_scale", "loss_mask", "sample_weight")  # of a row, where a number or a flag
REJECTED = ("rejected", "rejected_response", "rejected_messages")  # the other answer of a row of preferences
FIELDS = frozenset(
    {IGNORE, *THOUGHTS, *FLAGS, *WEIGHTS, *LABELS, *REJECTED}
)  # what a column may be mapped to, in any format
MOST = 10.0  # a weight above it is more likely that of a parcel
OTHERWISE = "if the column means something else: --map {}=ignore"

# Parts of names that mark a question or an answer, in the order in which they are looked for
ASKED = ("question", "query", "prompt", "instruct", "input", "request", "problem", "ask", "user", "human", "source",
         "问", "题", "指令", "输入", "提示", "content", "article", "document", "sentence", "title")  # fmt: skip
SAID = ("answer", "response", "completion", "output", "reply", "target", "solution", "summary", "highlight", "headline",
        "sentiment", "assistant",
        "答", "回复", "输出", "摘要")  # fmt: skip
Q_AND_A = re.compile(r"(^|[_\s.-])q([_\s.-]|$)"), re.compile(r"(^|[_\s.-])a([_\s.-]|$)")  # q_text and a_text


def refuse(row: Row, *, marked: bool = False) -> None:
    """Refuse rows that plain tuning would do the contrary with, or half.

    Args:
        row: under the names that are known.
        marked: answers that are marked as bad are wanted.

    Raises:
        FieldError: pictures, sound or films; an answer that is marked as bad.
    """
    for name, value in row.items():
        if isinstance(name, str) and MEDIA_KEY.fullmatch(name) and not missing(value) and value not in ("", [], {}):
            error = no_media(name, value)
            error.fix = f"{LEAVE_OUT}; {OTHERWISE.format(name)}"
            raise error
    for name in () if marked else LABELS:
        if good(row, name) is False:
            shown = row[name] if isinstance(row[name], str) else str(row[name]).lower()
            raise FieldError(
                name,
                f"the answer is marked as a bad one ({shown}), which plain tuning would train",
                received=shorten(row[name]),
                expected="true, or no label",
                fix=f"{LEAVE_OUT}; {OTHERWISE.format(name)}",
            )


def good(row: Row, name: str) -> bool | None:
    """What a label says of the answer; None: it is no label."""
    value = row.get(name)
    if isinstance(value, str):
        value = value.strip().lower().replace(" ", "_").replace("-", "_" if len(value.strip()) > 2 else "-")
    mark = MARKS.get(value) if isinstance(value, (str, bool, int, float)) else None
    return mark if mark is None or name not in BAD_LABELS else not mark


def _boolean(value: object) -> bool | None:
    """True and false, as text too (a cell of a CSV file); anything else is no flag."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _number(value: object) -> object:
    """Text that is a number, as that number; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _weighs(name: str, value: object) -> bool:
    """Does a column say how much of its row the loss sees? Text and objects say nothing: they are any column."""
    if isinstance(value, list):
        return bool(value) and (name != "loss" or all(isinstance(one, bool) for one in value))
    if _boolean(value) is not None:
        return True
    number = _number(value)
    if name in WEIGHTS:
        return isinstance(number, (int, float))
    return name in TURN_FLAGS and isinstance(number, (int, float)) and number in (0, 1)


def _columns_of_weights(row: Row) -> list[str]:
    return [name for name in dict.fromkeys((*FLAGS, *WEIGHTS)) if _weighs(name, row.get(name))]


def weighted(row: Row, messages: list[Message]) -> list[Message]:
    """The messages with the weights that columns of their row give them: one for all, or a list with one for each turn
    or each answer.

    Raises:
        FieldError: a number that is no weight, or a list of another length.
    """
    for name in _columns_of_weights(row):
        value = row[name]
        several = value if isinstance(value, list) else [value] * len(messages)
        said = [n for n, message in enumerate(messages) if message.role == "assistant"]
        if len(several) == len(messages):
            several = [several[n] for n in said]
        if len(several) != len(said):
            raise FieldError(
                name,
                "a list of weights that fits neither the turns nor the answers",
                received=f"{len(several)} entries",
                expected=f"{len(messages)} (turns) or {len(said)} (answers)",
                fix=f"{LEAVE_OUT}; {OTHERWISE.format(name)}",
            )
        messages = list(messages)
        for n, one in zip(said, several, strict=True):
            messages[n] = replace(messages[n], weight=messages[n].weight * _factor(name, one))
    return messages


def _factor(name: str, value: object) -> float:
    """A column's value as a weight.

    Raises:
        FieldError: it is none.
    """
    flag = _boolean(value)
    if flag is not None:
        return float(flag)
    try:
        number = weight_of(_number(value), name, name)
    except FieldError as error:
        error.fix = OTHERWISE.format(name)
        raise
    if number > MOST:
        raise FieldError(
            name,
            "no weight of the loss",
            received=shorten(value),
            expected=f"a number from 0 (context only) to {MOST:g}",
            fix=OTHERWISE.format(name),
        )
    return number


def used(row: Row, *, flat: bool) -> list[str]:
    """The columns that are obeyed beside a row's conversation; flat: its prompt and its answer are columns too."""
    labels = [name for name in LABELS if good(row, name) is not None]
    thoughts = [name for name in THOUGHTS if flat and isinstance(row.get(name), (str, list))]
    return [*_columns_of_weights(row), *labels, *thoughts]


def taken(row: Row, *, flat: bool, marked: bool = False) -> list[str]:
    """What a user should know of how such columns were understood, for a note with counts.

    Args:
        row: under the names that are known.
        flat: as for `used`.
        marked: labels say which answers are good and which are bad.
    """
    found = []
    for name in used(row, flat=flat):
        value = row[name]
        if name in LABELS and marked:
            kind = "good" if good(row, name) else "bad"
            found.append(f"with {name} {str(value).strip().lower()}: taken as {kind} answers")
        elif name in LABELS:
            found.append(f"with {name} {str(value).strip().lower()}: trained as good answers")
        elif name in THOUGHTS:
            found.append(f"with a column {name!r}: taken as the thought before the answer")
        elif isinstance(value, list):
            found.append(f"with a column {name!r}: taken as the weights of its turns, or --map {name}=ignore")
        elif _boolean(value) is not True:
            found.append(f"with a column {name!r}: taken as the row's weight in the loss, or --map {name}=ignore")
    return found


def sizes(row: Row) -> dict[str, int]:
    """Of each column that holds a text, its length."""
    return {key: len(value) for key, value in row.items() if isinstance(key, str) and isinstance(value, str)}


def propose(lengths: Mapping[str, int]) -> str:
    """A `--map` for columns of unknown names: by parts of their names, else by their texts' lengths.

    Args:
        lengths: of each column that holds text, the length of its texts together.
    """
    texts = {name: size for name, size in lengths.items() if size}
    if not texts:
        return "--map COLUMN=prompt COLUMN=completion"
    if len(texts) == 1:
        return f"--map {_quoted(next(iter(texts)))}=text"
    letters = [next((name for name in texts if letter.search(name.lower())), None) for letter in Q_AND_A]
    if letters[0] and letters[1]:
        return f"--map {_quoted(letters[0])}=prompt {_quoted(letters[1])}=completion"
    free = _free(texts, ASKED) or list(texts)
    said = _named(texts, SAID) or max(reversed(free), key=lambda name: texts[name])  # of equal ones the last
    rest = {name: size for name, size in texts.items() if name != said}
    asked = _named(rest, ASKED) or max(rest, key=lambda name: rest[name])
    return f"--map {_quoted(asked)}=prompt {_quoted(said)}=completion"


def _named(texts: Mapping[str, int], parts: tuple[str, ...]) -> str | None:
    return next((name for part in parts for name in texts if part in name.lower()), None)


def _free(texts: Mapping[str, int], parts: tuple[str, ...]) -> list[str]:
    return [name for name in texts if not any(part in name.lower() for part in parts)]


def _quoted(name: str) -> str:
    return f"'{name}'" if any(c.isspace() or c in '"$&;|<>()*?' for c in name) else name
