"""Which characters of a text a tokenizer drops, and which of its tokens are bytes of characters that it does not have.

In: a tokenizer, a text or ids. Out: counts. A tokenizer may change a text without loss (spaces in front, full-width
letters, case), so texts are compared without what it is used to change.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fitune.data.tokenizer import encode
from fitune.data.tokenizer.interface import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
WHITE = {0x09, 0x0A, 0x0D}  # line breaks and tabs are whole characters of one byte: nothing is missing there
NAMES = {"\n": "line break", "\t": "tab"}


def lost(tokenizer: Tokenizer, text: str, *, literal: bool = False) -> Counter[str]:
    """Characters that are not there any more when the text's ids are decoded, and how often.

    Args:
        tokenizer: whose ids.
        text: any.
        literal: a template's text, in which special tokens are parsed.
    """
    unknown = tokenizer.unk_token_id
    ids = [i for i in encode(tokenizer, text, literal=literal) if i != unknown]
    back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
    return Counter() if back == text else _characters(text) - _characters(back)


def _characters(text: str) -> Counter[str]:
    """Without spaces and what no one sees: tokenizers may drop and add them."""
    counts = Counter(unicodedata.normalize("NFKC", text).casefold())
    seen = (c for c in counts if c in NAMES or unicodedata.category(c)[0] not in "CZ")
    return Counter({c: counts[c] for c in seen})


def named(character: str) -> str:
    """How a character is shown in a sentence."""
    return NAMES.get(character, character)


def byte_tokens(tokenizer: Tokenizer, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each id: is it a byte of a character that has no token of its own?

    Args:
        tokenizer: whose ids.
        ids: looked up one by one, so give each only once.
    """
    return np.array([_is_byte(tokenizer, int(i)) for i in ids], np.bool_)


def _is_byte(tokenizer: Tokenizer, id_: int) -> bool:
    found = BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(id_)))
    if found:
        return int(found[1], 16) not in WHITE
    return "\ufffd" in str(tokenizer.decode([id_]))
