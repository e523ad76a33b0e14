"""Pictures of samples for pages and for a notebook's cell: a sample token by token, who sees whom, numbers in rows.

In: what is to be drawn. Out: HTML, all texts escaped; its colours are those of looks.py, which a cell brings along.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fitune.views import looks
from fitune.views.charts import svg_of, text_width
from fitune.views.tokens import TokenView

IGNORED = -100  # how other tools write a label that is not trained
CELL, LETTERS = 15, 11.0
STYLE = (
    f"{looks.of_cell()}"
    ".fitune{color:var(--fg);background:var(--bg);max-width:960px;padding:8px;"
    "font:14px/1.5 system-ui,'Noto Sans CJK SC',sans-serif}"
    ".fitune table{border-collapse:collapse}.fitune td,.fitune th{border:1px solid var(--edge);padding:2px 7px;"
    "text-align:right;white-space:pre;color:var(--fg);background:var(--bg)}"
    ".fitune th{color:var(--soft);font-weight:500}"
)


def cell(*parts: str) -> str:
    """The parts one below the other, with their style."""
    return f'<div class="fitune"><style>{STYLE}</style>{"".join(parts)}</div>'


def sample(tokens: Sequence[TokenView], more: str = "with ids and labels") -> str:
    """A sample as text, trained tokens green, and below it, where it is opened, as a strip of ids and labels.

    more: what opens the strip.
    """
    strip = f"<details><summary>{escape(more)}</summary>{token_strip(tokens)}</details>"
    return f'<div class="fitune">{token_text(tokens)}{strip}</div>'


def token_text(tokens: Sequence[TokenView]) -> str:
    """The tokens as running text, in two shades in turn, green where they are trained; ids as hints."""
    spans = []
    for one in tokens:
        kind = " ".join(["t"] * one.trained + ["b"] * one.border)
        spans.append(f'<span class="{kind}" title="{", ".join(map(str, one.ids))}">{escape(one.text)}</span>')
    return f'<div class="tokens">{"".join(spans)}</div>'


def caption(text: str) -> str:
    return f'<div class="soft">{escape(text)}</div>'


def shown(text: str) -> str:
    """A token's text so that it can be seen: spaces and line ends as signs."""
    return text.replace("\n", "⏎").replace(" ", "·") or "∅"


def token_strip(tokens: Sequence[TokenView]) -> str:
    """Each token with its ids above its labels: the ids again where it is trained, -100 where it is not; green is
    trained, the orange line is the border between what is asked and what is answered."""
    chips = []
    for one in tokens:
        kind = "tok" + (" t" if one.trained else "") + (" b" if one.border else "")
        ids = " ".join(map(str, one.ids))
        labels = ids if one.trained else " ".join([str(IGNORED)] * len(one.ids))
        chips.append(
            f'<span class="{kind}">{escape(shown(one.text))}<small>{ids}</small><small>{labels}</small></span>'
        )
    return f'<div class="row">{"".join(chips)}</div>'


def table(names: Sequence[str], rows: Sequence[tuple[str, Sequence[object]]]) -> str:
    """Rows of values with their names, below a row of names."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(str(value))}</td>' for value in values)}</tr>"
        for name, values in rows
    )
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{body}</table></div>'


def grid(seen: NDArray[np.bool_], names: Sequence[str], label: str) -> str:
    """A square for each pair of tokens, filled where the one of the row sees the one of the column."""
    count = len(names)
    cut = [name if len(name) <= 10 else f"{name[:9]}…" for name in names]
    left = max(text_width(name, LETTERS) for name in cut) + 8
    parts = []
    for row in range(count):
        y = left + row * CELL
        parts.append(f'<text x="{left - 5}" y="{y + 11}" text-anchor="end">{escape(cut[row])}</text>')
        for column in range(count):
            fill = "var(--line1)" if seen[row, column] else "none"
            x = left + column * CELL
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="{fill}" stroke="var(--edge)"/>'
            )
    for column, name in enumerate(cut):
        x = left + column * CELL + 11
        parts.append(f'<text transform="translate({x} {left - 5}) rotate(-90)">{escape(name)}</text>')
    size = left + count * CELL + 4
    return svg_of(size, size, label, parts).replace("<svg ", f'<svg style="width:{size:.0f}px" ', 1)
