"""Values of a row: what a field holds, or what is wrong with it.

In: a row and the name of a field. Out: its text or list, or a FieldError, to which `formats` adds file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from fitune.core.errors import DataError, FituneError, shorten
from fitune.core.records import Conversation

Row = Mapping[str, Any]  # what a file has, of whatever format
Turn = Mapping[str, Any]  # one turn of its conversation, by whoever's names


class FieldError(Exception):
    """A field of a row is wrong; `to_conversation` adds file and line."""

    def __init__(
        self, field: str, what: str, received: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.field, self.what, self.received, self.expected, self.fix = field, what, received, expected, fix
        super().__init__(what)


def missing(value: object) -> bool:
    """Null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: Row, field: str, *, required: bool = True) -> str:
    """A text; where it is not required, what is missing is empty."""
    value = row.get(field)
    if missing(value) and not required:
        return ""
    if not isinstance(value, str):
        expected = f'a string ("{value}")' if isinstance(value, (int, float)) and not missing(value) else "a string"
        raise FieldError(field, "not a text", received=shorten(value), expected=expected)
    return value


def parsed(value: object, where: str, expected: str) -> Any:
    """The value of JSON text (as CSV cells and many data sets hold it); other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise FieldError(where, "not JSON", received=shorten(value), expected=expected) from None


def listed(value: object, where: str, expected: str) -> list[Any]:
    """A list, or the JSON text of one; nothing is an empty one."""
    value = [] if missing(value) or value == "" else parsed(value, where, expected)
    if not isinstance(value, list):
        raise FieldError(where, "not a list", received=shorten(value), expected=expected)
    return value


def in_row(error: FituneError, row: Conversation) -> DataError:
    """The error with the place of its row."""
    if isinstance(error, DataError) and error.file is not None:
        return error
    where = row.source
    return DataError(
        error.what,
        file=where.file if where else None,
        line=where.line if where else None,
        received=error.received,
        expected=error.expected,
        fix=error.fix,
    )
