"""Where the texts of a conversation stand in what a Jinja template makes of it.

In: a text of a message. Out: the same text between marks that no text contains (Unicode's noncharacters), with the
special tokens that somebody typed into it broken by another mark. The template carries the marks along, so its own
special tokens and those of its users differ, and a rendering is split into segments without a search.

Between two special tokens the template's words and a user's are encoded as one text, as `tokenize=True` of
transformers does; so the ids are those of a server that renders the same conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from fitune.core.records import Segment
from fitune.data.tokenizer.interface import Tokenizer

OPEN, TURN, CLOSE, BREAK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"  # OPEN 12 TURN a text of message 12 CLOSE
_MARKS = re.compile(f"{OPEN}[0-9]+{TURN}|[{CLOSE}{BREAK}]")
_ESCAPED = re.compile(r"\\u(fdd[0-3])")
_OPENED = re.compile(f"{OPEN}([0-9]+){TURN}")


class Marks:
    """Marks texts, and reads them out of a rendering.

    Args:
        tokenizer: its special tokens are those that must not be typed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
        named = {token.content: token for token in added}
        names = sorted(set(named) | {token for token in tokenizer.all_special_tokens if token}, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, names)) or "(?!)")
        patterns = []
        for name in names:
            token = named.get(name)
            before, after = (r"\s*" if getattr(token, side, False) else "" for side in ("lstrip", "rstrip"))
            patterns.append(before + re.escape(name) + after)
        special = "|".join(patterns) or "(?!)"
        self._parts = re.compile(f"({OPEN}[0-9]+{TURN}|{CLOSE}|{special})")
        self._special = re.compile(f"(?:{special})")

    def broken(self, text: str) -> str:
        """The text with special tokens in it broken, so that they stay text."""
        return self._typed.sub(lambda found: f"{found[0][0]}{BREAK}{found[0][1:]}", text)

    def wrapped(self, text: str, turn: int, *, edges: bool = False) -> str:
        """The text between marks.

        Args:
            text: somebody's.
            turn: of which message.
            edges: blanks at its ends stand inside too; else outside, where templates that strip texts find them.
        """
        inner = text if edges else text.strip()
        if not inner.strip():
            return text
        at = text.index(inner)
        return f"{text[:at]}{OPEN}{turn}{TURN}{self.broken(inner)}{CLOSE}{text[at + len(inner) :]}"

    def everywhere(self, value: object) -> Any:
        """A JSON value with every text in it broken: arguments of calls, descriptions of tools."""
        if isinstance(value, str):
            return self.broken(value)
        if isinstance(value, dict):
            return {self.broken(str(key)): self.everywhere(one) for key, one in value.items()}
        return [self.everywhere(one) for one in value] if isinstance(value, list) else value

    def first_special(self, text: str) -> str | None:
        """The special token that a text begins with, blanks before it or not."""
        found = self._special.match(text.lstrip())
        return found[0].strip() if found else None

    def last_special(self, text: str) -> tuple[str, str] | None:
        """The special token that ends a text, with the text before it; nothing of a message may stand behind it."""
        found = next(reversed(list(self._special.finditer(text))), None)
        if found is None or unmarked(text[found.end() :]).strip():
            return None
        return text[: found.start()], found[0].strip()

    def segments(self, text: str, *, trained: bool, turn: int, role: Callable[[int], str]) -> list[Segment]:
        """A marked text as segments.

        Args:
            text: with its marks.
            trained: is it an answer.
            turn: the message that what stands behind the last text of a user belongs to.
            role: of a message by its turn.
        """
        runs: list[list[Segment]] = [[]]  # each is encoded as one text
        for part, own, special, broken in self._read(text):
            if special:
                runs += [[Segment(part)], []]
            else:
                literal = own is None and not broken
                runs[-1].append(Segment(part, literal=literal, turn=-1 if own is None else own))
        found: list[Segment] = []
        for run in runs:
            mixed = any(not segment.literal for segment in run)
            for n, one in enumerate(run):
                if mixed:
                    found.append(Segment(one.text, one.literal, trained, one.turn, joined=n > 0))
                elif found and found[-1].literal and not found[-1].joined:
                    found[-1] = Segment(found[-1].text + one.text, trained=trained)
                else:
                    found.append(Segment(one.text, trained=trained))
        return _with_turns(found, turn, role)

    def _read(self, text: str) -> list[tuple[str, int | None, bool, bool]]:
        """(text, turn of the message that it is from, is it a special token, did somebody type one into it).

        Arguments of calls and descriptions of tools have no marks of their own, but for special tokens in them.
        """
        found: list[tuple[str, int | None, bool, bool]] = []
        own: int | None = None
        for n, part in enumerate(self._parts.split(text)):
            if n % 2 and (opened := _OPENED.fullmatch(part)):
                own = int(opened[1])
            elif n % 2 and part == CLOSE:
                own = None
            elif plain := unmarked(part):
                found.append((plain, own, bool(n % 2), BREAK in part))
        return found


def _with_turns(segments: Sequence[Segment], last: int, role: Callable[[int], str]) -> list[Segment]:
    """The template's segments belong to the message whose text comes next, or to the last one."""
    out: list[Segment] = []
    turn = last
    for segment in reversed(segments):
        turn = turn if segment.turn < 0 else segment.turn
        out.append(Segment(segment.text, segment.literal, segment.trained, turn, role(turn), joined=segment.joined))
    return out[::-1]


def unmarked(text: str) -> str:
    """Without any marks."""
    return _MARKS.sub("", text)


def shown(text: str) -> str:
    """A rendering whose marks are characters again, where the template wrote texts as JSON in ASCII alone."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text) if _ESCAPED.search(text) else text


def turns(text: str) -> set[int]:
    """The messages whose texts stand in a marked text."""
    return {int(found[1]) for found in _OPENED.finditer(text)}


def start(text: str, turn: int) -> int | None:
    """Where the first text of a message begins."""
    at = text.find(f"{OPEN}{turn}{TURN}")
    return at if at >= 0 else None


def moved(text: str, turn: int, to: int) -> str:
    """A marked text whose marks say another turn."""
    return text.replace(f"{OPEN}{turn}{TURN}", f"{OPEN}{to}{TURN}")
