"""Two evaluations of the same problems: a - b, problem by problem.

What only one of them has is left out and counted: a fleet leaves out problems that no actor could serve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgpo_async.errors import DataError
from sgpo_async.evaluation.evaluation_plan import differences
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
    left_out_a: int  # problems that A alone has
    left_out_b: int


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """All benchmarks that two evaluations share."""

    differences: Sequence[str]  # in their settings: `key: a, b`
    benchmarks: Mapping[str, Comparison]


def compare_folders(a: Path, b: Path) -> Comparisons:
    """Compare the benchmarks that both have.

    Raises DataError if one is not complete, if they share none, or if an id is not the same problem in both.
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
    a, b = ({result.id: result for result in side.problems(name)} for side in (left, right))
    common = _common(a, b, f"{left.folder}, {right.folder}: {name}")
    (correct_a, samples_a), (correct_b, samples_b) = (counts([side[id] for id in common]) for side in (a, b))
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
        left_out_a=len(a) - len(common),
        left_out_b=len(b) - len(common),
    )


def _common(a: Mapping[str, ProblemResult], b: Mapping[str, ProblemResult], where: str) -> list[str]:
    """The ids of the problems that both evaluations have, in order."""
    common = sorted(a.keys() & b.keys())
    if not common:
        raise DataError(f"{where}: no problem is the same in both; evaluate the same file")
    for id in common:
        if a[id].digest != b[id].digest:
            raise DataError(f"{where}: problem {id} is not the same in both; evaluate the same file")
    return common
