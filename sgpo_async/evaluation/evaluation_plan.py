"""What is evaluated, and how. Calls with equal plans belong to one evaluation and may share its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgpo_async.config import Run, by_key_path
from sgpo_async.errors import ConfigError, DataError
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.prompts import prompt_settings

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """One evaluation. Prompt style, maximum length, engine and seed are those of the run's configuration."""

    run: Run
    benchmarks: Sequence[Benchmark]
    temperature: float
    top_p: float
    guided: bool  # with the strategies before the problems, instead of without

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"--temperature must be > 0, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be > 0 and <= 1, got {self.top_p:g}")
        for benchmark in self.benchmarks:
            bare = next((problem.id for problem in benchmark.problems if not problem.strategy), None)
            if self.guided and bare is not None:
                raise DataError(f"{benchmark.name}: problem {bare} has no strategy; evaluate it without --guided")

    def settings(self, model: str) -> dict[str, Any]:
        """Everything that the results depend on, as plain data; `model` is the digest of the weights."""
        return {
            "format": FORMAT,
            "model": model,
            "dtype": self.run.model.dtype,
            "engine": self.run.engine.kind,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.run.rollout.max_new_tokens,
            **prompt_settings(self.run.tasks),
            "guided": self.guided,
            "seed": self.run.seed,
            "benchmarks": {
                one.name: {"digest": one.digest, "problems": len(one.problems), "samples": one.samples} | _judging(one)
                for one in self.benchmarks
            },
        }


def _judging(benchmark: Benchmark) -> dict[str, Any]:
    """What decides whether a completion is correct, if it is not the usual."""
    usual = (benchmark.verifier, benchmark.solved_at) in (("math", 1.0), ("cues", 1.0))
    return {} if usual else {"verifier": benchmark.verifier, "solved_at": benchmark.solved_at}


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """`key: value here, value there` for each key in which two settings differ."""
    a, b = dict(by_key_path(here)), dict(by_key_path(there))
    return [f"{key}: {a.get(key)}, {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
