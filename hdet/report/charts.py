"""Line charts as inline SVG: as wide as the page, with text of one size at any width. Pure functions of plain values.

Axes and text are placed in per cent of the chart's width and height. Curves lie in a square of 1000 x 1000 that is
stretched over it, with strokes that are not. Colours and sizes are the page's, by class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

_POINTS = 600
"""Points of a curve that are drawn, at most: of more, the lowest and the highest of each of so many stretches are."""
_COLUMNS = 60
"""Columns that show their values under the pointer, at most."""
_DEEPEST = 1000.0
"""How far below the highest value of the lowest curve a logarithmic axis goes, at most."""
_BEYOND = 1.012
"""How far the x axis goes, in units of its last step."""
_DECADES = 1.2
"""Of a logarithmic axis with fewer, 2 and 5 are marked, too."""


class Line(NamedTuple):
    """A curve. What is not finite leaves a gap."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    """Index of a colour of the page."""
    style: str = "solid"
    """``solid``, ``dashed``, ``faint`` or ``dots``: points, joined by a line."""


class Band(NamedTuple):
    """An area between two curves."""

    name: str
    points: Sequence[tuple[float, float, float]]
    """(x, lowest, highest)"""
    colour: int = 0


class Mark(NamedTuple):
    """An event."""

    x: float
    y: float
    """Where there is no value, not finite: it stands at the lower edge."""
    kind: str
    """``undone`` or ``excluded``."""
    text: str
    """Under the pointer."""


class Chart(NamedTuple):
    """One chart."""

    title: str
    about: str
    """A sentence below the title."""
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    log: bool = False
    last: float = 0.0
    """Where the x axis ends, at least."""


def draw(chart: Chart) -> str:
    """The chart as HTML; empty if it has no point."""
    values = [y for line in chart.lines for _, y in line.points] + [
        y for b in chart.bands for p in b.points for y in p[1:]
    ]
    values = [y for y in values if math.isfinite(y) and (y > 0 or not chart.log)]
    if not values:
        return ""
    if chart.log:  # a curve that falls to nothing leaves the chart, and the others keep their shape
        highest = [max((y for _, y in line.points if math.isfinite(y)), default=0.0) for line in chart.lines]
        floor = min((y for y in highest if y > 0), default=0.0) / _DEEPEST
        values = [y for y in values if y >= floor]
    steps = [x for line in chart.lines for x, _ in line.points] + [p[0] for b in chart.bands for p in b.points]
    right = max([chart.last, *steps]) or 1.0
    axis = _Log(min(values), max(values)) if chart.log else _Linear(min(values), max(values))

    def x_of(step: float) -> float:
        return 1000 * step / (right * _BEYOND)

    def y_of(value: float) -> float:
        return 1000 * (1 - axis.place(value)) if axis.has(value) else math.nan

    shapes = [_band(band, x_of, y_of) for band in chart.bands]
    shapes += [_line(line, x_of, y_of) for line in chart.lines]
    label = f"{chart.title}: {', '.join(line.name for line in chart.lines)}"
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.about)}</span>'
        f'</figcaption>{_legend(chart)}<svg class="plot" role="img" aria-label="{escape(label)}">'
        f"{_axes(axis, right)}"
        f'<svg class="area" width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">'
        f"{''.join(shapes)}{_columns(chart, x_of)}</svg>"
        f"{''.join(_mark(mark, x_of, y_of) for mark in chart.marks)}</svg></figure>"
    )


# ---------------------------------------------------------------------------------------------------------- axes


class _Linear:
    """From somewhat below the lowest value to somewhat above the highest."""

    def __init__(self, low: float, high: float) -> None:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.low, self.high = low - room, high + room

    def has(self, value: float) -> bool:
        return math.isfinite(value)

    def place(self, value: float) -> float:
        """In [0, 1], from the lower edge."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return nice(self.low, self.high, 4)


