"""Files as text: which encoding a file is in, and its lines.

In: a file, packed with gzip or not. Out: its lines. UTF-8 is the rule; UTF-16 and UTF-32 are known by their mark
(UTF-16 without one by its zero bytes), GB18030 (GBK is a part of it) by what its bytes would decode to. A file that is
read so gets a notice.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from fitune.core.errors import DataError, shorten
from fitune.core.letters import COMMON_HAN
from fitune.core.records import Source
from fitune.core.units import MIB
from fitune.core.untrusted import check_file

Item = tuple[object, Source] | DataError
Notice = Callable[[str], None]  # receives how a file was understood

BOMS = (  # UTF-32's begins with UTF-16's, so it is asked first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
GZIP = b"\x1f\x8b"
SAMPLE = 1 << 22  # bytes that are looked at to know GB18030 from other encodings
BLOCK = MIB
MOST_ROW = 64 << 20  # characters of a row
MOST_LINE = 1 << 30  # characters of a line that holds a whole list
BOMB, BOMB_RATIO = (
    256 << 20,
    200,
)  # unpacked bytes from which on a file may not grow so many times: text grows 10
WIDE_SHARE, WIDE_LEAST = 0.2, 4  # zero bytes of the head, at even or at odd places alone, that mean UTF-16
COMMON = frozenset("的一是不了在人有我他这中大来上个国和地到说们为子你时要就出会可以对生能学下年得自")
CHINESE = re.compile(f"[{COMMON_HAN}]")
LEAST = 50  # Chinese characters from which on the common ones among them are counted


def not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    """The error's own place counts from the last chunk: the line is found by reading again."""
    line, encoding = None, error.encoding.upper()
    if encoding.startswith("UTF-8"):
        encoding = "UTF-8"
        with opened(path) as stream:
            line = next((n for n, raw in enumerate(stream, 1) if not _decodes(raw)), None)
    bad = error.object[error.start : error.start + 1]
    return DataError(
        f"not {encoding}",
        file=path,
        line=line,
        received=f"byte 0x{bad.hex()}" if bad else "no byte",
        expected=f"{encoding} text",
        fix="save it as UTF-8; from another encoding: iconv -f NAME -t utf-8",
    )


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class _Unpacked(gzip.GzipFile):
    """A gzip file that is given up when it unpacks to what no text does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path, self._packed = path, path.stat().st_size

    def _counted(self, data: bytes) -> bytes:
        if self.tell() > max(BOMB, BOMB_RATIO * self._packed):
            raise too_large(self._path, f"{self._packed:,} bytes unpack to more than {self.tell():,}")
        return data

    def read(self, size: int | None = -1) -> bytes:
        """As of any file; at most so much at once that it can be given up in time."""
        return self._counted(super().read(size))

    def read1(self, size: int = -1) -> bytes:
        """As of any file."""
        return self._counted(super().read1(size))


def too_large(path: Path, received: str) -> DataError:
    """A packed file that grows beyond measure."""
    return DataError(
        "a packed file that is nearly nothing but repetition",
        file=path,
        received=received,
        expected=f"packed text, which grows some ten times ({BOMB_RATIO} at most)",
        fix="unpack it and look at it",
    )


def opened(path: Path) -> BinaryIO:
    """The file, unpacked where it is packed.

    Raises:
        DataError: it is no ordinary file: a pipe or a device never ends.
    """
    check_file(path, DataError)
    file = path.open("rb")
    packed = file.read(2) == GZIP
    file.seek(0)
    if not packed:
        return file
    file.close()
    return cast(BinaryIO, _Unpacked(path))


def head_of(path: Path) -> bytes:
    """Its first bytes."""
    with opened(path) as file:
        return file.read(256)


def encoding_of(path: Path) -> str:
    """The encoding of a file: by its mark, else UTF-8 where all of it is, else what its bytes look like."""
    head = head_of(path)
    marked = next((name for bom, name in BOMS if head.startswith(bom)), None)
    if marked is not None:
        return marked
    if (wide := _wide(head)) and _all_decodes(path, wide):
        return wide
    if not _all_decodes(path, "utf-8") and _is_chinese(path):
        return "gb18030"
    return "utf-8-sig"  # what is wrong with it is reported when it is read


def _wide(head: bytes) -> str | None:
    """UTF-16 without its mark: Latin letters, digits and punctuation have a zero byte each, all on one side."""
    even, odd = head[0::2].count(0), head[1::2].count(0)
    enough = max(WIDE_LEAST, WIDE_SHARE * len(head) / 2)
    if odd >= enough and not even:
        return "utf-16-le"
    return "utf-16-be" if even >= enough and not odd else None


def _all_decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with opened(path) as stream:
            while block := stream.read(BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _is_chinese(path: Path) -> bool:
    """Would it be Chinese as GB18030? Western and Korean text decodes too, into characters that nobody writes."""
    with opened(path) as stream:
        sample = stream.read(SAMPLE)
    wide = [c for c in sample.decode("utf-8", "replace") if c > "\x7f"]
    if 2 * wide.count("\ufffd") < len(wide):
        return False  # UTF-8 with some broken bytes
    text = sample.decode("gb18030", "ignore")
    foreign = [c for c in text if c > "\x7f"]
    usual = len("".join(foreign).encode("gb2312", "ignore")) / 2
    chinese = CHINESE.findall(text)
    if not chinese or usual < 0.9 * len(foreign):
        return False
    common = sum(c in COMMON for c in chinese)
    return (len(chinese) < LEAST or common >= 0.02 * len(chinese)) and _all_decodes(path, "gb18030")


@contextmanager
def lines_of(path: Path, notice: Notice, newline: str | None = None) -> Iterator[Iterator[str]]:
    """The file's lines as text.

    Args:
        path: the file.
        notice: receives a note of an encoding other than UTF-8.
        newline: as for `open`: None makes all line ends alike.

    Raises:
        DataError: a NUL character, which no text holds; there the file ends for us.
    """
    encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        notice(f"{path}: read as {encoding.upper()}")
    with io.TextIOWrapper(opened(path), encoding, newline=newline) as stream:
        yield _without_nul(_lines(stream, path), path)


def check_row(size: int, path: Path, line: int) -> None:
    """Raises DataError for a row of more characters than any has."""
    if size > MOST_ROW:
        raise DataError(
            "a row that is too long",
            file=path,
            line=line,
            received=f"more than {MOST_ROW >> 20} million characters",
            expected=f"{MOST_ROW >> 20} million at most",
            fix="split the text into several rows, or leave the row out",
        )


def _lines(stream: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """Lines, none of them longer than a row may be; the first may hold a whole list or object."""
    number, first = 0, True
    while line := stream.readline(MOST_ROW + 1):
        number += 1
        if len(line) > MOST_ROW:
            if not first or not line.lstrip("\ufeff \t\r").startswith(("[", "{")) or "\0" in line:
                check_row(len(line), path, number)
            line += stream.readline(MOST_LINE)
            if not line.endswith("\n") and stream.read(1):
                check_row(len(line), path, number)
        first = first and not line.strip()
        yield line


def _without_nul(lines: Iterable[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise DataError(
                "a NUL character: this is no text",
                file=path,
                line=number,
                received=shorten(line[:60]),
                expected="text in UTF-8, or in UTF-16 with a byte order mark",
                fix="the file is broken or of another kind; save it anew as UTF-8",
            )
        yield line
