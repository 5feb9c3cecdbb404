"""The mean over seeds and its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean over n seeds; `half` is half the width of its 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean. It covers all differences between seeds, including held-out sampling."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), None, n)
    return Interval(fmean(values), _t_95(n - 1) * stdev(values) / math.sqrt(n), n)


@cache
def _t_95(degrees: int) -> float:
    """Student's t, two-sided 95 %, rounded to three decimals like the printed table that the first results used."""
    from scipy.stats import t

    return round(float(t.ppf(0.975, degrees)), 3)
