"""An answer as text while its tokens come in.

In: ids, one by one. Out: pieces of text that nothing which follows will change: half a character waits for the rest of
it, and the beginning of a stop text until it is clear that it is none.
"""

from __future__ import annotations

from collections.abc import Sequence

from fitune.data.encode import Encoder

HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class Speech:
    """The text of one answer.

    Args:
        encoder: the model's; it says which special tokens are shown.
        stops: texts that end the answer and are no part of it.

    Attributes:
        text: all that was handed out.
        stopped: a stop text came; nothing is added any more.
    """

    def __init__(self, encoder: Encoder, stops: Sequence[str] = ()) -> None:
        self.encoder, self.stops = encoder, [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.text, self.stopped = "", False
        self._whole = ""  # of all whole characters so far
        self._from = self._to = 0  # ids before _to are in _whole; those from _from on are read with what follows them

    def add(self, token: int) -> str:
        """The text that a token adds."""
        if self.stopped:
            return ""
        self.ids.append(token)
        piece = self._next()
        if piece.endswith(HALF):
            return ""
        return self._more(piece)

    def end(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        shown = self._more(self._next())
        rest = self._whole[len(self.text) :]
        self.text = self._whole
        return shown + rest if not self.stopped else shown

    def _next(self) -> str:
        """The text of the ids that are not in `_whole`."""
        known = self.encoder.text(self.ids[self._from : self._to])
        return self.encoder.text(self.ids[self._from :])[len(known) :]

    def _more(self, piece: str) -> str:
        longest = max(map(len, self.stops), default=0)
        start = max(0, len(self._whole) - longest + 1)
        self._whole += piece
        self._from, self._to = self._to, len(self.ids)
        found = [at for stop in self.stops if (at := self._whole.find(stop, start)) >= 0]
        if found:
            self._whole, self.stopped = self._whole[: min(found)], True
        safe = self._whole if self.stopped else self._whole[: len(self._whole) - self._held()]
        shown = safe[len(self.text) :]
        self.text = safe
        return shown

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        return max((beginning(self._whole, stop) for stop in self.stops), default=0)


def beginning(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of another."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
