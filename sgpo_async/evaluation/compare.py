"""Two evaluations of the same problems: a - b, problem by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgpo_async.errors import DataError
from sgpo_async.evaluation.plan import differences
from sgpo_async.evaluation.results import Results
from sgpo_async.metrics.paired import Paired, compare
from sgpo_async.metrics.pass_rates import Interval, avg_at, interval, pass_at, powers_of_two
from sgpo_async.metrics.problems import ProblemResult, counts


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One benchmark in two evaluations."""

    samples_a: int
    samples_b: int
    avg_a: float
    avg_b: float
    paired: Paired
    k: int  # of pass@k: the largest power of two that both sample
    pass_a: float
    pass_b: float
    pass_difference: Interval


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """Two evaluations."""

    differences: Sequence[str]  # in their settings: `key: a, b`
    benchmarks: Mapping[str, Comparison]


def compare_folders(a: Path, b: Path) -> Comparisons:
    """Compare the benchmarks that both have.

    Raises DataError if one is not complete, if they share none, or if a benchmark's problems are not the same.
    """
    left, right = Results(a), Results(b)
    names = [name for name in left.summary()["benchmarks"] if name in right.summary()["benchmarks"]]
    if not names:
        raise DataError(f"{a}, {b}: have no benchmark in common; evaluate both on the same ones")
    return Comparisons(
        differences=differences(left.settings(), right.settings()),
        benchmarks={name: _compare(name, left, right) for name in names},
    )


def _compare(name: str, left: Results, right: Results) -> Comparison:
    pairs = _matched(name, left, right)
    (correct_a, samples_a), (correct_b, samples_b) = counts([a for a, _ in pairs]), counts([b for _, b in pairs])
    k = powers_of_two(int(min(samples_a.min(), samples_b.min())))[-1]
    pass_a, pass_b = pass_at(correct_a, samples_a, k), pass_at(correct_b, samples_b, k)
    change = interval(pass_a - pass_b)
    assert change is not None
    return Comparison(
        samples_a=int(samples_a.min()),
        samples_b=int(samples_b.min()),
        avg_a=float(np.mean(avg_at(correct_a, samples_a))),
        avg_b=float(np.mean(avg_at(correct_b, samples_b))),
        paired=compare(correct_a, samples_a, correct_b, samples_b),
        k=k,
        pass_a=float(pass_a.mean()),
        pass_b=float(pass_b.mean()),
        pass_difference=change,
    )


def _matched(name: str, left: Results, right: Results) -> list[tuple[ProblemResult, ProblemResult]]:
    """The results of each problem on both sides, ordered by id."""
    a, b = ({result.id: result for result in side.problems(name)} for side in (left, right))
    for id in sorted(a.keys() | b.keys()):
        if id not in a or id not in b or a[id].digest != b[id].digest:
            raise DataError(
                f"{left.folder}, {right.folder}: {name}: problem {id} is not the same in both; evaluate the same file"
            )
    return [(a[id], b[id]) for id in sorted(a)]
