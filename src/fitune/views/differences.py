"""Two answers beside each other, with what differs marked.

In: two texts. Out: both, escaped, with `<del>` around what only the first has and `<ins>` around what only the second
has; words and single characters of Chinese and the like are compared, so that a mark is what a reader would call it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from fitune.core.letters import FULL_WIDTH

PIECES = re.compile(rf"[{FULL_WIDTH}]|\s+|[^\s\w]|(?:(?![{FULL_WIDTH}])\w)+")
MOST = 2_000  # pieces of both texts together: longer ones are left as they are
LITTLE = 0.2  # share that two texts have in common, below which all of both would be marked


def marked(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts with their differences marked; two that have next to nothing in common have no marks."""
    first, second = PIECES.findall(before), PIECES.findall(after)
    plain = (escape(before), escape(after))
    if before == after or not first or not second or len(first) + len(second) > MOST:
        return plain
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    if matcher.ratio() < LITTLE:
        return plain
    left, right = [], []
    for kind, a, b, c, d in matcher.get_opcodes():
        left.append(_tagged(first[a:b], "del" if kind != "equal" else ""))
        right.append(_tagged(second[c:d], "ins" if kind != "equal" else ""))
    return Markup("").join(left), Markup("").join(right)


def _tagged(pieces: Sequence[str], tag: str) -> Markup:
    text = escape("".join(pieces))
    return Markup(f"<{tag}>{text}</{tag}>") if tag and text else text  # noqa: S704  # the text is escaped
