"""Draws curves with their intervals as SVG: one or more panels over rollouts, with one legend below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sgpo_async.config.experiment import MOST_CURVES
from sgpo_async.experiments.curves import Points
from sgpo_async.files import write_whole
from sgpo_async.report.figure import figure_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEDS_FOR_BANDS = 3  # at least; the interval of two seeds is 12.7 standard errors to each side
MOST_BANDS = 6  # a panel with more curves shows no intervals: their bands would hide each other
# Distinguishable side by side, also for red-green colour blindness; the curves of the second six are dashed.
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#111111"),
    *("#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#b5a100", "#0b3d91"),
)


class Curve(NamedTuple):
    """A measure of one method over the rollouts generated."""

    name: str
    place: int  # among the methods of the figure; determines the colour
    points: Points


class Panel(NamedTuple):
    """One diagram of a figure."""

    label: str  # of the vertical axis, with the unit
    curves: Sequence[Curve]
    factor: float = 1.0  # multiplies the measured values, to give that unit
    top: float | None = None  # end of the vertical axis; None: fits the curves


def parts(methods: Sequence[str]) -> list[Sequence[str]]:
    """The methods in order, split into the fewest parts of at most `MOST_CURVES`, of about equal length."""
    size = math.ceil(len(methods) / math.ceil(len(methods) / MOST_CURVES))
    return [methods[first : first + size] for first in range(0, len(methods), size)]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write one figure with its panels side by side: a line per method, with its interval as a band if they are few."""
    names = [curve.name for curve in panels[0].curves]
    width = 7.5 if len(panels) == 1 else 11.0
    columns = int(width / (0.6 + 0.062 * max(map(len, names))))  # in inches, at 8 points
    columns = min(max(columns, 1), len(names))
    height = 4.2 + 0.2 * math.ceil(len(names) / columns)

    def drawing(figure: Figure) -> None:
        axes = figure.subplots(ncols=len(panels), squeeze=False)[0]
        for panel, on in zip(panels, axes, strict=True):
            _draw_panel(panel, on)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)

    write_whole(path, figure_svg((width, height), drawing))


def _draw_panel(panel: Panel, axes: Axes) -> None:
    bands = len(panel.curves) <= MOST_BANDS
    for name, place, points in panel.curves:
        x = [rollouts for rollouts, _ in points]
        mean = [panel.factor * found.mean for _, found in points]
        dashes = "--" if place >= len(COLOURS) // 2 else "-"
        axes.plot(x, mean, dashes, color=COLOURS[place], label=name, linewidth=1.6)
        half = [panel.factor * (found.half or 0.0) * (found.n >= SEEDS_FOR_BANDS) for _, found in points]
        if not bands or not any(half):
            continue
        low, high = ([_within(m + sign * h, panel.top) for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=COLOURS[place], alpha=0.08, linewidth=0)
    axes.set(xlabel="rollouts generated", ylabel=panel.label, ylim=(0, panel.top))
    axes.set_xlim(0, max((rollouts for curve in panel.curves for rollouts, _ in curve.points), default=None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _within(value: float, top: float | None) -> float:
    """`value` limited to 0 ... `top`."""
    return min(max(0.0, value), math.inf if top is None else top)
