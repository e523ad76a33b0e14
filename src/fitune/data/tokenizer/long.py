"""Very long texts in parts, because the tokenizers library takes some 250 bytes for each token of a text at once.

In: a text of millions of characters. Out: parts of it whose ids, one after the other, are the ids of the whole. A text
is cut only between two characters that no token of the vocabulary joins, written as they are or as bytes: neither a
merge of BPE nor a path of Unigram can then join the two sides. What else a tokenizer may look at (its
normalizer, the split into words) is local, and tried at each cut on the text around it. A text without such a place
stays whole.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

LONG = 2**18  # characters of a part, about
AROUND = 256  # characters on each side of a cut that are tried
TRIED = 2000  # places for each cut
BETWEEN = "\0"  # of two tokens

FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")  # of normalizers

Ids = Callable[[str], list[int]]


class Joints:
    """Where the tokens of a vocabulary do not go across.

    Args:
        vocabulary: its tokens, as the tokenizer writes them.
    """

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self._tokens = BETWEEN + BETWEEN.join(vocabulary) + BETWEEN
        self._known: dict[str, bool] = {}

    def apart(self, left: str, right: str) -> bool:
        """Does no token hold the end of one character and the beginning of the next?"""
        pair = left + right
        if pair not in self._known:
            self._known[pair] = _plain(left, right) and not self._joined(left, right)
        return self._known[pair]

    def _joined(self, left: str, right: str) -> bool:
        if any(one + other in self._tokens for one in _written(left) for other in _written(right)):
            return True
        end, begin = _as_bytes(left), _as_bytes(right)[0]
        inside = (BETWEEN + end[at:] + begin in self._tokens for at in range(1, len(end)))
        return end + begin in self._tokens or any(inside)


def _written(character: str) -> tuple[str, ...]:
    """As a vocabulary of characters has it: SentencePiece writes a space as ▁."""
    return (" ", "▁") if character == " " else (character,)


def _as_bytes(character: str) -> str:
    """As a vocabulary of bytes has it: a character for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return str(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(character)[0][0])


def _plain(left: str, right: str) -> bool:
    """Two characters that no normalizer makes one, and no rule counts together: a space only before a word, digits not
    at all."""
    if left.isspace() or (right.isspace() and right != " ") or (left.isnumeric() and right.isnumeric()):
        return False
    return all(
        unicodedata.normalize(form, left + right)
        == unicodedata.normalize(form, left) + unicodedata.normalize(form, right)
        for form in FORMS
    )


def parts(text: str, joints: Joints, first: Ids, later: Ids) -> Iterator[list[int]]:
    """The ids of a text, part by part.

    Args:
        text: any; short ones are one part.
        joints: of the tokenizer's vocabulary.
        first: the ids of a text as it stands.
        later: the ids of a text that continues another.
    """
    begin, ids = 0, first
    while begin < len(text):
        end = _end(text, begin, joints, ids, later)
        yield ids(text[begin:end])
        begin, ids = end, later


def _end(text: str, begin: int, joints: Joints, ids: Ids, later: Ids) -> int:
    """Where a part ends: the next place at which both sides can be encoded by themselves; else the end of the text."""
    for start in range(begin + LONG, len(text) - 1, LONG):
        for at in range(start, min(start + TRIED, len(text) - 1)):
            if text[at] == " " and text[at + 1].isspace():
                continue
            if not joints.apart(text[at - 1], text[at]):
                continue
            left, right = text[max(0, at - AROUND) : at], text[at : at + AROUND]
            if ids(left + right) == [*ids(left), *later(right)]:
                return at
    return len(text)
