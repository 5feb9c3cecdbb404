"""Line charts as inline SVG: axes with units, legend, tooltips of the browser; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sgpo_async.report.numbers import short

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 40  # margins around the plotting area
TIPS = 160  # columns with a tooltip
NEARLY_0 = 1e-16  # less is at the lower end of a logarithmic axis
FLAT = 1e-10  # a smaller span is a rounding error's

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: `colour` is a slot of the page's palette; `dots` marks single measurements."""

    name: str
    points: Sequence[Point]
    colour: int
    smooth: bool = False  # draw a running mean, and the points themselves faintly behind it
    dots: bool = False
    bound: bool = False  # not measured but set: a plain dashed line


@dataclass(frozen=True)
class Frame:
    """The plotting area: data coordinates to those of the drawing. `log`: powers of ten are equally far apart."""

    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False

    def x(self, value: float) -> float:
        """Horizontal place of a step."""
        return LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place of a figure; beyond the axis it stays at its end."""
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
    """One chart over steps; `show` writes a figure of the y axis, which `log` makes logarithmic (0 is at its end).

    Series without points are left out.
    """
    series = [one for one in series if one.points]
    steps = [x for one in series for x, _ in one.points]
    values = [y for one in series for _, y in one.points]
    ticks = powers_of_ten(values) if log else nice_ticks(*(y_range or _range(values)))
    lone = 0.5 if min(steps) == max(steps) else 0.0
    frame = Frame(min(steps) - lone, max(steps) + lone, ticks[0], ticks[-1], log)
    curves = [part for one in series for part in _curve(one, frame)]
    return drawing([*axes(frame, ticks, y_label, show), *curves, *_tips(series, frame, show)], y_label)


def drawing(parts: Sequence[str], label: str) -> str:
    """An SVG element around parts."""
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} over steps">'
    return "\n".join([head, *parts, "</svg>"])


def axes(frame: Frame, ticks: Sequence[float], y_label: str, show: Callable[[float], str]) -> list[str]:
    """Grid, tick labels and the names of both axes."""
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{show(tick)}</text>')
    base = HEIGHT - BOTTOM
    for tick in nice_ticks(frame.x0, frame.x1, 6):
        if float(tick).is_integer() and frame.x0 <= tick <= frame.x1:
            x = frame.x(tick)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{tick:.0f}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">optimiser step</text>')
    turned = f'transform="translate(12 {(TOP + base) / 2}) rotate(-90)"'
    parts.append(f'<text class="label" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return parts


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers whose first and last enclose [low, high]."""
    if high - low < FLAT:
        low, high = (low - 0.5, high + 0.5) if abs(low) > FLAT else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def powers_of_ten(values: Sequence[float], count: int = 7) -> list[float]:
    """At most `count` powers of ten, evenly spaced, whose first and last enclose the values above NEARLY_0."""
    above = [value for value in values if value > NEARLY_0] or [1.0]
    low, high = math.floor(math.log10(min(above)) + 1e-9), math.ceil(math.log10(max(above)) - 1e-9)
    step = max(1, math.ceil((high - low) / (count - 1)))
    return [10.0**power for power in range(low, max(high, low + 1) + step, step)]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over the `window` points around each, over half as many at the ends."""
    half = window // 2
    smooth = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        smooth.append((x, sum(y for _, y in near) / len(near)))
    return smooth


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of the axis: it includes 0, and a single spike does not rule it."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    typical = ordered[min(len(ordered) - 1, int(0.98 * len(ordered)))]
    if high > 3 * typical > 0:
        high = typical * 1.2
    return min(low, 0.0), max(high, 0.0)


def _curve(series: Series, frame: Frame) -> list[str]:
    colour = f"c{series.colour}"
    places = [(frame.x(x), frame.y(y)) for x, y in series.points]
    if series.bound:
        return [_path(places, f"line bound {colour}")]
    if series.dots or len(places) == 1:
        dots = [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
        return [_path(places, f"line dashed {colour}"), *dots]
    if not series.smooth or len(places) < 10:
        return [_path(places, f"line {colour}")]
    window = max(3, len(places) // 15) | 1
    return [_path(places, f"line faint {colour}"), _path(running_mean(places, window), f"line {colour}")]


def _path(places: Sequence[Point], css: str) -> str:
    return f'<path class="{css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>'


def _tips(series: Sequence[Series], frame: Frame, show: Callable[[float], str]) -> list[str]:
    """Invisible columns, each with the figures of its step as a tooltip."""
    figures: dict[float, list[str]] = {}
    for one in series:
        for x, y in one.points:
            figures.setdefault(x, []).append(f"{one.name}: {show(y)}")
    steps = sorted(figures)
    shown = steps[:: max(1, math.ceil(len(steps) / TIPS))]
    return tip_columns(frame, [(x, "\n".join([f"step {x:.0f}", *figures[x]])) for x in shown])


def tip_columns(frame: Frame, tips: Sequence[tuple[float, str]]) -> list[str]:
    """One invisible column per (step, text)."""
    width = (WIDTH - LEFT - RIGHT) / max(1, len(tips))
    height = HEIGHT - TOP - BOTTOM
    return [
        f'<rect class="tip" x="{frame.x(x) - width / 2:.1f}" y="{TOP}" width="{width:.1f}" height="{height}">'
        f"<title>{escape(text)}</title></rect>"
        for x, text in tips
    ]
