"""avg@k, pass@k and their uncertainty, from how many of the samples of each problem were correct.

The unit of resampling is the problem, with all its samples: problems are what a benchmark has drawn from a larger
population, and samples of one problem are far from independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import comb

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 0
_CHUNK = 2**20  # drawn problems held at a time


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over problems with its 95 % interval."""

    mean: float
    low: float
    high: float


def avg_at(correct: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Share of correct samples of each problem; its mean over problems is avg@k for k = `samples`.

    `correct` and `samples` are [P] integers with 0 <= correct <= samples and samples >= 1. Returns [P] float64.
    """
    _check(correct, samples)
    return correct / samples


def pass_at(correct: np.ndarray, samples: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate, for each problem, of the probability that at least one of `k` samples is correct.

    1 - C(n - c, k) / C(n, k) with n = `samples` and c = `correct`, both [P] integers (Chen et al. 2021,
    arXiv 2107.03374, Eq. 1), by exact integers. Needs 1 <= k <= n for every problem. Returns [P] float64.
    """
    _check(correct, samples)
    assert 1 <= k <= samples.min(), (k, samples.min())
    pairs = zip(correct.tolist(), samples.tolist(), strict=True)
    return np.array([1 - comb(n - c, k) / comb(n, k) for c, n in pairs])


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to `limit`: the k for which pass@k is reported."""
    return [2**power for power in range(limit.bit_length())]


def interval(
    values: np.ndarray, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
) -> Interval | None:
    """Mean of `values` [P], one for each problem, and its bootstrap percentile interval; None for no problems.

    P problems are drawn with replacement `resamples` times; the interval lies between the (1 - level) / 2 and
    (1 + level) / 2 quantiles of their means. Equal seeds and P draw the same problems, whatever the values.
    """
    if not values.size:
        return None
    means = np.concatenate([values[drawn].mean(1) for drawn in _draws(values.size, resamples, seed)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


def share_interval(values: np.ndarray, *, resamples: int = RESAMPLES) -> Interval:
    """`interval` of P >= 1 shares, and of the exact binomial at LEVEL (Clopper and Pearson 1934) if all are 0 or all 1.

    There every resample is the same, and 0 of 30 would seem to be known without doubt: it is [0, 0.116]. Next to
    it the bootstrap is narrower than that: 1 of 30 is [0, 0.1].
    """
    found = interval(values, resamples=resamples)
    assert found is not None
    far = 1 - ((1 - LEVEL) / 2) ** (1 / values.size)
    if not values.any():
        return replace(found, high=far)
    return replace(found, low=1 - far) if (values == 1).all() else found


def _draws(problems: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the drawn problems, [some, P] at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // problems)
    for start in range(0, resamples, rows):
        yield generator.integers(problems, size=(min(rows, resamples - start), problems))


def _check(correct: np.ndarray, samples: np.ndarray) -> None:
    assert correct.shape == samples.shape and correct.ndim == 1, (correct.shape, samples.shape)
    assert (correct >= 0).all() and (correct <= samples).all() and (samples >= 1).all()
