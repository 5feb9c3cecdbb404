"""What a trial's curve says: along the way of one run, and of several seeds together."""

from __future__ import annotations

from collections.abc import Sequence

from sgpo_async.config.schema import Run
from sgpo_async.experiments.plan import Result
from sgpo_async.experiments.statistics import Interval, interval

Points = Sequence[tuple[int, Interval]]
"""Rollouts generated, and what was measured there."""


def completed(result: Result, run: Run) -> Result:
    """The result with points to the last step: a run that diverged solves nothing from the step after.

    `run` is its configuration. Without these points the seeds of a cell would have only the beginning in common, and
    one that diverged would count for what it was before.
    """
    if result["diverged"] is None:
        return result
    first = result["diverged"]["step"] + 1  # the step that failed left no weights worth measuring
    measured = [point for point in result["curve"] if point["step"] < first]
    size = run.rollout.size * run.learner.problems_per_step
    after = {first, *range(0, run.steps, run.evaluation.every), run.steps}
    nothing = [
        {"step": step, "rollouts": step * size, "auto": 0.0, "guided": 0.0} for step in sorted(after) if step >= first
    ]
    return {**result, "curve": measured + nothing}


def third(result: Result) -> float:
    """Validation pass rate at a third of the rollouts, on the straight line between the points around it."""
    curve = result["curve"]
    at = result["steps"] / 3
    before = max((point for point in curve if point["step"] <= at), key=lambda point: point["step"])
    after = min((point for point in curve if point["step"] >= at), key=lambda point: point["step"], default=before)
    span = after["step"] - before["step"]
    share = (at - before["step"]) / span if span else 0.0
    return float(before["auto"] + share * (after["auto"] - before["auto"]))


def best(result: Result) -> float:
    """The highest validation pass rate along the way."""
    return max(float(point["auto"]) for point in result["curve"])


def over_seeds(results: Sequence[Result], key: str) -> Points:
    """Mean and interval of `key` at each step that all results have, over those that measured it there."""
    by_step = [{point["step"]: point for point in result["curve"]} for result in results]
    points: list[tuple[int, Interval]] = []
    for step in sorted(set.intersection(*(set(one) for one in by_step))):
        known = [one[step][key] for one in by_step if key in one[step]]
        if known:
            points.append((by_step[0][step]["rollouts"], interval(known)))
    return points
