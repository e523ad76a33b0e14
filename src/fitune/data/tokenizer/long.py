"""Very long texts in parts, because the tokenizers library takes some 250 bytes for each token of a text at once.

In: a text of millions of characters. Out: parts of it whose ids, one after the other, are the ids of the whole. A text
is cut only between an ASCII character and a space before a letter or digit, where no token of the vocabulary goes
across: neither a merge of BPE nor a path of Unigram can then join the two sides. What else a tokenizer may look at (its
normalizer, the split into words) is local, and tried at each cut on the text around it. A text without such a place
stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

LONG = 2**20  # characters of a part, about
AROUND = 256  # characters on each side of a cut that are tried
SPACES = " ▁Ġ"  # in a vocabulary: a space, SentencePiece's, that of bytes
PLACE = re.compile(r"(?<=[!-~]) (?=[A-Za-z0-9])")
ACROSS = re.compile(f"[!-~][{SPACES}]")  # vocabularies of bytes write ASCII as it is

Ids = Callable[[str], list[int]]


def separable(vocabulary: Iterable[str]) -> bool:
    """Does no token have a space behind another ASCII character?"""
    return not any(ACROSS.search(token) for token in vocabulary)


def parts(text: str, first: Ids, later: Ids) -> Iterator[list[int]]:
    """The ids of a text, part by part.

    Args:
        text: any; short ones are one part.
        first: the ids of a text as it stands.
        later: the ids of a text that continues another.
    """
    begin, ids = 0, first
    while begin < len(text):
        end = _cut(text, begin + LONG, ids=first, later=later)
        yield ids(text[begin:end])
        begin, ids = end, later


def _cut(text: str, start: int, *, ids: Ids, later: Ids) -> int:
    """Where a part ends: the next place at which both sides can be encoded by themselves; else the end of the text."""
    for place in PLACE.finditer(text, start):
        at = place.start()
        left, right = text[max(0, at - AROUND) : at], text[at : at + AROUND]
        if ids(left + right) == [*ids(left), *later(right)]:
            return at
        if at - start > LONG:
            break
    return len(text)
