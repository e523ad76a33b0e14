"""Columns of a row beside its conversation: pictures, labels, weights, thoughts, and names that no format knows.

In: a row. Out: what refuses it, what it weighs in the loss, and a proposal of `--map` for columns of unknown names. A
column that means something else than its name says is left out with `--map COLUMN=ignore`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fitune.errors import shorten
from fitune.fields import FieldError, Row, missing
from fitune.turns import LEAVE_OUT, THOUGHTS, no_media, weight_of

IGNORE = "ignore"  # what a column is mapped to that is to be left alone
MEDIA = ("image", "images", "image_path", "image_url", "video", "videos", "audio", "audios")
LABELS = ("label", "kto_tag")  # of KTO: is the answer a good one? Only where true or false; else it is any column
FLAGS = ("loss", "train", "trainable")  # of a row, where true or false: a number may be a loss that was measured
WEIGHTS = ("weight", "loss_weight", "loss_scale", "sample_weight")  # of a row, where a number
FIELDS = frozenset({IGNORE, *THOUGHTS, *FLAGS, *WEIGHTS, *LABELS})  # what a column may be mapped to, in any format
MOST = 10.0  # a weight above it is more likely that of a parcel
OTHERWISE = "if the column means something else: --map {}=ignore"

# Parts of names that tell a question from an answer, in the order in which they are looked for
ASKED = ("question", "query", "prompt", "instruct", "input", "request", "problem", "ask", "user", "human", "source",
         "问", "题", "指令", "输入", "提示", "content", "title")  # fmt: skip
SAID = ("answer", "response", "completion", "output", "reply", "target", "solution", "summary", "assistant",
        "答", "回复", "输出", "摘要")  # fmt: skip


def refuse(row: Row) -> None:
    """Refuse rows that plain tuning would do the contrary with, or half.

    Raises:
        FieldError: pictures, sound or films; an answer that is marked as bad.
    """
    for name in MEDIA:
        if not missing(row.get(name)) and row[name] not in ("", [], {}):
            error = no_media(name, row[name])
            error.fix = f"{LEAVE_OUT}; {OTHERWISE.format(name)}"
            raise error
    for name in LABELS:
        if _boolean(row.get(name)) is False:
            raise FieldError(
                name,
                "the answer is marked as a bad one (false), which plain tuning would train",
                received=shorten(row[name]),
                expected="true, or no label",
                fix=f"{LEAVE_OUT}; {OTHERWISE.format(name)}",
            )


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


def weight(row: Row) -> float:
    """How much of a row the loss sees.

    Raises:
        FieldError: a number that is no weight.
    """
    product = 1.0
    for name in FLAGS:
        flag = _boolean(row.get(name))
        product *= 1.0 if flag is None else float(flag)
    for name in WEIGHTS:
        value = _number(row.get(name))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or missing(value):
            continue  # text: any column
        try:
            number = weight_of(value, name, name)
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
        product *= number
    return product


def used(row: Row, *, flat: bool) -> list[str]:
    """The columns that are obeyed beside a row's conversation; flat: its prompt and its answer are columns too."""
    flags = [name for name in (*FLAGS, *LABELS) if _boolean(row.get(name)) is not None]
    weights = [name for name in WEIGHTS if isinstance(_number(row.get(name)), (int, float))]
    return [*flags, *weights, *(name for name in THOUGHTS if flat and isinstance(row.get(name), (str, list)))]


def taken(row: Row, *, flat: bool) -> list[str]:
    """What a user should know of how such columns were understood, for a note with counts."""
    found = []
    for name in used(row, flat=flat):
        if name in LABELS:
            found.append(f"with {name} true: trained as good answers")
        elif name in THOUGHTS:
            found.append(f"with a column {name!r}: taken as the thought before the answer")
        elif _boolean(row[name]) is not True:
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
