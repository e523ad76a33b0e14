"""What reaches a terminal: texts that cannot command it, and streams whose failure ends nothing.

In: whatever is printed, names and data of others among it. Out: the same with every control character shown as a
picture of itself, so that an escape sequence in a file's name, a row or a model's answer moves no cursor and sets no
title; and a standard output that may be closed, full or gone (`| head`) while the work behind it goes on.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fitune.core.errors import FituneError

KEPT = "\n\t"
# one character for one, so that columns and styles stay where they are
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in KEPT}
PICTURES |= {0x7F: "\u2421", **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], "\ufffd")}
GONE = (errno.EPIPE, errno.ESHUTDOWN, errno.EBADF, errno.EIO)  # nobody reads there any more, and nobody asks why


def visible(text: str) -> str:
    """A text with pictures in place of control characters; line breaks and tabs stay.

    Example:
        >>> visible("a\\x1b[2Jb")
        'a␛[2Jb'
    """
    return text if text.isprintable() else text.translate(PICTURES)


class Screen(Console):
    """rich's console, for texts that others wrote: no control character and no :emoji: of theirs gets through.

    Args:
        how: as rich's Console takes it.
    """

    def __init__(self, **how: Any) -> None:
        super().__init__(**{"emoji": False, **how})

    def write_line(self, text: str, style: str | None = None) -> None:
        """A line as it is, that can be copied whole: no markup, no colours of rich's own, no breaks."""
        self.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def render_str(self, text: str, **how: Any) -> Text:
        """See rich; what a width is measured of is what will be shown."""
        return super().render_str(visible(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See rich; its own control sequences are segments of another kind."""
        if isinstance(renderable, Text) and not renderable.plain.isprintable():
            renderable = renderable.copy()
            renderable.plain = visible(renderable.plain)
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else visible(segment.text)
            yield segment if shown is segment.text else Segment(shown, segment.style)


# ---- streams ----


class Lenient(io.RawIOBase):
    """A stream that takes everything: after a failure what is written is dropped.

    Args:
        raw: where to.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw = raw
        self.failed: OSError | None = None
        self.reported = False  # does the user know

    def write(self, data: Any) -> int:
        """See io.RawIOBase; never raises."""
        while self.failed is None:
            try:
                written = self.raw.write(data)
                if written is not None:
                    return written
                select.select([], [self.raw], [])  # a pipe that does not block: wait until there is room
            except (OSError, ValueError) as error:
                self.failed = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
        return len(memoryview(data).cast("B"))

    def writable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def fileno(self) -> int:
        """See io.RawIOBase."""
        return self.raw.fileno()

    def isatty(self) -> bool:
        """See io.RawIOBase."""
        return self.failed is None and self.raw.isatty()


def guard() -> None:
    """Make standard streams of this process that never fail, in UTF-8 whatever the locale says.

    One that is closed becomes the null device: else the next file that is opened gets its number, and what a library
    prints ends up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, f"__{name}__") is None:
            _to_nothing(number, name)
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")  # Chinese on a Windows console, or with LANG=C
        if number and stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            buffer: object = stream.buffer
            raw = getattr(buffer, "raw", buffer)  # of one that is not buffered the buffer is the file itself
            if isinstance(raw, io.RawIOBase):
                setattr(sys, name, _lenient(raw, at_once=name == "stderr" or raw is buffer))


def _to_nothing(number: int, name: str) -> None:
    """Open the null device under the number of a stream that was closed when the process began."""
    handle = os.open(os.devnull, os.O_RDWR)
    if handle != number:
        os.dup2(handle, number)
        os.close(handle)
    stream = open(number, "w" if number else "r", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _lenient(raw: io.RawIOBase, *, at_once: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(Lenient(raw))
    by_line = at_once or raw.isatty()
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="replace", line_buffering=by_line, write_through=at_once)


def failed(stream: object) -> bool:
    """Does a standard stream take no more?"""
    raw = _raw(stream)
    return raw is not None and raw.failed is not None


def _raw(stream: object) -> Lenient | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, Lenient) else None


def _unreported() -> str:
    """What keeps standard output from taking more, once; nothing where its reader left."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:  # a stream that somebody put there: it may fail, unlike those of `guard`
        number = error.errno if isinstance(error, OSError) else errno.EBADF
        return "" if number in GONE else os.strerror(number or 0)
    raw = _raw(sys.stdout)
    if raw is None or raw.failed is None or raw.failed.errno in GONE or raw.reported:
        return ""
    raw.reported = True
    return os.strerror(raw.failed.errno or 0)


def check_written() -> None:
    """Raises FituneError where a result for a program could not be written; a reader that left wants none."""
    if reason := _unreported():
        raise FituneError(
            "standard output: the result could not be written; the work itself is done",
            received=reason,
            fix="free some space, or send it elsewhere",
        )


def lost() -> str:
    """What to report at the end of a standard output that failed and whose reader did not leave."""
    reason = _unreported()
    return f"standard output: {reason}; what was printed after that is lost" if reason else ""