class _Log:
    """The same of logarithms."""

    def __init__(self, low: float, high: float) -> None:
        lowest, highest = math.log10(low), math.log10(high)
        room = max(0.06 * (highest - lowest), 0.05)
        self.low, self.high = lowest - room, highest + room

    def has(self, value: float) -> bool:
        return math.isfinite(value) and value > 0

    def place(self, value: float) -> float:
        """In [0, 1], from the lower edge."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = max(1, math.ceil((self.high - self.low) / 6))
        factors = (1, 2, 5) if self.high - self.low < _DECADES else (1,)
        found = [factor * 10.0**k for k in decades if k % every == 0 for factor in factors]
        inside = [value for value in found if self.low <= math.log10(value) <= self.high]
        return inside if len(inside) > 1 else nice(10**self.low, 10**self.high, 3)


def nice(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step)
    return [0.0 if k == 0 else k * step for k in range(first, math.floor(high / step) + 1)]


def _axes(axis: _Linear | _Log, right: float) -> str:
    parts = []
    for value in axis.ticks():
        y = f"{100 * (1 - axis.place(value)):.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="-6" y="{y}" dy="0.32em">{number(value)}</text>')
    for value in nice(0, right, 4):
        x = f"{100 * value / (right * _BEYOND):.2f}%"
        parts.append(f'<text class="x" x="{x}" y="100%" dy="1.4em">{number(value) if value else "step 0"}</text>')
    return f'{"".join(parts)}<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>'


def number(value: float) -> str:
    """A number for people."""
    if not math.isfinite(value):
        return "unknown"
    if value == int(value) and 1 <= abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------- shapes


def _line(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    points = [(x_of(x), y_of(y)) for x, y in thinned(line.points)]
    path, gap = [], True
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{'M' if gap else 'L'}{x:.1f} {y:.1f}")
        gap = not math.isfinite(y)
    drawn = f'<path class="line {line.style} c{line.colour}" d="{"".join(path)}"/>'
    if line.style == "dots":
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points if math.isfinite(y))
        drawn += f'<path class="dot c{line.colour}" d="{dots}"/>'
    return drawn


def _band(band: Band, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    lows = thinned([(x, low) for x, low, high in band.points if low <= high])
    highs = thinned([(x, high) for x, low, high in band.points if low <= high])
    known = [(x_of(x), y_of(y)) for x, y in (*highs, *reversed(lows))]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in known if math.isfinite(y))
    return f'<path class="band f{band.colour}" d="M{path}Z"/>' if path else ""


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most about :data:`_POINTS` of them, with all peaks."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(2 * len(points) / _POINTS)
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        part = [point for point in points[i : i + size] if math.isfinite(point[1])]
        if part:
            kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def _mark(mark: Mark, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    y = y_of(mark.y)
    place = f'x="{x_of(mark.x) / 10:.2f}%" y="{y / 10 if math.isfinite(y) else 96:.2f}%"'
    shape = "M-5-5L5 5M-5 5L5-5" if mark.kind == "undone" else "M0-6L6 5H-6Z"
    return f'<svg class="mark" {place}><path class="{mark.kind}" d="{shape}"/><title>{escape(mark.text)}</title></svg>'


def _columns(chart: Chart, x_of: Callable[[float], float]) -> str:
    """Invisible columns that show the values at a step under the pointer."""
    steps = sorted({x for line in chart.lines for x, _ in line.points})
    steps = steps[:: math.ceil(len(steps) / _COLUMNS)]
    edges = [
        0.0,
        *((a + b) / 2 for a, b in itertools.pairwise(steps)),
        steps[-1] + (steps[-1] - steps[-2]) / 2 if len(steps) > 1 else steps[-1],
    ]
    lookup = [(line.name, dict(line.points)) for line in chart.lines]
    parts = []
    for step, left, right in zip(steps, edges, edges[1:], strict=False):
        told = [f"{name}: {number(of[step])}" for name, of in lookup if step in of and math.isfinite(of[step])]
        text = escape("\n".join([f"step {number(step)}", *told]))
        x, width = x_of(left), min(x_of(right), 1000) - x_of(left)
        parts.append(
            f'<rect class="column" x="{x:.1f}" width="{max(width, 0):.1f}" height="1000"><title>{text}</title></rect>'
        )
    return "".join(parts)


def _legend(chart: Chart) -> str:
    items = [
        f'<span><svg class="key"><line class="line {line.style} c{line.colour}" x1="0" x2="18" y1="6" y2="6"/>'
        f"{_key_dot(line)}</svg>{escape(line.name)}</span>"
        for line in chart.lines
        if any(math.isfinite(y) for _, y in line.points)
    ]
    items += [
        f'<span><svg class="key"><rect class="band f{band.colour}" width="18" height="12"/></svg>'
        f"{escape(band.name)}</span>"
        for band in chart.bands
        if band.points
    ]
    kinds = {mark.kind for mark in chart.marks}
    names = {"undone": ("M4 1L14 11M4 11L14 1", "round undone"), "excluded": ("M9 0L15 11H3Z", "replica left out")}
    items += [
        f'<span><svg class="key"><path class="{kind}" d="{shape}"/></svg>{text}</span>'
        for kind, (shape, text) in names.items()
        if kind in kinds
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _key_dot(line: Line) -> str:
    return f'<path class="dot c{line.colour}" d="M9 6h0"/>' if line.style == "dots" else ""
