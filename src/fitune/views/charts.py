"""Charts as inline SVG: no file, font or script from elsewhere, and Chinese text as the reader's system draws it.

In: named series of points, bars, layers. Out: an `<svg>` string that takes its colours from the page's CSS variables.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH = 640
WIDE, NARROW = 960, 350  # widths of the drawings for a screen and for a phone
RIGHT, TOP = 12, 14
LETTER = 12  # the size of the text that charts leave room for
BEYOND = 2.5  # a limit so many times as high as all that is drawn would flatten it: it is named, not drawn
LABEL_ROWS = 4  # of the spans below an area chart; a label that finds no room in them is left out


@dataclass(frozen=True)
class Series:
    """A line: its name, its points, its CSS colour variable, and whether points are marked."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = "--line1"
    marks: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 x 10^n apart) that cover low to high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis that cover low to high: 1, 2 and 5 x 10^n, or powers of ten where many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 1 and high / low < 2:  # hardly a change: even steps, as on a linear axis
        return [value for value in ticks(low, high) if value > 0]
    each = (1,) if last - first > 3 else (1, 2, 5)
    marks = [m * 10.0**n for n in range(first, last + 1) for m in each]
    start = max((value for value in marks if value <= low * 1.0001), default=marks[0])
    end = min((value for value in marks if value >= high * 0.9999), default=marks[-1])
    return [value for value in marks if start <= value <= end]


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, width: int = WIDTH, height: int = 230, log: bool = False
) -> str:
    """The lines with axes, a grid and a legend; empty series are left out.

    Args:
        series: of many points no more are drawn than can be seen, but no peak of them is lost.
        x_label, y_label: what the axes are.
        width, height: of the drawing, the height without labels and legend.
        log: a logarithmic y axis; points that are not above zero are left out.
    """
    if log:
        series = [replace(s, points=[point for point in s.points if point[1] > 0]) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return "<p>nothing to draw</p>"
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    marks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = min(marks[0], *ys), max(marks[-1], *ys)
    left = max(text_width(f"{y:.4g}") for y in marks) + 10
    low, room = TOP + height, width - left - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return round(left + (x - x_low) / (x_high - x_low) * room, 1), round(low - share * height, 1)

    parts = []
    for y in marks:
        _, at = place(x_low, y)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{width - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x_low, x_high, max(2, int(room / 90))):
        if x_low <= x <= x_high and x == int(x):
            at = min(place(x, y_low)[0], width - text_width(f"{x:.0f}") / 2 - 1)
            parts.append(f'<text x="{at:.1f}" y="{low + 16}" text-anchor="middle">{x:.0f}</text>')
    for s in series:
        parts += _line(s, place, int(room))
    label = f"{y_label} by {x_label}" + (", logarithmic" if log else "")
    parts.append(f'<text x="{left + room / 2:.1f}" y="{low + 33}" text-anchor="middle">{escape(x_label)}</text>')
    entries = [(s.name, s.colour) for s in series] if len(series) > 1 else []
    legend, whole = _legend(entries, width, low + 44)
    return _svg(width, whole if entries else low + 40, label, [*parts, *legend])


def _line(s: Series, place: Callable[[float, float], tuple[float, float]], most: int) -> list[str]:
    """A line, and its marks, of which a crowded one has none."""
    drawn = [place(*point) for point in thinned(s.points, most)]
    path = " ".join(f"{x},{y}" for x, y in drawn)
    line = f'<polyline fill="none" stroke-width="1.8" stroke="var({s.colour})" points="{path}"/>'
    marked = (s.marks and len(drawn) <= most / 8) or len(drawn) == 1
    return [line, *(f'<circle r="3.5" fill="var({s.colour})" cx="{x}" cy="{y}"/>' for x, y in drawn if marked)]


def thinned(points: Sequence[tuple[float, float]], columns: int) -> Sequence[tuple[float, float]]:
    """The points; where there are many, the lowest and the highest of each of so many columns, in their order."""
    if len(points) <= 2 * columns:
        return points
    kept = []
    for n in range(columns):
        some = points[n * len(points) // columns : (n + 1) * len(points) // columns]
        both = {min(some, key=_y), max(some, key=_y)}
        kept += [point for point in some if point in both][:2]
    return [points[0], *kept, points[-1]]


def _y(point: tuple[float, float]) -> float:
    return point[1]


@dataclass(frozen=True)
class Bar:
    """One bar: what stands below it, and how high it is."""

    label: str
    value: float


def bar_chart(bars: Sequence[Bar], *, x_label: str, y_label: str, width: int = WIDTH, height: int = 230) -> str:
    """Bars side by side; as many are labelled as there is room for."""
    if not bars:
        return "<p>nothing to draw</p>"
    y_ticks = [y for y in ticks(0, max(bar.value for bar in bars) or 1) if y == int(y)]
    high = y_ticks[-1]
    left = max(text_width(f"{y:,.0f}") for y in y_ticks) + 10
    low, each = TOP + height, (width - left - RIGHT) / len(bars)
    parts = []
    for y in y_ticks:
        at = round(low - y / high * height, 1)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{width - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{at + 4}" text-anchor="end">{y:,.0f}</text>')
    every = math.ceil((max(text_width(bar.label) for bar in bars) + 12) / each)
    for number, bar in enumerate(bars):
        tall = bar.value / high * height
        x = left + number * each
        parts.append(
            f'<rect x="{x + each * 0.05:.1f}" y="{low - tall:.1f}" width="{each * 0.9:.1f}" height="{tall:.1f}" '
            f'fill="var(--line1)"><title>{escape(bar.label)}: {bar.value:,.0f}</title></rect>'
        )
        if number % every == 0:
            parts.append(f'<text x="{x:.1f}" y="{low + 16}" text-anchor="middle">{escape(bar.label)}</text>')
    parts.append(f'<text x="{(width + left) / 2:.1f}" y="{low + 33}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg(width, low + 40, f"{y_label} by {x_label}", parts)


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
    """A value that should not be passed, and what is said of it, such as "budget 24.0 GiB"."""

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
    """A point of an area chart that is pointed at, and what is said of it."""

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
    legend, height = _legend([(name, entries[name]) for name in order if name in entries], width, low + 28)
    return _svg(width, height, label, [*parts, *legend])


def area_chart(
    layers: Sequence[Layer],
    at: Sequence[float],
    *,
    label: str,
    unit: str,
    form: str = ",.0f",
    spans: Sequence[Span] = (),
    limit: Limit | None = None,
    peak: Peak | None = None,
    width: int = WIDTH,
    height: int = 300,
) -> str:
    """Layers upon each other over a course, with the stretches of the course named below.

    Args:
        layers: from the lowest up; each has a value for each point. Layers of zeros are not drawn.
        at: where on the course the points lie, ascending.
        label: what the chart shows, for those who cannot see it.
        unit, form: of all values, such as "MiB" and ",.0f".
        spans: stretches of the course, ascending; the names of some are left out where there is no room.
        limit: a dashed line, told in the legend.
        peak: a point that is marked.
        width, height: of the drawing, the height without labels and legend.
    """
    layers = [layer for layer in layers if any(layer.values)]
    if not layers or len(at) < 2 or at[-1] <= at[0]:
        return "<p>nothing to draw</p>"
    high = _high(max(map(sum, zip(*(layer.values for layer in layers), strict=True))), limit)
    marks = [y for y in ticks(0, high) if y <= high]
    left = max(text_width(text) for text in [unit, *map(_tick, marks)]) + 10
    top, low, room = 36, 36 + height, width - left - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - at[0]) / (at[-1] - at[0]) * room
        return round(across, 1), round(low - y / high * height, 2)

    parts = [f'<text x="{left - 6:.1f}" y="{top - 22}" text-anchor="end">{unit}</text>']
    for y in marks:
        _, down = place(at[0], y)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{width - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{down + 4}" text-anchor="end">{_tick(y)}</text>')
    below = [0.0] * len(at)
    for layer in layers:
        above = [low_one + value for low_one, value in zip(below, layer.values, strict=True)]
        edge = [place(*point) for point in [*zip(at, above, strict=True), *reversed(list(zip(at, below, strict=True)))]]
        most = f"{escape(layer.name)}: at most {max(layer.values):{form}} {unit}"
        points = " ".join(f"{x},{y}" for x, y in edge)
        parts.append(f'<polygon fill="var({layer.colour})" points="{points}"><title>{most}</title></polygon>')
        below = above
    stretches = [(span.name, place(span.start, 0)[0], place(span.end, 0)[0]) for span in spans]
    names, low_end = _span_names(stretches, left, width - RIGHT, top, low)
    parts += names
    entries = [(layer.name, layer.colour) for layer in layers]
    if limit and limit.value <= high:
        _, down = place(at[0], limit.value)
        parts.append(f'<line class="limit" {_DASHED} x1="{left:.1f}" x2="{width - RIGHT}" y1="{down}" y2="{down}"/>')
    if limit:
        entries.append((limit.text + ("" if limit.value <= high else ", beyond the axis"), ""))
    if peak:
        parts += _pointer(peak, place(peak.at, peak.value), left, width - RIGHT, top)
    legend, whole = _legend(entries, width, low_end + 10)
    return _svg(width, whole, label, [*parts, *legend])


_DASHED = 'stroke="var(--fg)" stroke-width="1.6" stroke-dasharray="6 4"'


def text_width(text: str, size: float = LETTER) -> float:
    """About how wide a text is drawn; Chinese characters are squares."""
    return sum(size if unicodedata.east_asian_width(c) in "WF" else 0.58 * size for c in text)


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


def _tick(value: float) -> str:
    return f"{value:,.6g}"


def _places(high: float, room: float) -> list[tuple[float, str]]:
    """(where, text) of the round numbers along an axis of `room` that ends at `high`."""
    marks = [value for value in ticks(0, high, max(2, int(room / 80))) if value <= high]
    return [(value / high * room, _tick(value)) for value in marks]


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
    """The words above the line of a limit."""
    if limit.value > high:
        return [f'<text x="{left + room:.1f}" y="{top - 6}" text-anchor="end">{escape(limit.text)} →</text>']
    at, half = left + limit.value / high * room, text_width(limit.text) / 2
    at = min(max(at, half), left + room + RIGHT - half)
    return [f'<text x="{at:.1f}" y="{top - 6}" text-anchor="middle">{escape(limit.text)}</text>']


def _limit_line(limit: Limit | None, high: float, left: float, room: float, top: float, low: float) -> list[str]:
    if limit is None or limit.value > high:
        return []
    at = left + limit.value / high * room
    return [f'<line class="limit" {_DASHED} x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{low}"/>']


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


def _legend(entries: Sequence[tuple[str, str]], width: float, top: float) -> tuple[list[str], float]:
    """(name, colour) in rows, and where they end below; without a colour it is a dashed line."""
    parts, x, y = [], 4.0, top
    for name, colour in entries:
        wide = 18 + text_width(name)
        if x > 4 and x + wide > width:
            x, y = 4.0, y + 19
        if colour:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="var({colour})"/>')
        else:
            parts.append(f'<line {_DASHED} x1="{x - 2:.1f}" x2="{x + 14:.1f}" y1="{y + 6}" y2="{y + 6}"/>')
        parts.append(f'<text x="{x + 18:.1f}" y="{y + 10}">{escape(name)}</text>')
        x += wide + 14
    return parts, y + 18


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    start = f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "".join([start, *parts, "</svg>"])
