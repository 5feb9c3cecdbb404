"""Compare two evaluations on the same problems, problem by problem.

The pairing removes the differences in difficulty between problems, which cause most of the variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgpo_async.metrics.pass_rates import Interval, avg_at, interval


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The difference a - b in avg@k."""

    difference: Interval  # bootstrap over problems; a problem keeps its samples of both evaluations
    p_value: float  # two-sided, of the exact sign-flip test
    better: int  # problems that a solves more often than b
    worse: int
    problems: int


def compare(correct_a: np.ndarray, samples_a: np.ndarray, correct_b: np.ndarray, samples_b: np.ndarray) -> Paired:
    """Compare a with b on P >= 1 problems; all arguments are [P] integers, with the problems in the same order."""
    assert correct_a.shape == correct_b.shape and correct_a.size
    scale = np.lcm(samples_a, samples_b)
    differences = correct_a * (scale // samples_a) - correct_b * (scale // samples_b)
    whole = int(np.lcm.reduce(scale))
    change = interval(avg_at(correct_a, samples_a) - avg_at(correct_b, samples_b))
    assert change is not None
    return Paired(
        difference=change,
        p_value=sign_flip(differences * (whole // scale)),
        better=int((differences > 0).sum()),
        worse=int((differences < 0).sum()),
        problems=correct_a.size,
    )


def sign_flip(differences: np.ndarray) -> float:
    """Two-sided p-value of the exact sign-flip (permutation) test on integer `differences` [P].

    Under the null hypothesis (a and b do not differ), both signs of a problem's difference are equally likely. The
    distribution of the sum over all 2^P choices of signs is computed exactly, by P convolutions over the integers. The
    p-value is the probability of a sum at least as far from 0 as the observed sum. If all differences are -1, 0 or 1,
    as with one sample per problem in both evaluations, this is McNemar's exact test.
    """
    sizes = np.abs(differences[differences != 0])
    total = int(sizes.sum())
    probability = np.zeros(2 * total + 1)  # of the sum s at index s + total
    probability[total] = 1.0
    for size in sizes.tolist():
        flipped = np.zeros_like(probability)
        flipped[size:] += probability[:-size] / 2
        flipped[:-size] += probability[size:] / 2
        probability = flipped
    observed = abs(int(differences.sum()))
    sums = np.arange(-total, total + 1)
    return float(min(1.0, probability[np.abs(sums) >= observed].sum()))
