"""Mean and its 95 % interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean over n seeds; `half` is half the width of its 95 % interval, None from a single seed."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean: seeds are the unit, so it holds what seeds differ in, held-out sampling too."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), None, n)
    return Interval(fmean(values), _t_95(n - 1) * stdev(values) / math.sqrt(n), n)


@cache
def _t_95(degrees: int) -> float:
    """Student's t, two-sided 95 %, to three decimals: printed tables have as many, and the first results used one."""
    from scipy.stats import t

    return round(float(t.ppf(0.975, degrees)), 3)
