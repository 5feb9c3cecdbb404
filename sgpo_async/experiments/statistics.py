"""Mean and its 95 % interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


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
    quantile = T_95[min(n - 1, len(T_95)) - 1]
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(n), n)
