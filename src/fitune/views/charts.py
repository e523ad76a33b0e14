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
    legend, whole = legend_of(entries, width, low + 44)
    return svg_of(width, whole if entries else low + 40, label, [*parts, *legend])


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
    return svg_of(width, low + 40, f"{y_label} by {x_label}", parts)


DASHED = 'stroke="var(--fg)" stroke-width="1.6" stroke-dasharray="6 4"'


def text_width(text: str, size: float = LETTER) -> float:
    """About how wide a text is drawn; Chinese characters are squares."""
    return sum(size if unicodedata.east_asian_width(c) in "WF" else 0.58 * size for c in text)


def tick_text(value: float) -> str:
    return f"{value:,.6g}"


def legend_of(entries: Sequence[tuple[str, str]], width: float, top: float) -> tuple[list[str], float]:
    """(name, colour) in rows, and where they end below; without a colour it is a dashed line."""
    parts, x, y = [], 4.0, top
    for name, colour in entries:
        wide = 18 + text_width(name)
        if x > 4 and x + wide > width:
            x, y = 4.0, y + 19
        if colour:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="12" height="12" rx="2" fill="var({colour})"/>')
        else:
            parts.append(f'<line {DASHED} x1="{x - 2:.1f}" x2="{x + 14:.1f}" y1="{y + 6}" y2="{y + 6}"/>')
        parts.append(f'<text x="{x + 18:.1f}" y="{y + 10}">{escape(name)}</text>')
        x += wide + 14
    return parts, y + 18


def svg_of(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    start = f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "".join([start, *parts, "</svg>"])
