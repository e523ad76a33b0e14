"""Line charts as inline SVG: no file, font or script from elsewhere, and Chinese text as the reader's system draws it.

In: named series of points. Out: an `<svg>` string that takes its colours from the page's CSS variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 36


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


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """The lines with axes, a grid and a legend; empty series are left out."""
    series = [s for s in series if s.points]
    if not series:
        return "<p>nothing to draw</p>"
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    y_ticks = ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in y_ticks:
        _, at = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(x_low, x_high):
        if x_low <= x <= x_high and x == int(x):
            at, _ = place(x, y_low)
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.0f}</text>')
    for s in series:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in s.points))
        style = f'stroke="var({s.colour})"'
        parts.append(f'<polyline fill="none" stroke-width="1.8" {style} points="{path}"/>')
        if s.marks or len(s.points) == 1:
            parts += [
                f'<circle r="3.5" fill="var({s.colour})" cx="{x}" cy="{y}"/>'
                for x, y in (place(*point) for point in s.points)
            ]
    at = LEFT + 8
    for s in series if len(series) > 1 else []:
        parts.append(f'<rect x="{at}" y="{TOP}" width="14" height="4" fill="var({s.colour})"/>')
        parts.append(f'<text x="{at + 19}" y="{TOP + 6}">{escape(s.name)}</text>')
        at += 30 + 8 * len(s.name)
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Bar:
    """One bar: what stands below it, and how high it is."""

    label: str
    value: float


def bar_chart(bars: Sequence[Bar], *, x_label: str, y_label: str) -> str:
    """Bars side by side; every few of them are labelled."""
    if not bars:
        return "<p>nothing to draw</p>"
    y_ticks = ticks(0, max(bar.value for bar in bars) or 1)
    high = y_ticks[-1]
    width = (WIDTH - LEFT - RIGHT) / len(bars)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in y_ticks:
        at = round(HEIGHT - BOTTOM - y / high * (HEIGHT - TOP - BOTTOM), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{y:,.0f}</text>')
    for number, bar in enumerate(bars):
        tall = bar.value / high * (HEIGHT - TOP - BOTTOM)
        x = LEFT + number * width
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{width - 2:.1f}" height="{tall:.1f}" '
            f'fill="var(--line1)"><title>{escape(bar.label)}: {bar.value:,.0f}</title></rect>'
        )
        if number % max(1, len(bars) // 8) == 0:
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(bar.label)}</text>'
            )
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join([*parts, "</svg>"])
