"""Curves with their intervals, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sgpo_async.experiments.statistics import Interval


class Curve(NamedTuple):
    """Pass rate over rollouts generated, of one method."""

    name: str
    points: Sequence[tuple[int, Interval]]


def draw_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write one figure: a line per method, and its interval as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sgpo"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve in curves:
        x = [rollouts for rollouts, _ in curve.points]
        mean = [100 * found.mean for _, found in curve.points]
        half = [100 * (found.half or 0.0) for _, found in curve.points]
        (line,) = axes.plot(x, mean, label=curve.name)
        low, high = ([max(0.0, min(100.0, m + sign * h)) for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="rollouts generated", ylabel="validation pass rate alone, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
