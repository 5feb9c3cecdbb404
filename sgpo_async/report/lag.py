"""Draw the lag histogram over steps: for each step the stacked shares of tokens with lag 0, 1, 2, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sgpo_async.report.numbers import percent
from sgpo_async.report.svg import LEFT, RIGHT, WIDTH, Frame, axes, drawing, tip_columns

CLASSES = 6  # lags 0 to 4, and one class for all larger lags
COLUMNS = 120


def lag_shares(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[float]]]:
    """Return (step, share of tokens per lag class); neighbouring steps are merged into at most COLUMNS."""
    counted = [line for line in lines if line.get("lag_histogram")]
    steps_per_column = max(1, math.ceil(len(counted) / COLUMNS))
    shares = []
    for start in range(0, len(counted), steps_per_column):
        group = counted[start : start + steps_per_column]
        tokens = [0.0] * CLASSES
        for line in group:
            for lag, count in line["lag_histogram"].items():
                tokens[min(int(lag), CLASSES - 1)] += count
        if total := sum(tokens):
            shares.append((sum(line["step"] for line in group) / len(group), [part / total for part in tokens]))
    return shares


def lag_chart(shares: Sequence[tuple[float, Sequence[float]]]) -> str:
    """Return the chart as SVG."""
    steps = [step for step, _ in shares]
    gap = (steps[-1] - steps[0]) / max(1, len(steps) - 1) or 1.0
    frame = Frame(steps[0] - gap / 2, steps[-1] + gap / 2, 0.0, 1.0)
    width = (WIDTH - LEFT - RIGHT) / len(steps)
    parts = axes(frame, [0.0, 0.25, 0.5, 0.75, 1.0], "share of trained tokens", lambda share: f"{100 * share:.0f} %")
    for step, column in shares:
        below = 0.0
        for lag, share in enumerate(column):
            top, bottom = frame.y(below + share), frame.y(below)
            below += share
            if share > 0:
                box = f'x="{frame.x(step) - width / 2:.2f}" y="{top:.2f}" width="{width:.2f}"'
                parts.append(f'<rect class="lag{lag}" {box} height="{bottom - top:.2f}"/>')
    return drawing([*parts, *tip_columns(frame, [(step, _tip(step, column)) for step, column in shares])], "Lag")


def lag_legend(shares: Sequence[tuple[float, Sequence[float]]]) -> list[tuple[str, str]]:
    """Return (CSS class, name) of each lag class that occurs."""
    present = [lag for lag in range(CLASSES) if any(column[lag] > 0 for _, column in shares)]
    return [(f"lag{lag}", f"lag {lag}" + (" or more" if lag == CLASSES - 1 else "")) for lag in present]


def _tip(step: float, column: Sequence[float]) -> str:
    present = [f"lag {lag}: {percent(share)}" for lag, share in enumerate(column) if share]
    return "\n".join([f"step {step:.0f}", *present])
