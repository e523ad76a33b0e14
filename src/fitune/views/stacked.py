"""Charts of parts and layers as inline SVG: stacked bars, and an area over the course of a run, each with a limit.

In: bars of pieces, or layers over a course. Out: an `<svg>` string, as those of charts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from fitune.views.charts import DASHED, RIGHT, WIDTH, legend_of, svg_of, text_width, tick_text, ticks

BEYOND = 2.5  # a limit so many times as high as all that is drawn would flatten it: it is named, not drawn
LABEL_ROWS = 4  # of the spans below an area chart; a label that finds no room in them is left out


@dataclass(frozen=True)
class Part:
    """A piece of a stacked bar: its name, its size, its CSS colour variable."""

    name: str
    value: float
    colour: str


@dataclass(frozen=True)
class StackedBar:
    """A bar of pieces, one beside the other. strong: its label is bold."""

    label: str
    parts: Sequence[Part]
    strong: bool = False

    @property
    def total(self) -> float:
        """All pieces together."""
        return sum(part.value for part in self.parts)


@dataclass(frozen=True)
class Limit:
    """A value that should not be passed, and its label, such as "budget 24.0 GiB"."""

    text: str
    value: float


@dataclass(frozen=True)
class Layer:
    """A layer of an area chart: its name, its thickness at each point, its CSS colour variable."""

    name: str
    values: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Span:
    """A named stretch of an area chart's course."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Peak:
    """A point of an area chart that is marked, and its label."""

    at: float
    value: float
    text: str


def stacked_bars(
    bars: Sequence[StackedBar],
    *,
    label: str,
    unit: str,
    form: str = ",.0f",
    limit: Limit | None = None,
    width: int = WIDTH,
) -> str:
    """Bars of coloured pieces, one below the other, from a common zero.

    Args:
        bars: the order of their pieces is that of the legend; pieces of size 0 are not drawn.
        label: what the chart shows, for those who cannot see it.
        unit, form: of all values, such as "MiB" and ",.0f".
        limit: a vertical line through all bars.
        width: of the drawing; on the page it takes all the width there is, so a small one makes large letters.
    """
    if not any(bar.total > 0 for bar in bars):
        return "<p>nothing to draw</p>"
    values = [f"{bar.total:{form}} {unit}" for bar in bars]
    above = max(text_width(bar.label) for bar in bars) > width * 0.4  # names that are long stand above their bars
    names = [
        _above(bar.label, value, width - 24) if above else bar.label for bar, value in zip(bars, values, strict=True)
    ]
    left = 16.0 if above else max(map(text_width, names + values)) * 1.08 + 10  # bold letters are wider
    high = _high(max(bar.total for bar in bars), limit)
    room, tall, gap, top = width - left - RIGHT, 26, 30 if above else 12, 20 if limit else 6
    low = top + len(bars) * (tall + gap)
    parts = []
    if limit:
        parts += _limit_name(limit, high, left, room, top)
    for at, text in _places(high, room):
        parts.append(f'<line class="grid" x1="{left + at:.1f}" x2="{left + at:.1f}" y1="{top}" y2="{low}"/>')
        text += f" {unit}" if at == 0 else ""
        shift = max(text_width(text) / 2 - left - at, 0)  # the first one does not begin before the drawing
        parts.append(f'<text x="{left + at + shift:.1f}" y="{low + 16}" text-anchor="middle">{text}</text>')
    for number, (bar, name, value) in enumerate(zip(bars, names, values, strict=True)):
        y = top + number * (tall + gap) + (gap - 4 if above else gap / 2)
        weight = ' font-weight="700"' if bar.strong else ""
        if above:
            parts.append(f'<text x="{left:.1f}" y="{y - 6}"{weight}>{escape(name)}</text>')
        else:
            parts.append(f'<text x="{left - 8:.1f}" y="{y + 10}" text-anchor="end"{weight}>{escape(name)}</text>')
            parts.append(f'<text x="{left - 8:.1f}" y="{y + 24}" text-anchor="end"{weight}>{value}</text>')
        parts += _pieces(bar, left, y, tall, room / high, unit, form)
    parts += _limit_line(limit, high, left, room, top, low)
    entries = {part.name: part.colour for bar in bars for part in bar.parts if part.value > 0}
    order = dict.fromkeys(part.name for bar in bars for part in bar.parts)
    legend, height = legend_of([(name, entries[name]) for name in order if name in entries], width, low + 28)
    return svg_of(width, height, label, [*parts, *legend])


