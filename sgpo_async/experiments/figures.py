"""Curves with their intervals, as SVG: one or more panels over the rollouts, with one legend below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sgpo_async.experiments.curves import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 12  # curves in one figure
# Told apart side by side, also by those who see red and green alike: the second six are dashed.
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#111111"),
    *("#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#b5a100", "#0b3d91"),
)


class Curve(NamedTuple):
    """Something measured over rollouts generated, of one method."""

    name: str
    place: int  # among the methods that share figures: its colour
    points: Points


class Panel(NamedTuple):
    """What one diagram shows."""

    label: str  # of the vertical axis, with the unit
    curves: Sequence[Curve]
    factor: float = 1.0  # from what was measured to that unit
    top: float | None = None  # where the axis ends; default: where the curves do


def parts(methods: Sequence[str]) -> list[Sequence[str]]:
    """The methods in order, in as few parts of at most `MOST` as hold them, each about as long as the others."""
    size = math.ceil(len(methods) / math.ceil(len(methods) / MOST))
    return [methods[first : first + size] for first in range(0, len(methods), size)]


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write one figure, panels side by side: a line per method, and its interval as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sgpo"  # the same figures give the same file
    from matplotlib import pyplot as plt

    columns = 3 if len(panels) == 1 else 4  # of names of 40 letters
    rows = math.ceil(max(len(panel.curves) for panel in panels) / columns)
    figure, axes = plt.subplots(
        ncols=len(panels),
        squeeze=False,
        figsize=(7.5 if len(panels) == 1 else 11, 4.2 + 0.2 * rows),
        layout="constrained",
    )
    for panel, on in zip(panels, axes[0], strict=True):
        _draw_panel(panel, on)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_panel(panel: Panel, axes: Axes) -> None:
    for name, place, points in panel.curves:
        x = [rollouts for rollouts, _ in points]
        mean = [panel.factor * found.mean for _, found in points]
        half = [panel.factor * (found.half or 0.0) for _, found in points]
        dashes = "--" if place >= len(COLOURS) // 2 else "-"
        axes.plot(x, mean, dashes, color=COLOURS[place], label=name, marker="o", markersize=2.5)
        low, high = ([_within(m + sign * h, panel.top) for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=COLOURS[place], alpha=0.1, linewidth=0)
    axes.set(xlabel="rollouts generated", ylabel=panel.label, ylim=(0, panel.top))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)


def _within(value: float, top: float | None) -> float:
    """None of what is drawn can be below 0."""
    return min(max(0.0, value), math.inf if top is None else top)
