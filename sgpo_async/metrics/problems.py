"""The results of a benchmark's problems and their metrics, from `evaluate` or from an evaluation during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sgpo_async.metrics.pass_rates import RESAMPLES, avg_at, pass_at, powers_of_two, share_interval


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """All samples of one problem, in the order of their seeds."""

    id: str
    digest: str  # of problem and answer
    correct: list[bool]
    tokens: list[int]  # length of each completion
    finish: list[str]  # stop, or length if it was truncated
    timed_out: list[bool]  # the verifier timed out: counts as incorrect; empty if evaluated during training
    texts: list[str] | None = None


def summarise(results: Sequence[ProblemResult], *, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return avg@k and pass@k with intervals over problems, and the lengths of completions, for P >= 1 problems.

    Keys: problems, samples (k), avg {mean, low, high}, pass {"1", "2", "4", ...: {mean, low, high}}, truncated (share
    of truncated samples), tokens_mean, tokens (total), timed_out (samples whose verifier timed out).
    """
    ordered = sorted(results, key=lambda result: result.id)  # the bootstrap draws by position
    correct, samples = counts(ordered)
    finish = [finish for result in ordered for finish in result.finish]
    tokens = [tokens for result in ordered for tokens in result.tokens]
    return {
        "problems": len(ordered),
        "samples": int(samples.min()),
        "avg": _plain(avg_at(correct, samples), resamples),
        "pass": {str(k): _plain(pass_at(correct, samples, k), resamples) for k in powers_of_two(int(samples.min()))},
        "truncated": finish.count("length") / len(finish),
        "tokens_mean": float(np.mean(tokens)),
        "tokens": sum(tokens),
        "timed_out": sum(sum(result.timed_out) for result in ordered),
    }


def counts(results: Sequence[ProblemResult]) -> tuple[np.ndarray, np.ndarray]:
    """Return (correct samples, samples) of each problem, both [P]."""
    correct = np.array([sum(result.correct) for result in results])
    return correct, np.array([len(result.correct) for result in results])


def _plain(values: np.ndarray, resamples: int) -> dict[str, float]:
    return asdict(share_interval(values, resamples=resamples))