@dataclass(frozen=True)
class Course:
    """What an area chart draws.

    layers: from the lowest up; each has a value for each point, and layers of zeros are not drawn. at: where on the
    course the points lie, ascending. spans: named stretches, ascending; names are left out where there is no room.
    limit: a dashed line, named in the legend. peak: a point that is marked.
    """

    layers: Sequence[Layer]
    at: Sequence[float]
    spans: Sequence[Span] = ()
    limit: Limit | None = None
    peak: Peak | None = None


def area_chart(
    course: Course, *, label: str, unit: str, form: str = ",.0f", width: int = WIDTH, height: int = 300
) -> str:
    """Layers upon each other over a course, with the stretches of the course named below.

    Args:
        course: what is drawn.
        label: what the chart shows, for those who cannot see it.
        unit, form: of all values, such as "MiB" and ",.0f".
        width, height: of the drawing, the height without labels and legend.
    """
    layers, at, limit = [layer for layer in course.layers if any(layer.values)], course.at, course.limit
    if not layers or len(at) < 2 or at[-1] <= at[0]:
        return "<p>nothing to draw</p>"
    high = _high(max(map(sum, zip(*(layer.values for layer in layers), strict=True))), limit)
    marks = [y for y in ticks(0, high) if y <= high]
    left = max(text_width(text) for text in [unit, *map(tick_text, marks)]) + 10
    top, low, room = 36, 36 + height, width - left - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        """Where a point of the course lies in the drawing."""
        across = left + (x - at[0]) / (at[-1] - at[0]) * room
        return round(across, 1), round(low - y / high * height, 2)

    parts = [f'<text x="{left - 6:.1f}" y="{top - 22}" text-anchor="end">{unit}</text>']
    for y in marks:
        _, down = place(at[0], y)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{width - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{down + 4}" text-anchor="end">{tick_text(y)}</text>')
    parts += _areas(layers, at, place, unit, form)
    stretches = [(span.name, place(span.start, 0)[0], place(span.end, 0)[0]) for span in course.spans]
    names, low_end = _span_names(stretches, left, width - RIGHT, top, low)
    parts += names
    entries = [(layer.name, layer.colour) for layer in layers]
    if limit and limit.value <= high:
        _, down = place(at[0], limit.value)
        parts.append(f'<line class="limit" {DASHED} x1="{left:.1f}" x2="{width - RIGHT}" y1="{down}" y2="{down}"/>')
    if limit:
        entries.append((limit.text + ("" if limit.value <= high else ", beyond the axis"), ""))
    if course.peak:
        parts += _pointer(course.peak, place(course.peak.at, course.peak.value), left, width - RIGHT, top)
    legend, whole = legend_of(entries, width, low_end + 10)
    return svg_of(width, whole, label, [*parts, *legend])


def _areas(
    layers: Sequence[Layer],
    at: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    unit: str,
    form: str,
) -> list[str]:
    """The layers as polygons, each on the one below it."""
    parts = []
    below = [0.0] * len(at)
    for layer in layers:
        above = [low_one + value for low_one, value in zip(below, layer.values, strict=True)]
        edge = [place(*point) for point in [*zip(at, above, strict=True), *reversed(list(zip(at, below, strict=True)))]]
        most = f"{escape(layer.name)}: at most {max(layer.values):{form}} {unit}"
        points = " ".join(f"{x},{y}" for x, y in edge)
        parts.append(f'<polygon fill="var({layer.colour})" points="{points}"><title>{most}</title></polygon>')
        below = above
    return parts


def _above(name: str, value: str, room: float) -> str:
    """A bar's name and value in one line; only the name is shortened."""
    return f"{_cut(name, room - text_width(f': {value}'))}: {value}"


def _cut(text: str, room: float) -> str:
    """The text, or so much of its beginning as there is room for."""
    if text_width(text) <= room:
        return text
    while text and text_width(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _high(most: float, limit: Limit | None) -> float:
    """Where the axis ends: a limit that is near is on it, with a little room behind it."""
    near = limit is not None and most < limit.value <= BEYOND * most
    return limit.value * 1.02 if limit and near else most * 1.02


def _places(high: float, room: float) -> list[tuple[float, str]]:
    """(where, text) of the round numbers along an axis of `room` that ends at `high`."""
    marks = [value for value in ticks(0, high, max(2, int(room / 80))) if value <= high]
    return [(value / high * room, tick_text(value)) for value in marks]


def _pieces(bar: StackedBar, left: float, y: float, tall: float, scale: float, unit: str, form: str) -> list[str]:
    pieces, x = [], left
    for part in bar.parts:
        wide = part.value * scale
        edge = ' stroke="var(--card)"' if wide > 3 else ""  # it would hide a thin piece
        title = f"<title>{escape(bar.label)}, {escape(part.name)}: {part.value:{form}} {unit}</title>"
        if part.value > 0:
            pieces.append(
                f'<rect class="part" x="{x:.3f}" y="{y}" width="{wide:.3f}" height="{tall}" '
                f'fill="var({part.colour})"{edge}>{title}</rect>'
            )
        x += wide
    return pieces


def _limit_name(limit: Limit, high: float, left: float, room: float, top: float) -> list[str]:
    """The label above the line of a limit."""
    if limit.value > high:
        return [f'<text x="{left + room:.1f}" y="{top - 6}" text-anchor="end">{escape(limit.text)} →</text>']
    at, half = left + limit.value / high * room, text_width(limit.text) / 2
    at = min(max(at, half), left + room + RIGHT - half)
    return [f'<text x="{at:.1f}" y="{top - 6}" text-anchor="middle">{escape(limit.text)}</text>']


def _limit_line(limit: Limit | None, high: float, left: float, room: float, top: float, low: float) -> list[str]:
    if limit is None or limit.value > high:
        return []
    at = left + limit.value / high * room
    return [f'<line class="limit" {DASHED} x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{low}"/>']


def _span_names(
    spans: Sequence[tuple[str, float, float]], left: float, right: float, top: float, low: float
) -> tuple[list[str], float]:
    """Borders and names of (name, start, end), and where they end below; the names take several rows where needed."""
    faint = 'stroke="var(--fg)" stroke-opacity=".35"'
    dotted = f'{faint} stroke-dasharray="1 3"'
    borders = [start for _, start, _ in spans if start > left + 1]
    parts = [f'<line x1="{x}" x2="{x}" y1="{top}" y2="{low}" {dotted}/>' for x in borders]
    used: list[list[tuple[float, float]]] = [[] for _ in range(LABEL_ROWS)]
    placed = []
    for name, start, end in spans:
        middle, half = (start + end) / 2, text_width(name) / 2
        centre = min(max(middle, half), right + RIGHT - half)
        row = next((row for row, taken in enumerate(used) if not taken or centre - half > taken[-1][1] + 6), None)
        if row is not None:
            used[row].append((centre - half, centre + half))
            placed.append((row, name, middle, centre))
    for row, name, middle, centre in placed:
        y = low + 18 + 15 * row
        parts.append(f'<text x="{centre:.1f}" y="{y}" text-anchor="middle">{escape(name)}</text>')
        free = not any(first - 2 < middle < last + 2 for taken in used[:row] for first, last in taken)
        if free:  # a line down to a name that would run through another name is left out
            parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low + 1}" y2="{y - 11}" {faint}/>')
    return parts, low + 24 + 15 * max((row for row, *_ in placed), default=-1)


def _pointer(peak: Peak, point: tuple[float, float], left: float, right: float, top: float) -> list[str]:
    (x, y), half = point, text_width(peak.text) * 1.08 / 2
    centre = min(max(x, left + half), right + RIGHT - half)
    return [
        f'<line x1="{x}" x2="{x}" y1="{top - 5}" y2="{y}" stroke="var(--fg)"/>',
        f'<circle class="peak" r="3.5" fill="var(--fg)" stroke="var(--card)" cx="{x}" cy="{y}"/>',
        f'<text x="{centre:.1f}" y="{top - 9}" text-anchor="middle" font-weight="700">{escape(peak.text)}</text>',
    ]
