"""Values read from the curves of trials: of one run, and averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from sgpo_async.config.schema import Run
from sgpo_async.experiments.plan import Result, last_quarter
from sgpo_async.experiments.statistics import Interval, interval

Points = Sequence[tuple[int, Interval]]
"""(rollouts generated, mean over the seeds and its interval)."""


def completed(result: Result, run: Run) -> Result:
    """The result with a curve up to the last step: after it diverged, a run has a pass rate of 0.

    `run` is its configuration. Without these points the mean over the seeds would end at the first divergence, and a
    run that diverged would count with its pass rate before that.
    """
    if result["diverged"] is None:
        return result
    first = result["diverged"]["step"] + 1  # the failed step left no usable weights
    measured = [point for point in result["curve"] if point["step"] < first]
    guided = 0.0 if all(has(point, "guided") for point in measured) else None
    steps = {first, *range(0, run.steps, run.evaluation.every), run.steps}
    zeros = [
        {"step": step, "rollouts": step * run.rollouts_per_step, "auto": 0.0, "guided": guided}
        for step in sorted(steps)
        if step >= first
    ]
    return {**result, "curve": measured + zeros}


def third(result: Result) -> float:
    """Validation pass rate after a third of the rollouts, linearly interpolated."""
    curve = result["curve"]
    at = result["steps"] / 3
    before = max((point for point in curve if point["step"] <= at), key=lambda point: point["step"])
    after = min((point for point in curve if point["step"] >= at), key=lambda point: point["step"], default=before)
    span = after["step"] - before["step"]
    share = (at - before["step"]) / span if span else 0.0
    return float(before["auto"] + share * (after["auto"] - before["auto"]))


def has(point: Mapping[str, Any], key: str) -> bool:
    """Whether `key` was measured at this point. The guided pass rate is None if no context guides rollouts."""
    return point.get(key) is not None


def late(result: Result, key: str) -> float | None:
    """The mean of `key` over the points of the last quarter of the curve that have it; None if none has."""
    known = [point[key] for point in last_quarter(result["curve"]) if has(point, key)]
    return fmean(known) if known else None


def best(result: Result) -> float:
    """The highest validation pass rate of the curve."""
    return max(float(point["auto"]) for point in result["curve"])


def over_seeds(results: Sequence[Result], key: str) -> Points:
    """Mean and interval of `key` at each step that all results have, over the results that measured `key` there."""
    by_step = [{point["step"]: point for point in result["curve"]} for result in results]
    points: list[tuple[int, Interval]] = []
    for step in sorted(set.intersection(*map(set, by_step))):
        known = [points_of[step][key] for points_of in by_step if has(points_of[step], key)]
        if known:
            points.append((by_step[0][step]["rollouts"], interval(known)))
    return points
