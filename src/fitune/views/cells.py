"""Pictures for a notebook's cell, which are the pages' own: a sample token by token, who sees whom, numbers in rows.

In: what is to be drawn. Out: HTML that brings its colours along, for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from fitune.views.charts import svg_of, text_width
from fitune.views.plan import GREYS, LOOKS
from fitune.views.tokens import TokenView

IGNORED = -100  # how other tools write a label that is not trained
CELL, LETTERS = 15, 11.0
COLOURS = "".join(f"{look.variable}:{look.colour};" for look in (*LOOKS.values(), *GREYS.values()))
STYLE = (
    f".fitune{{{COLOURS}}}"
    ".fitune{--fg:#1c2330;--bg:#fff;--soft:#68707d;--card:#fff;--edge:#e3e4e6;--line1:#2f6fdb;--line2:#d9622b;"
    "--good:#1d7f4c;--bad:#b3382c;--warn:#96690a;color:var(--fg);background:var(--bg);max-width:960px;padding:8px;"
    "font:14px/1.5 system-ui,'Noto Sans CJK SC',sans-serif}"
    ".fitune svg{max-width:100%;height:auto;display:block}.fitune svg text{font-size:12px;fill:var(--fg)}"
    ".fitune svg .grid{stroke:var(--edge)}.fitune .soft{color:var(--soft)}"
    ".fitune .row{display:flex;flex-wrap:wrap;gap:3px;margin:4px 0 12px}"
    ".fitune .tok{border:1px solid var(--edge);border-radius:4px;padding:1px 5px;text-align:center;white-space:pre}"
    ".fitune .tok small{display:block;color:var(--soft);font-variant-numeric:tabular-nums}"
    ".fitune .tok.t{background:color-mix(in srgb,var(--good) 22%,var(--bg))}"
    ".fitune .tok.b{border-left:3px solid var(--line2)}"
    ".fitune table{border-collapse:collapse}.fitune td,.fitune th{border:1px solid var(--edge);padding:2px 7px;"
    "text-align:right;white-space:pre;color:var(--fg);background:var(--bg)}"
    ".fitune th{color:var(--soft);font-weight:500}"
)


def cell(*parts: str) -> str:
    """The parts one below the other, with their style."""
    return f'<div class="fitune"><style>{STYLE}</style>{"".join(parts)}</div>'


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
