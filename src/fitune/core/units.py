"""Units of memory, in bytes, and sizes as users write them. In: text. Out: bytes; MIB and GIB stand here once."""

from __future__ import annotations

import re

MIB, GIB = 2**20, 2**30

SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(?:i?B)?\s*", re.IGNORECASE)
UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


def checked_size(value: object) -> object:
    """`20` (GB), `20GB`, `500MB` or `1.5 TB` as text with its unit."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    text = f"{value}GB" if number or (isinstance(value, str) and value.strip().isdecimal()) else value
    found = SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 10**6 <= size_bytes(str(text)) <= 10**15:
        raise ValueError("a size such as 20GB or 500MB")
    return f"{found[1]}{found[2].upper()}B"


def size_bytes(text: str) -> int:
    """Bytes of a size that was checked.

    Example:
        >>> size_bytes("500MB")
        500000000
    """
    found = SIZE.fullmatch(text)
    assert found is not None
    return int(float(found[1]) * UNITS[found[2].upper()])
