"""What `sgpo-async evaluate` prints: one evaluation, or two compared, in tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from sgpo_async.evaluation.compare import Comparison, Comparisons
from sgpo_async.metrics.pass_rates import Interval
from sgpo_async.report.numbers import number, percent

SMALLEST_P = 1e-4
BOOTSTRAP = "In brackets: 95 % bootstrap intervals over problems."


def summary(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The results of summary.json, line by line."""
    sampling, model = found["sampling"], found["model"]
    mode = "with strategies" if sampling["guided"] else "without strategies"
    yield f"model: {model['path']} ({model['digest'][:8]})"
    yield (
        f"sampling: temperature {sampling['temperature']:g}, top-p {sampling['top_p']:g}, at most "
        f"{sampling['max_new_tokens']} tokens, {mode}"
    )
    table = _table("benchmark", "n x k", "avg@k, %", "pass@k, %", "cut off", "tokens")
    for name, one in found["benchmarks"].items():
        k, best = list(one["pass"].items())[-1]
        at = "" if int(k) == one["samples"] else f" @{k}"
        table.add_row(
            name,
            f"{one['problems']} x {one['samples']}",
            _share(Interval(**one["avg"])),
            _share(Interval(**best)) + at,
            percent(one["truncated"]),
            number(one["tokens_mean"]),
        )
    yield table
    for name, one in found["benchmarks"].items():
        if one["timed_out"]:
            yield f"{name}: {one['timed_out']} completions were not judged in time and count as incorrect."
    yield f"{BOOTSTRAP} Of 0 and 100, exact binomial ones. Tokens: mean length."


def comparison(a: Path, b: Path, found: Comparisons) -> Iterator[RenderableType]:
    """Two evaluations, line by line."""
    yield f"A: {a}"
    yield f"B: {b}"
    for line in found.differences:
        yield f"   differ in {line}"
    table = _table("benchmark", "", "A, %", "B, %", "A - B, points", "p")
    for name, one in found.benchmarks.items():
        paired = one.paired
        values = [_points(one.avg_a), _points(one.avg_b), _change(paired.difference)]
        table.add_row(name, _avg(one), *values, _p(paired.p_value))
        values = [_points(one.pass_a), _points(one.pass_b), _change(one.pass_difference)]
        table.add_row(f"  {paired.better} / {paired.worse} of {paired.problems}", f"pass@{one.k}", *values, "")
    yield table
    for name, one in found.benchmarks.items():
        if one.left_out_a or one.left_out_b:
            yield f"{name}: left out: {one.left_out_a} problems of A and {one.left_out_b} of B that the other lacks."
    yield BOOTSTRAP
    yield "p: exact sign-flip test on avg@k, two-sided."
    yield "x / y of n: of n problems A solves x more often than B, and y less often."


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="dim", padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="left" if head in ("benchmark", "") else "right", no_wrap=True)
    return table


def _avg(one: Comparison) -> str:
    return f"avg@{one.samples_a}" + ("" if one.samples_a == one.samples_b else f", {one.samples_b}")


def _share(found: Interval) -> str:
    return f"{_points(found.mean)} [{_points(found.low)}, {_points(found.high)}]"


def _change(found: Interval) -> str:
    return f"{_points(found.mean, '+')} [{_points(found.low, '+')}, {_points(found.high, '+')}]"


def _points(share: float, sign: str = "") -> str:
    """A share as percentage points with one decimal; 100 has no decimal, which keeps columns narrow."""
    return f"{100 * share:{sign}.{0 if abs(share) == 1 else 1}f}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= SMALLEST_P else f"< {SMALLEST_P:g}"
