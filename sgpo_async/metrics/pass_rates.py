"""Compute avg@k, pass@k and their confidence intervals from the number of correct samples of each problem.

The bootstrap resamples problems, each with all its samples: a benchmark is a sample of problems from a larger
population, and the samples of one problem are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import comb

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
_CHUNK = 2**20  # drawn problems in memory at a time


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over problems with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def avg_at(correct: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return the share of correct samples of each problem; its mean over problems is avg@k for k = `samples`.

    `correct` and `samples` are [P] integers with 0 <= correct <= samples and samples >= 1. Returns [P] float64.
    """
    _check(correct, samples)
    return correct / samples


def pass_at(correct: np.ndarray, samples: np.ndarray, k: int) -> np.ndarray:
    """Estimate without bias, for each problem, the probability that at least one of `k` samples is correct.

    1 - C(n - c, k) / C(n, k) with n = `samples` and c = `correct`, both [P] integers (Chen et al. 2021,
    arXiv 2107.03374, Eq. 1), in exact integer arithmetic. Needs 1 <= k <= n for every problem. Returns [P] float64.
    """
    _check(correct, samples)
    assert 1 <= k <= samples.min(), (k, samples.min())
    pairs = zip(correct.tolist(), samples.tolist(), strict=True)
    return np.array([1 - comb(n - c, k) / comb(n, k) for c, n in pairs])


def powers_of_two(limit: int) -> list[int]:
    """Return 1, 2, 4, ... up to `limit`: the k for which pass@k is reported."""
    return [2**power for power in range(limit.bit_length())]


def interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> Interval | None:
    """Return the mean of `values` [P], one per problem, with its bootstrap percentile interval; None if P is 0.

    The bootstrap draws P problems with replacement, `resamples` times; the bounds of the interval are the
    (1 - level) / 2 and (1 + level) / 2 quantiles of their means. The drawn problems depend only on seed and P.
    """
    if not values.size:
        return None
    means = np.concatenate([values[drawn].mean(1) for drawn in _draws(values.size, resamples, seed)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def share_interval(values: np.ndarray, *, resamples: int = RESAMPLES) -> Interval:
    """Return `interval` of P >= 1 shares; if all are 0 or all are 1, the exact binomial interval replaces its bound.

    If all shares are equal, so are all resamples, and the bootstrap interval of 0 of 30 would be [0, 0]. The exact
    binomial interval at LEVEL (Clopper and Pearson 1934) is [0, 0.116]. Close to this case the bootstrap interval is
    still narrower: 1 of 30 gives [0, 0.1].
    """
    bootstrap = interval(values, resamples=resamples)
    assert bootstrap is not None
    exact_high = 1 - ((1 - LEVEL) / 2) ** (1 / values.size)
    if not values.any():
        return replace(bootstrap, high=exact_high)
    return replace(bootstrap, low=1 - exact_high) if (values == 1).all() else bootstrap


def _draws(problems: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of the drawn problems, [R, P] at a time for R resamples."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // problems)
    for start in range(0, resamples, rows):
        yield generator.integers(problems, size=(min(rows, resamples - start), problems))


def _check(correct: np.ndarray, samples: np.ndarray) -> None:
    assert correct.shape == samples.shape and correct.ndim == 1, (correct.shape, samples.shape)
    assert (correct >= 0).all() and (correct <= samples).all() and (samples >= 1).all()
