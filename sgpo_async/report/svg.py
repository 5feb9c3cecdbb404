"""Draw line charts as inline SVG, with axes and the browser's tooltips; the colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sgpo_async.report.numbers import short

WIDTH, HEIGHT = 400, 220  # units; the page scales them to the width of the chart, and texts against it (style.FONTS)
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 32, 28  # margins around the plotting area
TIPS = 160  # maximal number of columns with a tooltip
NEARLY_0 = 1e-16  # smaller values lie at the lower end of a logarithmic axis
FLAT = 1e-10  # a smaller range of values is a rounding error

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: `colour` is an index into the page's palette; `dots` marks single measurements."""

    name: str
    points: Sequence[Point]
    colour: int
    smooth: bool = False  # draw a running mean, and the points faintly behind it
    dots: bool = False
    bound: bool = False  # a configured bound, not a measurement: a plain dashed line


@dataclass(frozen=True)
class Frame:
    """The plotting area; converts data to SVG coordinates. With `log` the y axis is logarithmic."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False

    def x(self, value: float) -> float:
        """Return the x coordinate of a step."""
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the y coordinate of a value; a value outside the axis is moved to its nearest end."""
        scale = math.log10 if self.log else float
        low, high, at = (scale(y) for y in (self.y0, self.y1, min(max(value, self.y0), self.y1)))
        share = (at - low) / ((high - low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    show: Callable[[float], str] = short,
    log: bool = False,
) -> str:
    """Draw one chart over steps; `show` formats a value of the y axis, which `log` makes logarithmic (0 at its end).

    Series without points are left out.
    """
    series = [curve for curve in series if curve.points]
    steps = [x for curve in series for x, _ in curve.points]
    values = [y for curve in series for _, y in curve.points]
    ticks = powers_of_ten(values) if log else nice_ticks(*(y_range or _range(values)))
    margin = 0.5 if min(steps) == max(steps) else 0.0
    frame = Frame(min(steps) - margin, max(steps) + margin, ticks[0], ticks[-1], log)
    behind = sorted(series, key=lambda curve: curve.dots)  # lines must not hide single measurements
    curves = [part for curve in behind for part in _curve(curve, frame)]
    return drawing([*axes(frame, ticks, y_label, show), *curves, *_tips(series, frame, show)], y_label)


def drawing(parts: Sequence[str], label: str) -> str:
    """Return an SVG element that contains `parts`."""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} over steps">'
    return "\n".join([head, *parts, "</svg>"])


def axes(frame: Frame, ticks: Sequence[float], y_label: str, show: Callable[[float], str]) -> list[str]:
    """Draw the grid, the tick labels and the names of both axes."""
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        at = f'x="{LEFT - 6}" y="{y:.1f}" dy=".35em" text-anchor="end"'
        parts.append(f'<text class="tick" {at}>{show(tick)}</text>')
    base = HEIGHT - BOTTOM
    shown = [tick for tick in nice_ticks(frame.x0, frame.x1, 6) if frame.x0 <= tick <= frame.x1 and tick.is_integer()]
    for tick in shown:
        x, text = frame.x(tick), f"step {tick:.0f}" if tick == shown[0] else f"{tick:.0f}"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 6}" dy=".8em" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(f'<text class="label" x="2" y="{TOP - 13}">{escape(y_label)}</text>')
    return parts


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, the first and last of which enclose [low, high]."""
    if high - low < FLAT:
        low, high = (low - 0.5, high + 0.5) if abs(low) > FLAT else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def powers_of_ten(values: Sequence[float], count: int = 7) -> list[float]:
    """Return at most `count` evenly spaced powers of ten that enclose all values above NEARLY_0."""
    above = [value for value in values if value > NEARLY_0] or [1.0]
    low, high = math.floor(math.log10(min(above)) + 1e-9), math.ceil(math.log10(max(above)) - 1e-9)
    step = max(1, math.ceil((high - low) / (count - 1)))
    return [10.0**power for power in range(low, max(high, low + 1) + step, step)]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Return the mean over the `window` points around each point; at the ends over half as many."""
    half = window // 2
    smooth = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        smooth.append((x, sum(y for _, y in near) / len(near)))
    return smooth


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the y axis: it includes 0, and a few very high values may exceed it."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    typical = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if high > 3 * typical > 0:
        high = typical * 1.2
    return min(low, 0.0), max(high, 0.0)


def _curve(series: Series, frame: Frame) -> list[str]:
    colour = f"c{series.colour}"
    coordinates = [(frame.x(x), frame.y(y)) for x, y in series.points]
    if series.bound:
        return [_path(coordinates, f"line bound {colour}")]
    if series.dots or len(coordinates) == 1:
        dots = [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in coordinates]
        return [_path(coordinates, f"line dashed {colour}"), *dots]
    if not series.smooth or len(coordinates) < 10:
        return [_path(coordinates, f"line {colour}")]
    window = max(3, len(coordinates) // 15) | 1
    return [_path(coordinates, f"line faint {colour}"), _path(running_mean(coordinates, window), f"line {colour}")]


def _path(coordinates: Sequence[Point], css: str) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in coordinates)}"/>'


def _tips(series: Sequence[Series], frame: Frame, show: Callable[[float], str]) -> list[str]:
    """Draw invisible columns, each with the values of its step as a tooltip."""
    values: dict[float, list[str]] = {}
    for curve in series:
        for x, y in curve.points:
            values.setdefault(x, []).append(f"{curve.name}: {show(y)}")
    steps = sorted(values)
    shown = steps[:: max(1, math.ceil(len(steps) / TIPS))]
    return tip_columns(frame, [(x, "\n".join([f"step {x:.0f}", *values[x]])) for x in shown])


def tip_columns(frame: Frame, tips: Sequence[tuple[float, str]]) -> list[str]:
    """Draw one invisible column per (step, tooltip text)."""
    width = (WIDTH - LEFT - RIGHT) / max(1, len(tips))
    height = HEIGHT - TOP - BOTTOM
    return [
        f'<rect class="tip" x="{frame.x(x) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height}">'
        f"<title>{escape(text)}</title></rect>"
        for x, text in tips
    ]
